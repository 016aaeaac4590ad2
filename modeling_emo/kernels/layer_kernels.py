"""Compiled code for the parts of a layer other than its experts, for inference on a CPU.

Each function returns `None` where PyTorch should compute instead.
"""

import torch
from torch import nn

from .native_calls import Kernels
from .native_library import find_kernels
from .observers import is_observed

# The kernel is faster than PyTorch for at most so many rows and at least so many weights (measured on AVX-512
# and AMX; with vectors of AVX-512 on an AMD EPYC).
_FEW_ROWS = {torch.bfloat16: 6, torch.float32: 32}
_FEW_ROWS_OF_VECTORS = 8
_FEW_ROWS_OF_TILES = 128
_MANY_WEIGHTS = 1 << 18


def is_faster(kernels: Kernels, rows: int, weight: torch.Tensor) -> bool:
    """Whether so few rows are multiplied faster by the kernels than by PyTorch.

    Args:
        kernels (`Kernels`): the kernels.
        rows (`int`): the number of rows.
        weight (`torch.Tensor`): (N, D) bfloat16 or float32.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.kernels.layer_kernels import is_faster
    >>> from transformers_emo.modeling_emo.kernels.native_library import load_kernels
    >>> [is_faster(load_kernels(), rows, torch.ones(512, 512)) for rows in (1, 1000)]
    [True, False]

    ```
    """
    if weight.dtype == torch.bfloat16 and kernels.fits_tiles(weight.shape[1]):
        return rows <= _FEW_ROWS_OF_TILES
    return rows <= max(_FEW_ROWS[weight.dtype], _FEW_ROWS_OF_VECTORS if kernels.has_panels else 0)


def _fits_bias(bias: torch.Tensor, weight: torch.Tensor) -> bool:
    same = bias.dtype == weight.dtype and bias.device == weight.device
    return same and bias.shape == weight.shape[:1] and bias.is_contiguous()


def few_rows_linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """`torch.nn.functional.linear` for many weights and few rows, on a CPU.

    Args:
        input (`torch.Tensor`): (..., D).
        weight (`torch.Tensor`): (N, D).
        bias (`torch.Tensor`, *optional*): (N,).

    Returns:
        `torch.Tensor` or `None`: (..., N). `None` where PyTorch should compute: for many rows, few weights,
        dtypes other than bfloat16 and float32 or two different ones, other devices, subclasses of tensors
        (quantised, distributed or fake ones), under autocast, where PyTorch looks at operations (forward-mode
        derivatives, `torch.func`, tracing, modes) and without compiled kernels.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.kernels.layer_kernels import few_rows_linear
    >>> few_rows_linear(torch.ones(512, 512), torch.ones(512, 512), None) is None  # many rows
    True

    ```
    """
    if is_observed():
        return None
    rows = input.numel() // max(input.shape[-1], 1)
    if (
        not 0 < rows <= _FEW_ROWS_OF_TILES
        or weight.numel() < _MANY_WEIGHTS
        or weight.shape[1:] != input.shape[-1:]
        or (bias is not None and not _fits_bias(bias, weight))
        or weight.layout != torch.strided
        or not weight.is_contiguous()
        or (kernels := kernels_for(input, weight)) is None
        or not is_faster(kernels, rows, weight)
    ):
        return None
    rows_MD = input.reshape(rows, input.shape[-1]).contiguous()
    return kernels.linear(rows_MD, weight, bias).view(*input.shape[:-1], weight.shape[0])


def rms_norm(input: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor | None:
    """`weight * x / sqrt(mean(x ** 2) + epsilon)` in float32, rounded at the end, in one pass instead of six.

    Args:
        input (`torch.Tensor`): (..., D).
        weight (`torch.Tensor`): (D,).
        epsilon (`float`): added to the mean of squares.

    Returns:
        `torch.Tensor` or `None`: (..., D); `None` as for `few_rows_linear`, however many rows there are.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.kernels.layer_kernels import rms_norm
    >>> rms_norm(torch.ones(2, 4).double(), torch.ones(4).double(), 1e-6) is None  # another dtype
    True

    ```
    """
    kernels = None if is_observed() else kernels_for(input, weight)
    if kernels is None or weight.shape != input.shape[-1:] or not weight.is_contiguous():
        return None
    rows_MD = input.reshape(-1, input.shape[-1]).contiguous()
    return kernels.rms_norm(rows_MD, weight, epsilon).view(input.shape)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor | None:
    """Rotary position embeddings of queries or keys, in float32, rounded at the end.

    Args:
        states (`torch.Tensor`): (B, S, H, W): B sequences, S positions, H heads, W an even width; contiguous.
        cos, sin (`torch.Tensor`): (B or 1, S, W) float32.

    Returns:
        `torch.Tensor` or `None`: like `states`; `None` as for `few_rows_linear`, and for cosines not float32.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.kernels.layer_kernels import rotate
    >>> rotate(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 4).double(), torch.ones(1, 2, 4).double()) is None
    True

    ```
    """
    if is_observed():
        return None
    batch, length, heads, width = states.shape
    if (
        any(angles.dtype != torch.float32 or not angles.is_cpu for angles in (cos, sin))
        or cos.shape != sin.shape
        or cos.shape not in ((batch, length, width), (1, length, width))
        or width % 2
        or not states.is_contiguous()
        or (kernels := kernels_for(states, states)) is None
    ):
        return None
    positions = [angles.reshape(-1, width).contiguous() for angles in (cos, sin)]
    return kernels.rotate(states.view(-1, heads, width), *positions).view(states.shape)


def kernels_for(input: torch.Tensor, weight: torch.Tensor) -> Kernels | None:
    """The compiled kernels, if they can compute with these: plain tensors of one dtype on the CPU.

    Args:
        input (`torch.Tensor`): what is computed with.
        weight (`torch.Tensor`): a weight.

    Returns:
        `Kernels` or `None`: `None` for other tensors or dtypes, under autocast, and without compiled kernels.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.kernels.layer_kernels import kernels_for
    >>> kernels_for(torch.ones(1, 2).double(), torch.ones(2).double()) is None
    True

    ```
    """
    if (
        input.dtype != weight.dtype
        or input.dtype not in _FEW_ROWS
        or not input.is_cpu
        or not weight.is_cpu
        or type(input) is not torch.Tensor
        or type(weight) not in (torch.Tensor, nn.Parameter)
        or input.numel() == 0
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    return find_kernels()
