"""Reading part of a safetensors checkpoint: where every tensor lies, and its bytes without the rest of the
file.

Three steps, each of its own: `Checkpoint` knows where tensors lie (from the headers alone); a `LazyTensor` is
a parameter of the network made of pieces of files; a source gives bytes. `wanted_ranges` says which ranges of
which files a set of lazy tensors needs, so that a source which has to fetch them (from the Hub) can do so
beforehand.

The safetensors format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import math
import os
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from types import EllipsisType

import torch

from .byte_ranges import merge_ranges
from .fresh_memory import empty
from .mapped_files import map_spans
from .safetensors_header import DTYPE_NAMES, CheckpointError, Source, TensorSpan, read_header, read_index

_INDEX_NAME = "model.safetensors.index.json"
_WEIGHTS_NAME = "model.safetensors"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_MOST_OPEN = 256  # files kept open at once: expert shards are thousands, and a process may have 1024
_STAGED = 64 << 20  # bytes for a device that are in the host's memory at a time
_MAX_READ = 1 << 30  # one read call takes at most 2 GiB on Linux


class LocalFiles:
    """Files of one folder, read with `pread`, so that only the bytes asked for come off the disk.

    What is made into other tensors is read: of a memory map the kernel reads ahead around every fault, 1.6
    times the bytes wanted from a cold disk, and mapped pages count as memory of the process beside the
    tensors made of them. What stays as it is may be mapped: see `LazyTensor`.

    Args:
        folder (`str` or `os.PathLike`): the folder that file names are relative to.

    Example:

    ```python
    >>> from transformers_emo.subsets.checkpoint import LocalFiles
    >>> source = LocalFiles("model_cards/toy-emo")
    >>> buffer = bytearray(8)
    >>> source.read_into("model.safetensors", 0, memoryview(buffer))
    >>> source.close()

    ```
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()

    def size(self, file: str) -> int:
        """Size of `file` in bytes. Raises `CheckpointError` if it cannot be opened."""
        with self.opened(file) as descriptor:
            return os.fstat(descriptor).st_size

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `file` from `start`, or raise `CheckpointError`."""
        filled = 0
        with self.opened(file) as descriptor:
            while filled < len(buffer):
                try:
                    got = os.preadv(descriptor, [buffer[filled : filled + _MAX_READ]], start + filled)
                except OSError as error:
                    raise CheckpointError(
                        f"Reading {self.folder / file} failed at byte {start + filled}: {error}."
                    ) from error
                if got == 0:
                    raise CheckpointError(
                        f"{self.folder / file} ends at byte {start + filled}, expected "
                        f"{start + len(buffer)}: it was cut short while being read."
                    )
                filled += got

    def close(self) -> None:
        """Close the files; they are opened again when needed."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    @contextmanager
    def opened(self, file: str) -> Iterator[int]:
        """The descriptor of `file`, opened for good, or for as long as it is used if many are already."""
        with self._lock:
            descriptor = self._open.get(file)
            keep = descriptor is not None or len(self._open) < _MOST_OPEN
            if descriptor is None:
                path = self.folder / file
                try:
                    descriptor = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise CheckpointError(
                        f"Cannot open the weights file {path}: {error.strerror}."
                    ) from error
                if hasattr(os, "posix_fadvise"):
                    # Experts lie scattered over the file: reading ahead would fetch the ones not wanted.
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
                if keep:
                    self._open[file] = descriptor
        try:
            yield descriptor
        finally:
            if not keep:
                os.close(descriptor)


class LazyTensor:
    """A tensor that is read when indexed, as Transformers' loader does with slices of safetensors files.

    Its bytes are the concatenation of `pieces`, which may lie in several files. A slice of the first
    dimension reads only its own rows.

    Args:
        source (`Source`): gives the bytes.
        pieces (`Sequence[TensorSpan]`): consecutive parts, all of `dtype`; only their file and range are
            used.
        dtype (`torch.dtype`): the dtype on disk.
        shape (`Sequence[int]`): the shape of the whole.
        cast_to (`torch.dtype`, *optional*): convert piece by piece while reading, so that the tensor is never
            held in both dtypes.

    Attributes:
        mapped (`bool`): may be set to have tensors be pages of their files where that is possible
            (`mapped_files.py`); others who overwrite such a file in place then change the tensor.
        device (`torch.device`, *optional*): may be set to have the tensor made there, filled part by part, so
            that the host never holds it whole.

    Example:

    ```python
    >>> from transformers_emo.subsets import Checkpoint
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
        """`list[int]`: the shape, by the name safetensors gives it."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """`str`: the dtype on disk, by the name safetensors gives it, such as `"BF16"`."""
        return DTYPE_NAMES[self.dtype]

    def __getitem__(self, index: EllipsisType | slice | tuple) -> torch.Tensor:
        parts = index if isinstance(index, tuple) else (index,)
        if parts and isinstance(parts[0], slice) and parts[0].step in (None, 1) and self.shape:
            start, stop, _ = parts[0].indices(self.shape[0])
            return self._read_rows(start, max(start, stop))[(slice(None), *parts[1:])]
        return self._read_rows(0, self.shape[0] if self.shape else 1)[index]

    def take(self, rows: Sequence[int]) -> LazyTensor:
        """Some rows of the first dimension, as a lazy tensor of their own; neighbours are read together.

        Args:
            rows (`Sequence[int]`): row numbers.

        Example:

        ```python
        >>> from transformers_emo.subsets import Checkpoint
        >>> checkpoint = Checkpoint.from_folder("model_cards/toy-emo")
        >>> checkpoint.lazy(["model.embed_tokens.weight"]).take([7, 8, 300])[...].shape
        torch.Size([3, 128])

        ```
        """
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        offsets = [0, *accumulate(piece.end - piece.start for piece in self.pieces)]
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

    def _read_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of the first dimension (a scalar has one row)."""
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

    def _read_to_device(self, spans: list[TensorSpan], numel: int) -> torch.Tensor:
        rows = torch.empty(numel, dtype=self.cast_to or self.dtype, device=self.device)
        itemsize = self.dtype.itemsize
        staged = empty(min(numel, max(_STAGED // itemsize, 1)), self.dtype)
        begin = 0
        for span in spans:
            for first in range(span.start, span.end, staged.nbytes):
                count = min(span.end - first, staged.nbytes) // itemsize
                self.source.read_into(span.file, first, _bytes_of(staged[:count]))
                rows[begin : begin + count].copy_(staged[:count])  # it waits: what is staged is used again
                begin += count
        return rows

    def _spans(self, first: int, last: int) -> Iterator[TensorSpan]:
        """The parts of the pieces that bytes `first` to `last` of the whole tensor are in."""
        offset = 0  # of the piece in the whole tensor
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


class Checkpoint:
    """A safetensors checkpoint of one or more files, known by its headers.

    Args:
        source (`Source`): gives the bytes.
        tensors (`dict[str, TensorSpan]`): where each tensor lies.
        elsewhere (`frozenset[str]`, *optional*): names of further tensors, in files that are not at hand.

    Example:

    ```python
    >>> from transformers_emo.subsets import Checkpoint
    >>> checkpoint = Checkpoint.from_folder("model_cards/toy-emo")
    >>> checkpoint.tensors["model.layers.0.mlp.gate.weight"].shape
    (32, 128)

    ```
    """

    def __init__(
        self, source: Source, tensors: dict[str, TensorSpan], elsewhere: frozenset[str] = frozenset()
    ):
        self.source = source
        self.tensors = tensors
        self.elsewhere = elsewhere

    @classmethod
    def from_folder(cls, folder: str | os.PathLike, *, variant: str | None = None) -> Checkpoint:
        """Read the headers of a model's folder: one file, or shards with an index.

        Args:
            folder (`str` or `os.PathLike`): the folder.
            variant (`str`, *optional*): as in `from_pretrained`: `model.<variant>.safetensors`.

        Raises:
            CheckpointError: if there are no safetensors weights, the index is damaged or names a file outside
                the folder, or a shard is missing, cut short or damaged.

        Example: see the class.
        """
        folder = Path(folder)
        infix = "" if variant is None else f".{variant}"
        weights = _WEIGHTS_NAME.replace(".safetensors", f"{infix}.safetensors")
        index = folder / _INDEX_NAME.replace(".index", f".index{infix}")
        if (folder / weights).is_file():
            return cls.from_files(folder, [weights])
        if index.is_file():
            weight_map = read_index(index)
            return cls.from_index(weight_map, set(weight_map.values()), LocalFiles(folder))
        if not folder.is_dir():
            raise CheckpointError(f"There is no folder '{folder}' (seen from {os.getcwd()}).")
        pickled = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLE_SUFFIXES)
        if pickled:
            raise CheckpointError(
                f"The weights in {folder} are pickled ({pickled[0]}), which cannot be read in part and can "
                "run code: convert them to safetensors first."
            )
        raise CheckpointError(
            f"There are no safetensors weights in {folder}: expected {weights} or {index.name}."
        )

    @classmethod
    def from_files(
        cls, folder: str | os.PathLike, files: Iterable[str], source: Source | None = None
    ) -> Checkpoint:
        """Read the headers of the files named.

        Args:
            folder (`str` or `os.PathLike`): the folder they are in.
            files (`Iterable[str]`): their names, relative to it.
            source (`Source`, *optional*): gives their bytes; files on disk by default.

        Raises:
            CheckpointError: if one is missing, cut short or damaged, or two hold the same tensor.

        Example:

        ```python
        >>> from transformers_emo.subsets import Checkpoint
        >>> len(Checkpoint.from_files("model_cards/toy-emo", ["model.safetensors"]).tensors)
        415

        ```
        """
        source = source or LocalFiles(folder)
        tensors: dict[str, TensorSpan] = {}
        try:
            for file in files:
                for name, span in read_header(source, file).items():
                    if name in tensors:
                        raise CheckpointError(
                            f"{name} is in {tensors[name].file} and again in {file}: expected it once."
                        )
                    tensors[name] = span
        except CheckpointError:
            source.close()
            raise
        return cls(source, tensors)

    @classmethod
    def from_index(cls, weight_map: dict[str, str], files: Iterable[str], source: Source) -> Checkpoint:
        """Read the headers of some or all of the files that an index names.

        Args:
            weight_map (`dict[str, str]`): the index: tensor names and the files they are in.
            files (`Iterable[str]`): the files to be used; the tensors of the others are known by name alone.
            source (`Source`): gives their bytes.

        Raises:
            CheckpointError: if a file is missing, cut short or damaged, or holds other tensors than the
                index says.

        Example:

        ```python
        >>> from transformers_emo.subsets.checkpoint import Checkpoint, LocalFiles
        >>> files = LocalFiles("model_cards/toy-emo")
        >>> whole = Checkpoint.from_files(files.folder, ["model.safetensors"], files)
        >>> weight_map = {name: span.file for name, span in whole.tensors.items()}
        >>> Checkpoint.from_index(weight_map | {"x": "x.safetensors"}, ["model.safetensors"], files).elsewhere
        frozenset({'x'})

        ```
        """
        wanted = sorted(set(files))
        checkpoint = cls.from_files("", wanted, source)
        elsewhere = set()
        for name, file in weight_map.items():
            if file not in wanted:
                elsewhere.add(name)
            elif name not in checkpoint.tensors or checkpoint.tensors[name].file != file:
                source.close()
                raise CheckpointError(
                    f"The index says that {name} is in {file}, but it is not: download the files again."
                )
        return cls(source, checkpoint.tensors, frozenset(elsewhere))

    def lazy(self, names: Sequence[str], *, shape: Sequence[int] | None = None) -> LazyTensor:
        """The tensors named, one after the other, as one lazy tensor.

        Args:
            names (`Sequence[str]`): tensors of one dtype.
            shape (`Sequence[int]`, *optional*): the shape of the whole; needed for more than one.

        Raises:
            CheckpointError: if a tensor is missing, the dtypes differ or the shape does not fit.

        Example: see `LazyTensor`.
        """
        missing = [name for name in names if name not in self.tensors]
        if missing:
            raise CheckpointError(
                f"The checkpoint lacks {len(missing)} tensors it should have, such as {missing[0]}."
            )
        pieces = [self.tensors[name] for name in names]
        return self.from_pieces(pieces, shape or pieces[0].shape)

    def from_pieces(self, pieces: Sequence[TensorSpan], shape: Sequence[int]) -> LazyTensor:
        """A lazy tensor made of parts of the checkpoint's tensors.

        Args:
            pieces (`Sequence[TensorSpan]`): the parts, of one dtype.
            shape (`Sequence[int]`): the shape of the whole.

        Raises:
            CheckpointError: if the dtypes differ or the parts do not add up to the shape.

        Example:

        ```python
        >>> from transformers_emo.subsets import Checkpoint
        >>> checkpoint = Checkpoint.from_folder("model_cards/toy-emo")
        >>> norm = checkpoint.tensors["model.norm.weight"]
        >>> checkpoint.from_pieces([norm, norm], (2, 128))[...].shape
        torch.Size([2, 128])

        ```
        """
        dtypes = {piece.dtype for piece in pieces}
        size = sum(piece.end - piece.start for piece in pieces)
        if len(dtypes) != 1 or size != math.prod(shape) * pieces[0].dtype.itemsize:
            raise CheckpointError(
                f"Tensors of {size} bytes and dtypes {sorted(map(str, dtypes))} do not make up one of shape "
                f"{tuple(shape)}: config.json and the weights are of different models."
            )
        return LazyTensor(self.source, pieces, pieces[0].dtype, shape)


def rows_of(span: TensorSpan, rows: Sequence[int]) -> list[TensorSpan]:
    """Parts of a tensor: some rows of its first dimension, neighbours taken together.

    Args:
        span (`TensorSpan`): the tensor.
        rows (`Sequence[int]`): ascending row numbers.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.subsets.checkpoint import TensorSpan, rows_of
    >>> span = TensorSpan("model.safetensors", 100, 140, torch.float32, (5, 2))
    >>> [(part.start, part.end) for part in rows_of(span, [0, 1, 3])]
    [(100, 116), (124, 132)]

    ```
    """
    row_bytes = (span.end - span.start) // max(span.shape[0], 1)
    parts: list[TensorSpan] = []
    for row in rows:
        start = span.start + row * row_bytes
        if parts and parts[-1].end == start:
            start = parts.pop().start
        end = span.start + (row + 1) * row_bytes
        parts.append(
            TensorSpan(span.file, start, end, span.dtype, ((end - start) // row_bytes, *span.shape[1:]))
        )
    return parts


def wanted_ranges(tensors: Iterable[LazyTensor], *, gap: int = 0) -> dict[str, list[tuple[int, int]]]:
    """The byte ranges of each file that these tensors need, sorted and merged.

    Args:
        tensors (`Iterable[LazyTensor]`): what will be read.
        gap (`int`, defaults to 0): merge ranges that are at most so many bytes apart.

    Returns:
        `dict[str, list[tuple[int, int]]]`: for each file its ranges `(start, end)`.

    Example:

    ```python
    >>> from transformers_emo.subsets import Checkpoint, wanted_ranges
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


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, to be written to."""
    return memoryview(tensor.view(torch.uint8).numpy().data) if tensor.numel() else memoryview(bytearray())
