"""The undocumented names of PyTorch that this package uses. Any release of PyTorch may remove one.

The package takes them only through `private_torch`. A test looks for others.
"""

import importlib
from typing import Any

import torch

TESTED = "2.13 to 2.15"
"""The versions of PyTorch that the package is tested with; `pyproject.toml` asks for the same."""

USES = {
    "torch.utils._python_dispatch.is_traceable_wrapper_subclass": (
        "recognises quantised and distributed weights, which compiled code must not read by their address"
    ),
    "torch.distributed.checkpoint.filesystem._StorageInfo": (
        "says in a training checkpoint where the bytes of a tensor lie"
    ),
    "torch.utils.weak.WeakTensorKeyDictionary": (
        "remembers which parameters have their rows frozen, by identity and only while they live"
    ),
    "torch._C._functorch.peek_interpreter_stack": (
        "tells transforms of torch.func, whose tensors compiled code cannot read"
    ),
    "torch.autograd.forward_ad._current_level": (
        "tells derivatives in forward mode, which compiled code would lose"
    ),
    "torch._C._is_tracing": "tells torch.jit.trace, which compiled code would be left out of",
    "torch._C._len_torch_dispatch_stack": "tells modes that look at every operation",
    "torch._C._len_torch_function_stack": "tells modes that look at every function",
    "torch.overrides._get_current_function_mode_stack": "tells which modes these are",
    "torch.utils._device.DeviceContext": "tells a default device from other modes",
    "torch._C.DisableTorchFunctionSubclass": "runs an operation on a weight in few bits as on any tensor",
    "torch.Tensor._make_wrapper_subclass": "makes the tensor that stands for a weight in few bits",
}
"""Each name, and what it is used for."""


def private_torch(name: str) -> Any:
    """Take one of `USES` from PyTorch.

    Args:
        name (`str`): its full name.

    Returns:
        `Any`: the function or class.

    Raises:
        ImportError: if this PyTorch has no such name. The message names its use, this version and those
            tested.
        KeyError: if the name is none of `USES`.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.kernels.private_torch import private_torch
    >>> is_wrapper = private_torch("torch.utils._python_dispatch.is_traceable_wrapper_subclass")
    >>> is_wrapper(torch.ones(2))
    False

    ```
    """
    use = USES[name]
    place, _, last = name.rpartition(".")
    try:
        owner = torch.Tensor if place == "torch.Tensor" else importlib.import_module(place)
        return getattr(owner, last)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"PyTorch {torch.__version__} has no {name}, which {use}. transformers-emo is tested with "
            f"PyTorch {TESTED}: install one of these, or a newer transformers-emo."
        ) from error
