"""Packed weights in files: a tensor for the numbers of a matrix, one for its scales and so on.

`x.weight` is kept as `x.weight_packed`, `x.weight_scale`, `x.weight_shape` and, with zero points,
`x.weight_zero_point`. Experts have matrices of their own, as in a model that is not quantised.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.errors import CheckpointError
from ..checkpoints.lazy_tensor import LazyTensor
from ..checkpoints.safetensors_header import TensorSpan
from ..modeling_emo.kernels.packed.packed_tensor import PackedTensor
from ..modeling_emo.kernels.packed.packed_weights import PackedWeight
from .packed_config import PackedConfig
from .packed_parts import disk_tensors, unpacked_zeros

_READ = 32 << 20  # so many bytes of a weight at a time are in memory as they are on disk
_PARTS = ("packed", "scale", "zero_point", "shape")
_UNREADABLE = ("_g_idx", "_global_scale", ".input_scale", ".input_zero_point", "_scale_inv")


def plain_name(name: str) -> str:
    """The name that a tensor's weight has where it is not packed.

    Args:
        name (`str`): the name of a tensor on disk.

    Example:

    ```python
    >>> from transformers_emo.quantization.packed_files import plain_name
    >>> plain_name("lm_head.weight_packed"), plain_name("lm_head.weight")
    ('lm_head.weight', 'lm_head.weight')

    ```
    """
    for part in _PARTS:
        if name.endswith(f".weight_{part}"):
            return name.removesuffix(f"_{part}")
    return name


class PackedCheckpoint(Checkpoint):
    """A checkpoint with packed weights, which shows each as one tensor of the shape that it stands for.

    Args:
        checkpoint (`Checkpoint`): the tensors as they lie in files.
        packing (`PackedConfig`): how they are packed.

    Raises:
        CheckpointError: if a part of a weight is missing or does not fit the others.

    Example:

    ```python
    >>> from transformers_emo import EmoForCausalLM, PackedConfig
    >>> from transformers_emo.checkpoints import Checkpoint
    >>> from transformers_emo.quantization.packed_files import PackedCheckpoint
    >>> config = PackedConfig(bits=4)
    >>> model = EmoForCausalLM.from_pretrained("model_cards/toy-emo", quantization_config=config)
    >>> model.save_pretrained(tmp_path)
    >>> checkpoint = PackedCheckpoint(Checkpoint.from_folder(tmp_path), config)
    >>> checkpoint.lazy(["model.layers.0.self_attn.q_proj.weight"])[...]
    PackedTensor(shape=(128, 128), dtype=torch.float32, bits=4, group=32, with zero points)

    ```
    """

    def __init__(self, checkpoint: Checkpoint, packing: PackedConfig):
        self.files = checkpoint
        self.packing = packing
        self._packed: dict[str, dict[str, TensorSpan]] = {}
        tensors: dict[str, TensorSpan] = {}
        for name, span in checkpoint.tensors.items():
            if name.endswith(_UNREADABLE):
                raise CheckpointError(
                    f"The quantised weights cannot be read: they have {name}, which weights without order of "
                    "activations and without quantised activations have not. Give the unquantised model."
                )
            plain = plain_name(name)
            if plain == name:
                tensors[name] = span
            else:
                self._packed.setdefault(plain, {})[name.removeprefix(f"{plain}_")] = span
        for name, parts in self._packed.items():
            if name in tensors:
                raise CheckpointError(
                    f"{name} is there packed and as it is: expected one. Download the model again."
                )
            tensors[name] = self._logical(name, parts)
        super().__init__(checkpoint.source, tensors, frozenset(map(plain_name, checkpoint.elsewhere)))

    def _logical(self, name: str, parts: dict[str, TensorSpan]) -> TensorSpan:
        """The weight as it would lie in a file. Its bytes are those of the packed numbers."""
        packing = self.packing.of(name)
        bits, symmetric = packing.bits, packing.symmetric
        wanted = {"packed", "scale"} | (set() if symmetric else {"zero_point"})
        lacking = sorted(wanted - parts.keys())
        if lacking or ("zero_point" in parts and symmetric):
            what = f"{name}_{lacking[0]} is missing" if lacking else f"{name}_zero_point is there"
            raise CheckpointError(
                f"The weights and the `quantization_config` of config.json differ: {what}. Download both "
                "again."
            )
        packed, scale = parts["packed"], parts["scale"]
        is_matrix = packed.dtype == torch.int32 and len(packed.shape) == 2 and scale.dtype.is_floating_point
        if is_matrix:
            rows, inputs = packed.shape[0], packed.shape[1] * 32 // bits
            group = inputs if self.packing.group_size == -1 else self.packing.group_size
            is_matrix = inputs % group == 0 and scale.shape == (rows, inputs // group)
            if is_matrix and not symmetric:
                zero = (-(-rows * bits // 32), inputs // group)
                is_matrix = parts["zero_point"].dtype == torch.int32 and parts["zero_point"].shape == zero
        if not is_matrix:
            shapes = {part: (str(span.dtype), list(span.shape)) for part, span in parts.items()}
            raise CheckpointError(
                f"{name} is not in {bits} bits with groups of {self.packing.group_size}, as the "
                f"`quantization_config` of config.json says: its parts are {shapes}. Download both again."
            )
        return replace(packed, dtype=scale.dtype, shape=(rows, inputs))

    def lazy(self, names: Sequence[str], *, shape: Sequence[int] | None = None) -> Any:
        """Some tensors one after the other, as one that is yet to be read; see `Checkpoint.lazy`.

        Args:
            names (`Sequence[str]`): their names.
            shape (`Sequence[int]`, *optional*): the shape of the whole.
        """
        packed = [name in self._packed for name in names]
        if not any(packed):
            return super().lazy(names, shape=shape)
        if not all(packed):
            raise CheckpointError(
                f"{names[packed.index(False)]} is not quantised, and {names[packed.index(True)]} is: the "
                "experts of a layer must be kept alike. Give the unquantised model."
            )
        shape = tuple(shape or self.tensors[names[0]].shape)
        parts: dict[str, LazyTensor] = {}
        for part in self._packed[names[0]]:
            spans: Any = [self._packed[name].get(part) for name in names]
            if None in spans:
                raise CheckpointError(
                    f"{names[spans.index(None)]}_{part} is missing: download the model again."
                )
            parts[part] = self.files.from_pieces(spans, _part_shape(shape, len(names), spans[0]))
        return LazyPacked(parts, shape, self.packing.of(names[0]))


def _part_shape(shape: tuple[int, ...], count: int, first: TensorSpan) -> tuple[int, ...]:
    """The shape of a part of stacked weights `shape` that consist of `count` matrices."""
    if len(shape) == 2:
        return first.shape
    halves = count // shape[0]
    return (shape[0], halves * first.shape[0], *first.shape[1:])


class LazyPacked:
    """A packed weight, or a stack of them, that is read when it is indexed; otherwise as a `LazyTensor`.

    Args:
        parts (`Mapping[str, LazyTensor]`): by the last word of their names on disk.
        shape (`Sequence[int]`): (..., N, K).
        packing (`PackedConfig`): how it is packed.

    Example: see `PackedCheckpoint`.
    """

    def __init__(self, parts: Mapping[str, LazyTensor], shape: Sequence[int], packing: PackedConfig):
        self.parts = dict(parts)
        self.shape = tuple(shape)
        self.packing = packing
        self.source = self.parts["packed"].source
        self.dtype = self.parts["scale"].dtype

    @property
    def pieces(self) -> list[TensorSpan]:
        """`list[TensorSpan]`: where the bytes lie that are read; the shape is known without."""
        return [piece for name, part in self.parts.items() if name != "shape" for piece in part.pieces]

    @property
    def cast_to(self) -> torch.dtype | None:
        """`torch.dtype`, *optional*: of the scales, once they are read."""
        return self.parts["scale"].cast_to

    @cast_to.setter
    def cast_to(self, dtype: torch.dtype | None) -> None:
        self.parts["scale"].cast_to = dtype

    @property
    def mapped(self) -> bool:
        """`bool`: as of a `LazyTensor`."""
        return self.parts["packed"].mapped

    @mapped.setter
    def mapped(self, value: bool) -> None:
        self.parts["packed"].mapped = value

    @property
    def device(self) -> torch.device | None:
        """`torch.device`, *optional*: as of a `LazyTensor`."""
        return self.parts["packed"].device

    @device.setter
    def device(self, value: torch.device | None) -> None:
        for part in self.parts.values():
            part.device = value

    def get_shape(self) -> list[int]:
        """`list[int]`: the shape."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """`str`: the dtype of the scales on disk."""
        return self.parts["scale"].get_dtype()

    def __getitem__(self, index: Any) -> torch.Tensor:
        if index is not ...:
            raise ValueError(f"A packed weight is read whole: expected [...], got [{index!r}].")
        return PackedTensor(self.weight()).as_parameter()

    def weight(self) -> PackedWeight:
        """`PackedWeight`: what it is, read now."""
        bits, group = self.packing.bits, self.packing.group_of(self.shape[-1])
        zero = self.parts.get("zero_point")
        rows = self.shape[-2]
        return PackedWeight(
            self.parts["packed"][...],
            self.parts["scale"][...],
            None if zero is None else unpacked_zeros(zero[...], bits, rows),
            bits,
            group,
        )

    def cut(self, number: int, halves: int = 1) -> LazyPacked:
        """One of the matrices of a stack; see `LazyTensor.cut`.

        Args:
            number (`int`): which.
            halves (`int`, defaults to 1): into how many each entry of the stack is cut.
        """
        shape = (self.shape[-2] // halves, self.shape[-1])
        return LazyPacked(
            {name: part.cut(number, halves) for name, part in self.parts.items()}, shape, self.packing
        )

    def on_disk(self, name: str) -> Iterator[tuple[str, LazyTensor]]:
        """The tensors of a matrix as they lie on disk.

        Args:
            name (`str`): the name of the weight.
        """
        for part, tensor in self.parts.items():
            if part == "shape":
                tensor = LazyTensor(tensor.source, tensor.pieces, tensor.dtype, (2,))
            yield f"{name}_{part}", tensor


class QuantisedWhileRead:
    """A weight on disk that is quantised while it is read, some rows at a time; otherwise as a `LazyTensor`.

    Args:
        tensor (`LazyTensor`): the weight, (N, K), or (E, N, K) for stacked ones.
        packing (`PackedConfig`): how to pack it.
        name (`str`): its name, for messages.

    Example: see `PackedConfig`.
    """

    def __init__(self, tensor: LazyTensor, packing: PackedConfig, name: str):
        self.tensor = tensor
        self.packing = packing.of(name)
        self.name = name
        self.shape = tensor.shape
        self.source = tensor.source
        self.pieces = tensor.pieces
        self.cast_to: torch.dtype | None = None
        self.mapped = False

    @property
    def dtype(self) -> torch.dtype:
        """`torch.dtype`: on disk."""
        return self.tensor.dtype

    @property
    def device(self) -> torch.device | None:
        """`torch.device`, *optional*: as of a `LazyTensor`."""
        return self.tensor.device

    @device.setter
    def device(self, value: torch.device | None) -> None:
        self.tensor.device = value

    def get_shape(self) -> list[int]:
        """`list[int]`: the shape."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """`str`: the dtype on disk."""
        return self.tensor.get_dtype()

    def __getitem__(self, index: Any) -> torch.Tensor:
        return PackedTensor(self.weight()).as_parameter()

    def cut(self, number: int, halves: int = 1) -> QuantisedWhileRead:
        """One of the matrices of a stack; see `LazyTensor.cut`.

        Args:
            number (`int`): which.
            halves (`int`, defaults to 1): into how many each entry of the stack is cut.
        """
        part = QuantisedWhileRead(self.tensor.cut(number, halves), self.packing, self.name)
        part.cast_to = self.cast_to
        return part

    def on_disk(self, name: str) -> Iterator[tuple[str, QuantisedPart]]:
        """The tensors that a matrix will be on disk.

        Args:
            name (`str`): the name of the weight.
        """
        (rows, inputs), bits = self.shape, self.packing.bits
        groups = inputs // self.packing.group_of(inputs)
        layouts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        layouts["packed"] = torch.int32, (rows, inputs * bits // 32)
        layouts["scale"] = (self.cast_to or self.dtype, (rows, groups))
        if not self.packing.symmetric:
            layouts["zero_point"] = (torch.int32, (-(-rows * bits // 32), groups))
        layouts["shape"] = (torch.int64, (2,))
        ready: dict[str, torch.Tensor] = {}
        for part, (dtype, shape) in layouts.items():
            yield f"{name}_{part}", QuantisedPart(self, name, f"{name}_{part}", ready, dtype, shape)

    def weight(self) -> PackedWeight:
        """`PackedWeight`: what it is, read and quantised now."""
        dtype = self.cast_to or self.dtype
        group = self.packing.group_of(self.shape[-1])
        row_bytes = max(math.prod(self.shape[1:]) * self.dtype.itemsize, 1)
        step = max(_READ // row_bytes, 1)
        stack: dict[str, torch.Tensor] = {}
        for start in range(0, self.shape[0], step):
            rows = slice(start, start + step)
            for name, part in self._quantised(self.tensor[rows], group, dtype).tensors.items():
                if name not in stack:
                    stack[name] = part.new_empty(self.shape[0], *part.shape[1:])
                stack[name][rows] = part
        return PackedWeight(stack["packed"], stack["scale"], stack.get("zero"), self.packing.bits, group)

    def _quantised(self, matrix: torch.Tensor, group: int, dtype: torch.dtype) -> PackedWeight:
        try:
            return PackedWeight.quantise(
                matrix, self.packing.bits, group, self.packing.symmetric, dtype=dtype
            )
        except ValueError as error:
            raise CheckpointError(f"{self.name} cannot be quantised. {error}") from error


@dataclass
class QuantisedPart:
    """One of the tensors that a matrix becomes on disk, quantised when the first of them is read.

    Args:
        owner (`QuantisedWhileRead`): the matrix.
        weight (`str`): its name.
        name (`str`): the name of this part.
        ready (`dict[str, torch.Tensor]`): the parts that wait to be read, shared by all of the matrix.
        dtype (`torch.dtype`): the dtype on disk.
        shape (`tuple[int, ...]`): the shape on disk.

    Example: see `extract_subset`.
    """

    owner: QuantisedWhileRead
    weight: str
    name: str
    ready: dict[str, torch.Tensor]
    dtype: torch.dtype
    shape: tuple[int, ...]
    cast_to: None = None

    @property
    def pieces(self) -> list[TensorSpan]:
        """`list[TensorSpan]`: where the bytes of the matrix lie."""
        return self.owner.pieces

    def read(self) -> torch.Tensor:
        """`torch.Tensor`: the part."""
        if self.name not in self.ready:
            self.ready |= disk_tensors(self.weight, self.owner.weight())
        return self.ready.pop(self.name)


def first_numbers(tensor: Any, count: int) -> torch.Tensor | None:
    """The first numbers of a packed weight, in the order of an unpacked one.

    Args:
        tensor: a weight, in memory or yet to be read.
        count (`int`): how many, or as many as there are.

    Returns:
        `torch.Tensor`, *optional*: (count,) float; `None` if it is no packed weight.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.quantization.packed_files import first_numbers
    >>> first_numbers(torch.ones(3), 2)

    ```
    """
    if not isinstance(tensor, LazyPacked | PackedTensor) or len(tensor.shape) != 2:
        return None
    weight = tensor.weight() if isinstance(tensor, LazyPacked) else tensor.weight
    rows = -(-count // weight.shape[1])
    return weight.map(lambda part: part[:rows]).dequantise(torch.float32).flatten()[:count].cpu()
