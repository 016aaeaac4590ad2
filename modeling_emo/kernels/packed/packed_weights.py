"""Weights in 8 or 4 bits, in the layout that `compressed-tensors` calls `pack-quantized`.

What is in memory is what is on disk, so loading reads bytes and repacks nothing. Only zero points differ: on
disk they are packed along the outputs, in memory each is a byte.

Shape suffixes: N outputs, K inputs, G groups of a row. Dimensions before these are those of stacked weights.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

# Steps of the search for a scale: parts of the scale that keeps the largest weight of a group in range.
_STEPS = {8: (1.0,), 4: (1.0, 0.9, 0.8, 0.7)}
# Where each weight counts as much as its input, the best scale may be far smaller.
_FINE_STEPS = {8: (1.0, 0.98, 0.96), 4: tuple(1.0 - 0.04 * step for step in range(13))}
_BLOCK = 1 << 15  # so many weights at a time: they stay in the cache, and PyTorch computes them in one thread


@dataclass(frozen=True)
class PackedWeight:
    """A weight (..., N, K) in few bits: each number is `(number - zero) * scale` of its group.

    Args:
        packed (`torch.Tensor`): int32 (..., N, K * bits / 32). Number k of a row is in word
            `k // (32 // bits)`, from bit `k % (32 // bits) * bits` on. It is stored plus `2 ** (bits - 1)`,
            so that it is not negative.
        scale (`torch.Tensor`): (..., N, K / group), in the dtype of the model.
        zero (`torch.Tensor`, *optional*): uint8 (..., N, K / group), stored as the numbers are. By default it
            is `2 ** (bits - 1)` throughout, which stands for 0.
        bits (`int`): 8 or 4.
        group (`int`): how many weights of a row share a scale; K for one scale a row.

    Raises:
        ValueError: if the parts do not fit each other.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.kernels.packed.packed_weights import PackedWeight
    >>> weight = torch.linspace(-1, 1, 64).view(2, 32)
    >>> packed = PackedWeight.quantise(weight, bits=4, group=32)
    >>> packed.packed.shape, packed.shape
    (torch.Size([2, 4]), torch.Size([2, 32]))
    >>> (packed.dequantise() - weight).abs().max() < 0.1
    tensor(True)

    ```
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bits: int
    group: int

    def __post_init__(self) -> None:
        check_bits(self.bits)
        inputs = self.packed.shape[-1] * (32 // self.bits)
        groups = (*self.packed.shape[:-1], inputs // max(self.group, 1))
        if (
            self.packed.dtype != torch.int32
            or not self.scale.dtype.is_floating_point
            or self.group < 1
            or inputs % self.group
            or tuple(self.scale.shape) != groups
            or (self.zero is not None and (self.zero.dtype, tuple(self.zero.shape)) != (torch.uint8, groups))
        ):
            zero = None if self.zero is None else f"{self.zero.dtype} {tuple(self.zero.shape)}"
            raise ValueError(
                f"The parts of a weight in {self.bits} bits do not fit each other: packed "
                f"{self.packed.dtype} {tuple(self.packed.shape)}, scale {self.scale.dtype} "
                f"{tuple(self.scale.shape)}, zero {zero}, groups of {self.group}. Expected int32, and a "
                f"scale and a uint8 zero of {groups}."
            )

    @classmethod
    def quantise(
        cls,
        weight: torch.Tensor,
        bits: int,
        group: int | None = None,
        symmetric: bool = True,
        *,
        dtype: torch.dtype | None = None,
    ) -> PackedWeight:
        """Quantise a weight: each number to the nearest, with the scale that has the least squared error.

        Args:
            weight (`torch.Tensor`): (..., N, K), floating point.
            bits (`int`): 8 or 4.
            group (`int`, *optional*): how many weights of a row share a scale; by default the whole row.
            symmetric (`bool`, defaults to `True`): without zero points.
            dtype (`torch.dtype`, *optional*): of the scales; by default that of the weight.

        Raises:
            ValueError: if the weight is not floating point, holds NaN or infinity, or K does not fit bits and
                group.
        """
        check_bits(bits)
        if not weight.is_floating_point() or weight.dim() < 2:
            raise ValueError(
                f"Expected a floating point weight (..., outputs, inputs), got {weight.dtype} "
                f"{tuple(weight.shape)}."
            )
        inputs = weight.shape[-1]
        group = group or inputs
        if inputs % group or group % (32 // bits):
            raise ValueError(
                f"A weight with {inputs} inputs cannot be kept in {bits} bits in groups of {group}: the "
                f"group must divide the inputs, and {32 // bits} the group. Give another group size."
            )
        shape = weight.shape
        rows_NGg = weight.detach().reshape(-1, inputs // group, group)
        scale_NG = weight.new_empty(rows_NGg.shape[:2], dtype=dtype)
        zero_NG = (
            None if symmetric else torch.empty(rows_NGg.shape[:2], dtype=torch.uint8, device=weight.device)
        )
        packed = torch.empty(len(rows_NGg), inputs * bits // 32, dtype=torch.int32, device=weight.device)
        step = max(_BLOCK // max(inputs, 1), 1)
        for start in range(0, len(rows_NGg), step):
            block = slice(start, start + step)
            best = RoundedGroups.nearest_of(rows_NGg[block].float(), bits, symmetric, scale_NG.dtype)
            scale_NG[block] = best.scale
            if zero_NG is not None:
                zero_NG[block] = best.zero.to(torch.uint8)
            packed[block] = pack(best.number.to(torch.uint8).flatten(1), bits)
        parts = (*shape[:-1], inputs // group)
        zero = None if zero_NG is None else zero_NG.view(parts)
        return cls(packed.view(*shape[:-1], -1), scale_NG.view(parts), zero, bits, group)

    @property
    def shape(self) -> torch.Size:
        """`torch.Size`: (..., N, K)."""
        return torch.Size((*self.packed.shape[:-1], self.packed.shape[-1] * (32 // self.bits)))

    @property
    def dtype(self) -> torch.dtype:
        """`torch.dtype`: that of the model."""
        return self.scale.dtype

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """`dict[str, torch.Tensor]`: the parts that are tensors, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)[:3]}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def map(self, change: Any) -> PackedWeight:
        """The same with each of its tensors changed.

        Args:
            change (`Callable[[torch.Tensor], torch.Tensor]`): what to do with each.
        """
        return replace(self, **{name: change(tensor) for name, tensor in self.tensors.items()})

    def dequantise(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight as numbers, each rounded once to the dtype.

        Args:
            dtype (`torch.dtype`, *optional*): by default that of the scale.

        Returns:
            `torch.Tensor`: (..., N, K).
        """
        number = unpack(self.packed, self.bits).unflatten(-1, (-1, self.group))
        middle = 2 ** (self.bits - 1)
        zero = middle if self.zero is None else self.zero[..., None].float()
        exact = torch.float64 if self.dtype == torch.float64 else torch.float32
        value = (number.to(exact) - zero) * self.scale[..., None].to(exact)
        return value.flatten(-2).to(dtype or self.dtype)


@dataclass
class RoundedGroups:
    """Groups of weights (..., g) as numbers, with their scales and zeros (...), all as floats.

    Args:
        number (`torch.Tensor`): (..., g), from 0 to `2 ** bits - 1`.
        scale, zero (`torch.Tensor`): (...); the scales are numbers of the dtype that they will have.
        error (`torch.Tensor`): (...), the squared error.

    Example: see `RoundedGroups.nearest_of`.
    """

    number: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    error: torch.Tensor

    @classmethod
    def nearest_of(
        cls,
        groups: torch.Tensor,
        bits: int,
        symmetric: bool,
        dtype: torch.dtype,
        *,
        importance: torch.Tensor | None = None,
    ) -> RoundedGroups:
        """The nearest numbers, with the scale and the zero that are found to have the least squared error.

        Args:
            groups (`torch.Tensor`): (..., g) float32.
            bits (`int`): 8 or 4.
            symmetric (`bool`): without zero points.
            dtype (`torch.dtype`): of the scales.
            importance (`torch.Tensor`, *optional*): how much the squared error of each weight counts, of a
                shape like `groups`; all the same by default.

        Raises:
            ValueError: if the weights are not finite.

        Example:

        ```python
        >>> import torch
        >>> from transformers_emo.modeling_emo.kernels.packed.packed_weights import RoundedGroups
        >>> found = RoundedGroups.nearest_of(torch.arange(16.0), 4, False, torch.float32)
        >>> found.scale, found.zero + 0
        (tensor(1.), tensor(0.))

        ```
        """
        most = 2**bits - 1
        low, high = groups.aminmax(dim=-1)
        if not (low.isfinite().all() and high.isfinite().all()):
            raise ValueError(
                "The weights hold NaN or infinity: get the model again, or leave out what is damaged."
            )
        best: RoundedGroups | None = None
        # A group's range has 0 in it, as a zero point of few bits cannot be outside.
        low, high = low.clamp(max=0), high.clamp(min=0)
        widest = torch.maximum(high, -low) / (most / 2) if symmetric else (high - low) / most
        middle = torch.full_like(widest, 2.0 ** (bits - 1))
        for part in (_STEPS if importance is None else _FINE_STEPS)[bits]:
            scale = _usable(widest * part, dtype)
            exact = -low * part / scale
            if symmetric:
                zeros = [middle]
            elif importance is None:
                zeros = [exact.round().clamp(0, most)]
            else:
                zeros = [exact.floor().clamp(0, most), exact.ceil().clamp(0, most)]
            for zero in zeros:
                found = cls._nearest(groups, scale, zero, most, importance)
                centred = found.number - zero[..., None]
                counted = centred if importance is None else centred * importance
                # For these numbers the scale with the least squared error; for it the nearest numbers.
                squares = (centred * counted).sum(-1)
                fitted = (groups * counted).sum(-1) / squares.where(squares > 0, 1.0)
                refined = cls._nearest(groups, _usable(fitted, dtype), zero, most, importance)
                for each in (found, refined):
                    best = each if best is None else best._or(each)
        assert best is not None
        return best

    @classmethod
    def _nearest(
        cls,
        groups: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        most: int,
        importance: torch.Tensor | None,
    ) -> RoundedGroups:
        number = (groups / scale[..., None] + zero[..., None]).round_().clamp_(0, most)
        error = (number - zero[..., None]).mul_(scale[..., None]).sub_(groups).square_()
        if importance is not None:
            error *= importance
        return cls(number, scale, zero, error.sum(-1))

    def _or(self, other: RoundedGroups) -> RoundedGroups:
        """Of each group the nearer of the two."""
        better = other.error < self.error
        return RoundedGroups(
            torch.where(better[..., None], other.number, self.number),
            torch.where(better, other.scale, self.scale),
            torch.where(better, other.zero, self.zero),
            torch.where(better, other.error, self.error),
        )


def _usable(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A scale as the dtype holds it. Where it would be 0 or less all weights are 0, and any scale does."""
    scale = scale.to(dtype).float()
    return torch.where(scale > 0, scale, 1.0)


def check_bits(bits: Any) -> None:
    """Check that weights can be kept in so many bits.

    Args:
        bits (`int`): 8 or 4.

    Raises:
        ValueError: if not.

    Example:

    ```python
    >>> from transformers_emo.modeling_emo.kernels.packed.packed_weights import check_bits
    >>> check_bits(4)

    ```
    """
    if bits not in (8, 4) or isinstance(bits, bool):
        raise ValueError(f"bits is {bits!r}, expected 8 or 4: give one of them.")


def pack(number: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers into words of 32 bits, along the last dimension.

    Args:
        number (`torch.Tensor`): uint8 (..., K), each below `2 ** bits`; K a multiple of `32 / bits`.
        bits (`int`): 8 or 4.

    Returns:
        `torch.Tensor`: int32 (..., K * bits / 32).

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.kernels.packed.packed_weights import pack
    >>> hex(pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.uint8), 4).item())
    '0x7654321'

    ```
    """
    if bits == 4:
        low, high = number.unflatten(-1, (-1, 2)).unbind(-1)
        number = low | (high << 4)
    # Flat first: PyTorch calls a single column contiguous, whatever its stride, and cannot view it.
    return number.reshape(-1).view(torch.int32).view(*number.shape[:-1], -1)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The numbers that `pack` put into words.

    Args:
        packed (`torch.Tensor`): int32 (..., K * bits / 32).
        bits (`int`): 8 or 4.

    Returns:
        `torch.Tensor`: uint8 (..., K).

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.kernels.packed.packed_weights import unpack
    >>> unpack(torch.tensor([0x07654321], dtype=torch.int32), 4)
    tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.uint8)

    ```
    """
    number = packed.contiguous().view(torch.uint8)
    if bits == 4:
        number = torch.stack([number & 15, number >> 4], dim=-1).flatten(-2)
    return number
