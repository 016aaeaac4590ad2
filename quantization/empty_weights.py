"""Room for weights that are read later, in few bits or not."""

import torch
from torch import nn

from ..checkpoints.memory.large_pages import empty
from ..modeling_emo.kernels.packed.packed_tensor import PackedTensor
from ..modeling_emo.kernels.packed.packed_weights import PackedWeight
from .packed_config import PackedConfig


def empty_weight(
    shape: tuple[int, ...], dtype: torch.dtype, packing: PackedConfig | None, count: int, device: torch.device
) -> nn.Parameter:
    """Room for a stack of matrices, uninitialised and without a gradient.

    Args:
        shape (`tuple[int, ...]`): of each matrix: outputs, inputs.
        dtype (`torch.dtype`): of the numbers, or of the scales of packed ones.
        packing (`PackedConfig`, *optional*): how they are packed, if they are.
        count (`int`): how many matrices.
        device (`torch.device`): where.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import PackedConfig
    >>> from transformers_emo.quantization.empty_weights import empty_weight
    >>> empty_weight((64, 32), torch.bfloat16, PackedConfig(bits=4), 5, torch.device("cpu")).shape
    torch.Size([5, 64, 32])

    ```
    """

    def room(numel: int, of: torch.dtype) -> torch.Tensor:
        if device.type == "cpu":
            return empty(count * numel, of)
        return torch.empty(count * numel, dtype=of, device=device)

    rows, inputs = shape
    if packing is None:
        return nn.Parameter(room(rows * inputs, dtype).view(count, rows, inputs), requires_grad=False)
    group = packing.group_of(inputs)
    words, groups = inputs * packing.bits // 32, inputs // group
    packed = room(rows * words, torch.int32).view(count, rows, words)
    scale = room(rows * groups, dtype).view(count, rows, groups)
    zero = None if packing.symmetric else room(rows * groups, torch.uint8).view(count, rows, groups)
    return PackedTensor(PackedWeight(packed, scale, zero, packing.bits, group)).as_parameter()
