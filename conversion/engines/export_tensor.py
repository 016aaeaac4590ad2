"""A tensor of an exported model: where its bytes come from, and how they are changed on the way."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from ...checkpoints import CheckpointError
from ...checkpoints.lazy_tensor import LazyTensor
from ...checkpoints.local_files import LocalFiles
from ...checkpoints.writing.long_files import FilePart, FileSpan, Piece

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
"""The types of numbers that are not quantised, by the names that GGUF gives them."""
# Stays in the processor's caches, and holds whole numbers of every dtype and whole blocks of quantised ones.
_BUFFER_BYTES = 1 << 22


@dataclass(frozen=True)
class ExportTensor:
    """A tensor to be written: parts of the model one after the other, and zeros up to its shape.

    Args:
        name (`str`): its name in the export.
        shape (`tuple[int, ...]`): its shape there.
        parts (`tuple[LazyTensor, ...]`): tensors of the model that it begins with.
        factor (`float`, defaults to 1.0): every number is multiplied by it: a power of two, so that nothing
            is rounded.
        values (`tuple[float, ...]`, *optional*): the numbers behind the parts. Those after them are zeros.
        role (`str`, defaults to `"weight"`): `"router"` or `"vector"` for what engines keep in float32.

    Example:

    ```python
    >>> from transformers_emo.conversion.engines.export_tensor import ExportTensor
    >>> gate = ExportTensor("gate.weight", (1, 4), values=(2.0**-100,))
    >>> gate.read(torch.float32)
    tensor([[7.8886e-31, 0.0000e+00, 0.0000e+00, 0.0000e+00]])

    ```
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[LazyTensor, ...] = ()
    factor: float = 1.0
    values: tuple[float, ...] = ()
    role: str = "weight"

    stored: torch.dtype = torch.float32

    @property
    def dtype(self) -> torch.dtype:
        """`torch.dtype`: the dtype of its numbers before they are written."""
        return self.parts[0].dtype if self.parts else self.stored

    @property
    def numel(self) -> int:
        """`int`: how many numbers it holds."""
        return math.prod(self.shape)

    def renamed(self, name: str) -> ExportTensor:
        """The same tensor by another name."""
        return replace(self, name=name)

    def chunks(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The numbers one after the other, a few million at a time.

        Args:
            dtype (`torch.dtype`): the dtype to have them in.

        Yields:
            `torch.Tensor`: (N,), of `dtype`. N is a multiple of 256, but for the last one. Two buffers take
            turns: a tensor is overwritten when the next but one is asked for.

        Raises:
            CheckpointError: if a number is too large for `dtype`.
        """
        buffers = [torch.empty(_BUFFER_BYTES if self.parts else 0, dtype=torch.uint8) for _ in range(2)]
        for number, (length, stored) in enumerate(self._filled(buffers)):
            numbers = buffers[number % 2][:length].view(stored)
            if self.factor == 1.0 and stored == dtype:
                yield numbers
                continue
            changed = (numbers * self.factor).to(dtype) if self.factor != 1.0 else numbers.to(dtype)
            is_narrower = torch.finfo(dtype).max < torch.finfo(stored).max
            if (is_narrower or self.factor > 1) and changed.isinf().any() and not numbers.isinf().any():
                raise CheckpointError(
                    f"{self.name} holds numbers that are too large for {dtype}: export it as bfloat16 or "
                    "float32."
                )
            yield changed
        yield from self._without_parts(dtype)

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole tensor.

        Args:
            dtype (`torch.dtype`): the dtype to have it in.
        """
        whole = torch.empty(self.numel, dtype=dtype)
        position = 0
        for chunk in self.chunks(dtype):
            whole[position : position + len(chunk)] = chunk
            position += len(chunk)
        return whole.view(self.shape)

    def _without_parts(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """What stands behind the parts: `values`, and then zeros."""
        left = self.numel - sum(math.prod(part.shape) for part in self.parts)
        step = _BUFFER_BYTES // dtype.itemsize  # not all at once: an expert of zeros can be large
        for start in range(0, left, step):
            numbers = torch.zeros(min(step, left - start), dtype=dtype)
            values = self.values[start : start + step]
            numbers[: len(values)] = torch.tensor(values, dtype=torch.float64)
            yield numbers

    def _filled(self, buffers: Sequence[torch.Tensor]) -> Iterator[tuple[int, torch.dtype]]:
        """Fill buffers in turn with the bytes of the parts; the lengths and the dtype of what is in them."""
        turn, used, stored = 0, 0, self.dtype
        view = buffers[0].numpy().data
        for part in self.parts:
            if part.dtype != stored:
                raise CheckpointError(
                    f"{self.name} would be made of tensors of {stored} and {part.dtype}: name one dtype to "
                    "export them as."
                )
            for piece in part.pieces:
                start = piece.start
                while start < piece.end:
                    length = min(_BUFFER_BYTES - used, piece.end - start)
                    part.source.read_into(piece.file, start, view[used : used + length])
                    start, used = start + length, used + length
                    if used == _BUFFER_BYTES:
                        yield used, stored
                        turn, used = 1 - turn, 0
                        view = buffers[turn].numpy().data
        if used:
            yield used, stored


def tensor_bytes(tensor: ExportTensor, dtype: torch.dtype) -> Iterator[Piece]:
    """The bytes of a tensor, piece by piece. Those that stay as they are come as spans of files.

    Args:
        tensor (`ExportTensor`): the tensor.
        dtype (`torch.dtype`): the dtype to write.

    Example:

    ```python
    >>> from transformers_emo.conversion.engines.export_tensor import ExportTensor, tensor_bytes
    >>> [len(piece) for piece in tensor_bytes(ExportTensor("bias", (3,)), torch.float32)]
    [12]

    ```
    """
    rest = tensor
    if tensor.factor == 1.0 and all(part.dtype == dtype and _is_local(part) for part in tensor.parts):
        yield from tensor_reads(tensor)
        rest = replace(
            tensor, parts=(), shape=(tensor.numel - sum(math.prod(p.shape) for p in tensor.parts),)
        )
    for chunk in rest.chunks(dtype):
        yield chunk.view(torch.uint8).numpy().data


def tensor_reads(tensor: ExportTensor) -> Iterator[FileSpan]:
    """What is read of files on the disk to write a tensor.

    Args:
        tensor (`ExportTensor`): the tensor.

    Example: see `tensor_part`.
    """
    for part in tensor.parts:
        if isinstance(part.source, LocalFiles):
            for piece in part.pieces:
                name = os.fspath(part.source.folder / piece.file)
                opened = partial(part.source.opened, piece.file)
                yield FileSpan(opened, name, piece.start, piece.end - piece.start)


def tensor_part(tensor: ExportTensor, dtype: torch.dtype) -> FilePart:
    """A tensor as a part of a file.

    Args:
        tensor (`ExportTensor`): the tensor.
        dtype (`torch.dtype`): the dtype to write.

    Example:

    ```python
    >>> from transformers_emo.conversion.engines.export_tensor import ExportTensor, tensor_part
    >>> part = tensor_part(ExportTensor("bias", (3,)), torch.float32)
    >>> part.length, list(part.reads())
    (12, [])

    ```
    """
    length = tensor.numel * dtype.itemsize
    return FilePart(length, partial(tensor_bytes, tensor, dtype), partial(tensor_reads, tensor))


def _is_local(part: LazyTensor) -> bool:
    return isinstance(part.source, LocalFiles)
