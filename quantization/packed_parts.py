"""The tensors that a packed weight is kept in, in memory and on disk.

Shape suffixes: N outputs, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..modeling_emo.kernels.packed.packed_tensor import PackedTensor
from ..modeling_emo.kernels.packed.packed_weights import PackedWeight
from ..modeling_emo.weight_names import STACKED_EXPERTS


def parts_of(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that a weight is kept in: itself, if it is not packed.

    Args:
        tensor (`torch.Tensor`): the weight.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.quantization.packed_parts import parts_of
    >>> list(parts_of(torch.ones(3)))
    ['']

    ```
    """
    return tensor.weight.tensors if isinstance(tensor, PackedTensor) else {"": tensor}


def of_parts(parts: Mapping[str, torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """A weight of such tensors, kept as another one is.

    Args:
        parts (`Mapping[str, torch.Tensor]`): as `parts_of` names them.
        like (`torch.Tensor`): the other weight.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.quantization.packed_parts import of_parts
    >>> of_parts({"": torch.zeros(2)}, torch.ones(3))
    tensor([0., 0.])

    ```
    """
    if not isinstance(like, PackedTensor):
        return parts[""]
    kept = like.weight
    return PackedTensor(
        PackedWeight(parts["packed"], parts["scale"], parts.get("zero"), kept.bits, kept.group)
    )


def unpacked_zeros(packed: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
    """Zero points as they are in memory.

    Args:
        packed (`torch.Tensor`): int32 (..., N * bits / 32, G), as on disk: packed along the outputs.
        bits (`int`): 8 or 4.
        rows (`int`): N.

    Returns:
        `torch.Tensor`: uint8 (..., N, G).

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.quantization.packed_parts import packed_zeros, unpacked_zeros
    >>> zeros = torch.arange(16, dtype=torch.uint8).view(8, 2)
    >>> torch.equal(unpacked_zeros(packed_zeros(zeros, 4), 4, 8), zeros)
    True

    ```
    """
    *stack, words, groups = packed.shape
    in_word = 32 // bits
    # A word has the zero points of neighbouring rows: nothing is transposed, which takes ten times as long.
    found = packed.new_empty((*stack, words, in_word, groups), dtype=torch.uint8)
    for row in range(in_word):
        found[..., row, :] = (packed >> (bits * row)) & (2**bits - 1)
    return found.flatten(-3, -2)[..., :rows, :].contiguous()


def packed_zeros(zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Zero points as they are on disk; see `unpacked_zeros`.

    Args:
        zero (`torch.Tensor`): uint8 (..., N, G).
        bits (`int`): 8 or 4.

    Returns:
        `torch.Tensor`: int32 (..., N * bits / 32, G).

    Example: see `unpacked_zeros`.
    """
    in_word = 32 // bits
    missing = -zero.shape[-2] % in_word
    if missing:
        zero = torch.nn.functional.pad(zero, (0, 0, 0, missing))
    rows = zero.unflatten(-2, (-1, in_word)).int().unbind(-2)
    packed = rows[0].clone()
    for number, row in enumerate(rows[1:], 1):
        packed |= row << (bits * number)
    return packed


def disk_tensors(name: str, weight: PackedWeight) -> dict[str, torch.Tensor]:
    """A packed matrix as the tensors that it is on disk.

    Args:
        name (`str`): the name of the weight.
        weight (`PackedWeight`): the matrix, (N, K).

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.kernels.packed.packed_weights import PackedWeight
    >>> from transformers_emo.quantization.packed_parts import disk_tensors
    >>> list(disk_tensors("x.weight", PackedWeight.quantise(torch.ones(8, 32), bits=4)))
    ['x.weight_packed', 'x.weight_scale', 'x.weight_shape']

    ```
    """
    tensors = {"packed": weight.packed, "scale": weight.scale}
    if weight.zero is not None:
        tensors["zero_point"] = packed_zeros(weight.zero, weight.bits)
    tensors["shape"] = torch.tensor(weight.shape)
    return {f"{name}_{part}": tensor for part, tensor in tensors.items()}


def released_state(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of a network as they go to disk: packed ones in their parts, experts one by one.

    Args:
        state (`Mapping[str, torch.Tensor]`): `model.state_dict()`.

    Returns:
        `dict[str, torch.Tensor]`: tensors that are not packed are those given, also stacked experts.

    Example: see `PackedCheckpoint`.
    """
    result: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, PackedTensor):
            result[name] = tensor
        elif match := STACKED_EXPERTS.fullmatch(name):
            for number, one in enumerate(_stacked(tensor.weight)):
                if match["kind"] == "down":
                    result |= disk_tensors(
                        f"{match['experts']}.{number}.down_proj.weight", one.map(torch.clone)
                    )
                    continue
                middle = one.shape[0] // 2
                for part, rows in (("gate", slice(0, middle)), ("up", slice(middle, None))):
                    half = one.map(_rows(rows))
                    result |= disk_tensors(f"{match['experts']}.{number}.{part}_proj.weight", half)
        else:
            result |= disk_tensors(name, tensor.weight)
    return result


def _stacked(weight: PackedWeight) -> Iterator[PackedWeight]:
    for number in range(weight.shape[0]):
        yield weight.map(lambda part, n=number: part[n])


def _rows(rows: slice) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda part: part[rows].clone()
