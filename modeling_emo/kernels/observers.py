"""Whether PyTorch does more with a call than compute it: it cannot see what compiled code does."""

import torch
from torch.autograd import forward_ad

from .private_torch import private_torch

_transforms = private_torch("torch._C._functorch.peek_interpreter_stack")
_dispatch_modes = private_torch("torch._C._len_torch_dispatch_stack")
_is_traced = private_torch("torch._C._is_tracing")
_count_function_modes = private_torch("torch._C._len_torch_function_stack")
_function_modes = private_torch("torch.overrides._get_current_function_mode_stack")
_device_mode = private_torch("torch.utils._device.DeviceContext")
private_torch("torch.autograd.forward_ad._current_level")  # it is there; below it is read as it is then
_forward_mode = vars(forward_ad)


# Asked while code is compiled, not traced: the trace would always say yes. PyTorch compiles anew where the
# answer changes.
@torch.compiler.assume_constant_result
def is_transformed() -> bool:
    """Whether derivatives are taken in forward mode, or a transform of `torch.func` is at work.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.kernels.observers import is_transformed
    >>> seen = []
    >>> _ = torch.func.vmap(lambda x: seen.append(is_transformed()) or x)(torch.ones(2))
    >>> seen, is_transformed()
    ([True], False)

    ```
    """
    return _forward_mode["_current_level"] >= 0 or _transforms() is not None


def is_observed() -> bool:
    """Whether a call is transformed, traced by `torch.jit.trace`, or seen by a mode.

    Modes count operations (`FlopCounterMode`), record them (`make_fx`) or replace them. A default device is a
    mode too, but changes nothing where tensors are given.

    Example:

    ```python
    >>> import torch
    >>> from torch.utils.flop_counter import FlopCounterMode
    >>> from transformers_emo.modeling_emo.kernels.observers import is_observed
    >>> with FlopCounterMode(display=False):
    ...     is_observed()
    True
    >>> is_observed()
    False

    ```
    """
    if is_transformed() or _dispatch_modes() or _is_traced():
        return True
    return _count_function_modes() > 0 and any(
        not isinstance(mode, _device_mode) for mode in _function_modes()
    )
