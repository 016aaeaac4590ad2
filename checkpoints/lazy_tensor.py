"""A tensor whose bytes are read when it is indexed."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, product
from types import EllipsisType

import torch

from .byte_ranges import merge_ranges
from .local_files import LocalFiles
from .memory.large_pages import empty
from .memory.mapped_files import map_spans
from .safetensors_header import DTYPE_NAMES, Source, TensorSpan

_STAGED = 64 << 20  # on their way to a device, so many bytes at a time are in the host's memory


class LazyTensor:
    """A tensor that is read when it is indexed. Transformers' loader can take it in place of a tensor.

    Its bytes are those of its pieces, one after the other, which may lie in several files. Indexing with
    slices, one for each dimension, reads only what they hold: so each of several processes reads its share.

    Args:
        source (`Source`): gives the bytes.
        pieces (`Sequence[TensorSpan]`): the parts in their order, all of one dtype. Only their file and range
            are used.
        dtype (`torch.dtype`): the dtype on disk.
        shape (`Sequence[int]`): the shape of the whole.
        cast_to (`torch.dtype`, *optional*): convert to this dtype, piece by piece while reading, so that
            memory never holds the whole tensor in both dtypes.

    Attributes:
        mapped (`bool`): set it to get tensors that are pages of their files, if that is possible (see
            `mapped_files`). A program that overwrites such a file in place then changes the tensor.
        device (`torch.device`, *optional*): set it to get tensors on this device. They are filled part by
            part, so that the host's memory never holds them whole.

    Example:

    ```python
    >>> from transformers_emo.checkpoints import Checkpoint
    >>> checkpoint = Checkpoint.from_folder("model_cards/toy-emo")
    >>> checkpoint.lazy(["model.norm.weight"])[...].shape
    torch.Size([128])

    ```
    """

    def __init__(
        self,
        source: Source,
        pieces: Sequence[TensorSpan],
        dtype: torch.dtype,
        shape: Sequence[int],
        cast_to: torch.dtype | None = None,
    ):
        self.source = source
        self.pieces = list(pieces)
        self.dtype = dtype
        self.shape = tuple(shape)
        self.cast_to = cast_to
        self.mapped = False
        self.device: torch.device | None = None

    def get_shape(self) -> list[int]:
        """`list[int]`: the shape, as safetensors' slices give it."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """`str`: the dtype on disk by its name in safetensors, such as `"BF16"`."""
        return DTYPE_NAMES[self.dtype]

    def __getitem__(self, index: EllipsisType | slice | tuple) -> torch.Tensor:
        parts = index if isinstance(index, tuple) else (index,)
        if parts and isinstance(parts[0], slice) and parts[0].step in (None, 1) and self.shape:
            start, stop, _ = parts[0].indices(self.shape[0])
            stop = max(start, stop)
            block = self._inner_block(parts)
            if block is not None:
                return self._read_block([(start, stop), *block])
            return self._read_rows(start, stop)[(slice(None), *parts[1:])]
        return self._read_rows(0, self.shape[0] if self.shape else 1)[index]

    def _inner_block(self, parts: tuple) -> list[tuple[int, int]] | None:
        """What an index takes of the dimensions behind the first; `None` if that is all, or no block."""
        if len(parts) > len(self.shape) or not all(
            isinstance(part, slice) and part.step in (None, 1) for part in parts
        ):
            return None
        bounds = [part.indices(size)[:2] for part, size in zip(parts[1:], self.shape[1:], strict=False)]
        bounds += [(0, size) for size in self.shape[len(parts) :]]
        bounds = [(start, max(start, stop)) for start, stop in bounds]
        return None if bounds == [(0, size) for size in self.shape[1:]] else bounds

    def take(self, rows: Sequence[int]) -> LazyTensor:
        """Some rows of the first dimension as a lazy tensor of their own.

        Rows that follow each other in a file are read together.

        Args:
            rows (`Sequence[int]`): row numbers.

        Example:

        ```python
        >>> from transformers_emo.checkpoints import Checkpoint
        >>> checkpoint = Checkpoint.from_folder("model_cards/toy-emo")
        >>> checkpoint.lazy(["model.embed_tokens.weight"]).take([7, 8, 300])[...].shape
        torch.Size([3, 128])

        ```
        """
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        offsets = self._offsets
        parts: list[TensorSpan] = []
        for row in rows:
            begin, end = row * row_bytes, (row + 1) * row_bytes
            number = bisect_right(offsets, begin) - 1
            while begin < end:
                piece, stop = self.pieces[number], min(end, offsets[number + 1])
                first, last = piece.start + begin - offsets[number], piece.start + stop - offsets[number]
                if parts and parts[-1].file == piece.file and parts[-1].end == first:
                    first = parts.pop().start
                parts.append(TensorSpan(piece.file, first, last, self.dtype, ()))
                begin, number = stop, number + 1
        return LazyTensor(self.source, parts, self.dtype, (len(rows), *self.shape[1:]), self.cast_to)

    def cut(self, number: int, halves: int = 1) -> LazyTensor:
        """One of the equal parts along the first dimension, as a lazy tensor of its own.

        Args:
            number (`int`): which part.
            halves (`int`, defaults to 1): into how many parts each entry of the first dimension is cut.

        Example:

        ```python
        >>> from transformers_emo.checkpoints import Checkpoint
        >>> checkpoint = Checkpoint.from_folder("model_cards/toy-emo")
        >>> checkpoint.lazy(["model.embed_tokens.weight"]).cut(7).shape
        (128,)

        ```
        """
        count, *shape = self.shape
        if halves > 1:
            shape[0] //= halves
        flat = LazyTensor(self.source, self.pieces, self.dtype, (count * halves, *shape))
        return LazyTensor(self.source, flat.take([number]).pieces, self.dtype, shape)

    def _read_rows(self, start: int, stop: int) -> torch.Tensor:
        """Read rows `start` to `stop` of the first dimension. A scalar has one row."""
        row_shape = self.shape[1:]
        row_numel = math.prod(row_shape)
        row_bytes = row_numel * self.dtype.itemsize
        spans = list(self._spans(start * row_bytes, stop * row_bytes))
        rows = None if self.device is None else self._read_to_device(spans, (stop - start) * row_numel)
        if (
            rows is None
            and self.mapped
            and spans
            and self.cast_to in (None, self.dtype)
            and isinstance(self.source, LocalFiles)
            and self.source.can_map
        ):
            rows = map_spans(self.source, spans)
        if rows is None:
            rows = empty((stop - start) * row_numel, self.cast_to or self.dtype)
            begin = 0
            for span in spans:
                end = begin + (span.end - span.start) // self.dtype.itemsize
                self._fill(rows[begin:end], span.file, span.start)
                begin = end
        return rows.reshape(stop - start, *row_shape) if self.shape else rows.reshape(())

    def _read_block(self, bounds: list[tuple[int, int]]) -> torch.Tensor:
        """Read a part of every dimension, one slice of the first dimension after the other."""
        shape = [stop - start for start, stop in bounds]
        block = empty(math.prod(shape), self.cast_to or self.dtype) if self.device is None else None
        if block is None:
            block = torch.empty(math.prod(shape), dtype=self.cast_to or self.dtype, device=self.device)
        if not block.numel():
            return block.reshape(shape)
        rows = block.view(shape[0], -1)
        raw = None
        if self.device is not None or block.dtype != self.dtype:
            raw = torch.empty(rows.shape[1], dtype=self.dtype, device="cpu")
        for number, row in enumerate(range(*bounds[0])):
            self._read_part(row, bounds[1:], rows[number] if raw is None else raw)
            if raw is not None:
                rows[number].copy_(raw)  # waits for the copy, since `raw` is filled again
        return block.reshape(shape)

    def _read_part(self, row: int, bounds: list[tuple[int, int]], into: torch.Tensor) -> None:
        """Read a part of one slice of the first dimension: runs of bytes, at equal distances."""
        buffer, sizes = _bytes_of(into), self.shape[1:]
        steps = [math.prod(sizes[number + 1 :]) * self.dtype.itemsize for number in range(len(sizes))]
        # The last dimension of which not all is taken: what lies behind it is whole, and one run.
        last = max(number for number, size in enumerate(sizes) if bounds[number] != (0, size))
        run = (bounds[last][1] - bounds[last][0]) * steps[last]
        first = row * math.prod(sizes) * self.dtype.itemsize + bounds[last][0] * steps[last]
        outer = [range(*bound) for bound in bounds[: max(last - 1, 0)]]
        done = 0
        for index in product(*outer):
            start = first + sum(place * step for place, step in zip(index, steps, strict=False))
            stride, count = run, 1
            if last:
                stride, count = steps[last - 1], bounds[last - 1][1] - bounds[last - 1][0]
                start += bounds[last - 1][0] * stride
            self._read_runs(start, stride, run, buffer[done : done + count * run])
            done += count * run

    def _read_runs(self, start: int, stride: int, run: int, buffer: memoryview) -> None:
        """Fill `buffer` with runs of bytes of the whole tensor, each `stride` after the one before."""
        offsets, done = self._offsets, 0
        while done < len(buffer):
            number = bisect_right(offsets, start) - 1
            piece, room = self.pieces[number], offsets[number + 1] - start
            inside = piece.start + start - offsets[number]
            if room < run:  # its end lies in the next piece
                for span in self._spans(start, start + run):
                    self.source.read_into(span.file, span.start, buffer[done : done + span.end - span.start])
                    done += span.end - span.start
                start += stride
                continue
            count = min((room - run) // stride + 1, (len(buffer) - done) // run)
            read_strided(self.source, piece.file, inside, stride, run, buffer[done : done + count * run])
            done, start = done + count * run, start + count * stride

    @property
    def _offsets(self) -> list[int]:
        """Where each piece begins in the whole tensor, and where the last one ends."""
        return [0, *accumulate(piece.end - piece.start for piece in self.pieces)]

    def _read_to_device(self, spans: list[TensorSpan], numel: int) -> torch.Tensor:
        rows = torch.empty(numel, dtype=self.cast_to or self.dtype, device=self.device)
        itemsize = self.dtype.itemsize
        staged = empty(min(numel, max(_STAGED // itemsize, 1)), self.dtype)
        begin = 0
        for span in spans:
            for first in range(span.start, span.end, staged.nbytes):
                count = min(span.end - first, staged.nbytes) // itemsize
                self.source.read_into(span.file, first, _bytes_of(staged[:count]))
                rows[begin : begin + count].copy_(
                    staged[:count]
                )  # waits for the copy, since `staged` is filled again
                begin += count
        return rows

    def _spans(self, first: int, last: int) -> Iterator[TensorSpan]:
        """Where bytes `first` to `last` of the whole tensor lie."""
        offset = 0  # where the piece begins in the whole tensor
        for piece in self.pieces:
            length = piece.end - piece.start
            begin, end = max(first - offset, 0), min(last - offset, length)
            if begin < end:
                yield TensorSpan(piece.file, piece.start + begin, piece.start + end, self.dtype, ())
            offset += length

    def _fill(self, part: torch.Tensor, file: str, start: int) -> None:
        if part.dtype == self.dtype:
            self.source.read_into(file, start, _bytes_of(part))
            return
        raw = torch.empty(part.shape, dtype=self.dtype, device="cpu")
        self.source.read_into(file, start, _bytes_of(raw))
        part.copy_(raw)


def wanted_ranges(tensors: Iterable[LazyTensor], *, gap: int = 0) -> dict[str, list[tuple[int, int]]]:
    """The byte ranges of each file that some tensors need, sorted and merged.

    Args:
        tensors (`Iterable[LazyTensor]`): the tensors that will be read.
        gap (`int`, defaults to 0): merge ranges that are at most so many bytes apart.

    Returns:
        `dict[str, list[tuple[int, int]]]`: for each file its ranges `(start, end)`.

    Example:

    ```python
    >>> from transformers_emo.checkpoints import Checkpoint, wanted_ranges
    >>> checkpoint = Checkpoint.from_folder("model_cards/toy-emo")
    >>> ranges = wanted_ranges([checkpoint.lazy([name]) for name in checkpoint.tensors])
    >>> len(ranges["model.safetensors"])  # all tensors: everything behind the header, in one piece
    1

    ```
    """
    spans: dict[str, list[tuple[int, int]]] = {}
    for tensor in tensors:
        for piece in tensor.pieces:
            spans.setdefault(piece.file, []).append((piece.start, piece.end))
    return {file: merge_ranges(ranges, gap=gap) for file, ranges in spans.items()}


def read_strided(source: Source, file: str, start: int, stride: int, run: int, buffer: memoryview) -> None:
    """Fill `buffer` with runs of bytes of a file, at equal distances, and read nothing between them.

    Args:
        source (`Source`): gives the bytes.
        file (`str`): the file.
        start (`int`): where the first run begins.
        stride (`int`): from the beginning of one run to that of the next.
        run (`int`): the bytes of a run.
        buffer (`memoryview`): as many whole runs.

    Raises:
        CheckpointError: as `source.read_into`.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.lazy_tensor import read_strided
    >>> from transformers_emo.checkpoints.local_files import LocalFiles
    >>> _ = (tmp_path / "letters").write_bytes(b"abcdefghij")
    >>> two = bytearray(4)
    >>> read_strided(LocalFiles(tmp_path), "letters", 1, 5, 2, memoryview(two))
    >>> two
    bytearray(b'bcgh')

    ```
    """
    if isinstance(source, LocalFiles):
        return source.read_strided(file, start, stride, run, buffer)
    for number in range(len(buffer) // run):
        source.read_into(file, start + number * stride, buffer[number * run : (number + 1) * run])


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, for writing to it."""
    return memoryview(tensor.view(torch.uint8).numpy().data) if tensor.numel() else memoryview(bytearray())
