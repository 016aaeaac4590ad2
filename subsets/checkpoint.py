"""Reading part of a safetensors checkpoint: where every tensor lies, and its bytes without the rest of the
file.

Three steps, each of its own: `Checkpoint` knows where tensors lie (from the headers alone); a `LazyTensor` is
a parameter of the network made of pieces of files; a source gives bytes. `wanted_ranges` says which ranges of
which files a set of lazy tensors needs, so that a source which has to fetch them (from the Hub) can do so
beforehand.

The safetensors format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import EllipsisType
from typing import Protocol

import torch

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_INDEX_NAME = "model.safetensors.index.json"
_WEIGHTS_NAME = "model.safetensors"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_MAX_READ = 1 << 30  # one read call takes at most 2 GiB on Linux


class CheckpointError(OSError):
    """A checkpoint is incomplete, damaged or of a kind that cannot be read in part.

    Example:

    ```python
    >>> from transformers_emo.subsets import Checkpoint, CheckpointError
    >>> try:
    ...     Checkpoint.from_folder("no-such-folder")
    ... except CheckpointError as error:
    ...     print(str(error)[:34])
    There are no safetensors weights i

    ```
    """


@dataclass(frozen=True)
class TensorSpan:
    """Where a tensor lies: bytes `start` to `end` of `file`, of this dtype and shape."""

    file: str
    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Source(Protocol):
    """Gives the bytes of a checkpoint's files."""

    def size(self, file: str) -> int:
        """Size of `file` in bytes. Raises `CheckpointError` if there is no such file."""

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `file` from `start`, or raise `CheckpointError`."""

    def close(self) -> None:
        """Let go of open files."""


class LocalFiles:
    """Files of one folder, read with `pread`, so that only the bytes asked for come off the disk.

    A memory map would do for correctness, but the kernel reads ahead around every fault: 1.6 times the bytes
    wanted from a cold disk, and mapped pages count as memory of the process beside the tensors made of them.

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
        return os.fstat(self._descriptor(file)).st_size

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `file` from `start`, or raise `CheckpointError`."""
        descriptor = self._descriptor(file)
        filled = 0
        while filled < len(buffer):
            try:
                got = os.preadv(descriptor, [buffer[filled : filled + _MAX_READ]], start + filled)
            except OSError as error:
                raise CheckpointError(
                    f"Reading {self.folder / file} failed at byte {start + filled}: {error}."
                ) from error
            if got == 0:
                raise CheckpointError(
                    f"{self.folder / file} ends at byte {start + filled}, expected {start + len(buffer)}: it "
                    "was cut short while being read."
                )
            filled += got

    def close(self) -> None:
        """Close the files; they are opened again when needed."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._open:
                path = self.folder / file
                try:
                    self._open[file] = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise CheckpointError(
                        f"Cannot open the weights file {path}: {error.strerror}."
                    ) from error
                if hasattr(os, "posix_fadvise"):
                    # Experts lie scattered over the file: reading ahead would fetch the ones not wanted.
                    os.posix_fadvise(self._open[file], 0, 0, os.POSIX_FADV_RANDOM)
            return self._open[file]


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
        rows = torch.empty((stop - start) * row_numel, dtype=self.cast_to or self.dtype, device="cpu")
        itemsize = self.dtype.itemsize
        first, last = start * row_numel * itemsize, stop * row_numel * itemsize
        offset = 0  # of the piece in the whole tensor, in bytes
        for piece in self.pieces:
            length = piece.end - piece.start
            begin, end = max(first, offset), min(last, offset + length)
            if begin < end:
                part = rows[(begin - first) // itemsize : (end - first) // itemsize]
                self._fill(part, piece.file, piece.start + begin - offset)
            offset += length
        return rows.reshape(stop - start, *row_shape) if self.shape else rows.reshape(())

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

    Example:

    ```python
    >>> from transformers_emo.subsets import Checkpoint
    >>> checkpoint = Checkpoint.from_folder("model_cards/toy-emo")
    >>> checkpoint.tensors["model.layers.0.mlp.gate.weight"].shape
    (32, 128)

    ```
    """

    def __init__(self, source: Source, tensors: dict[str, TensorSpan]):
        self.source = source
        self.tensors = tensors

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
            weight_map = _read_index(index)
            checkpoint = cls.from_files(folder, sorted(set(weight_map.values())))
            for name, file in weight_map.items():
                if name not in checkpoint.tensors or checkpoint.tensors[name].file != file:
                    raise CheckpointError(
                        f"{index} says that {name} is in {file}, but it is not: download the files again."
                    )
            return checkpoint
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
                for name, span in _read_header(source, file).items():
                    if name in tensors:
                        raise CheckpointError(
                            f"{name} is in {tensors[name].file} and again in {file}: expected it once."
                        )
                    tensors[name] = span
        except CheckpointError:
            source.close()
            raise
        return cls(source, tensors)

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
    merged = {}
    for file, ranges in spans.items():
        out: list[tuple[int, int]] = []
        for start, end in sorted(ranges):
            if out and start <= out[-1][1] + gap:
                out[-1] = (out[-1][0], max(out[-1][1], end))
            else:
                out.append((start, end))
        merged[file] = out
    return merged


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, to be written to."""
    return memoryview(tensor.view(torch.uint8).numpy().data) if tensor.numel() else memoryview(bytearray())


def _read_header(source: Source, file: str) -> dict[str, TensorSpan]:
    """The tensors of one safetensors file, which its header must describe to the last byte."""
    size = source.size(file)
    if size < 8:
        raise CheckpointError(
            f"{file} is {size} bytes long, too short for a safetensors file: download it again."
        )
    prefix = bytearray(8)
    source.read_into(file, 0, memoryview(prefix))
    (length,) = struct.unpack("<Q", prefix)
    if length > min(size - 8, _MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{file} is damaged or no safetensors file: its header would be {length} bytes long, and the "
            f"file has {size}."
        )
    raw = bytearray(length)
    source.read_into(file, 8, memoryview(raw))
    try:
        header = json.loads(raw.decode("utf-8"))
        if not isinstance(header, dict):
            raise ValueError(f"expected an object, got a {type(header).__name__}")
        header.pop("__metadata__", None)
        spans = {name: _span(file, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{file} has a damaged safetensors header ({type(error).__name__}: {error})."
        ) from error
    position = 8 + length
    for name, span in sorted(spans.items(), key=lambda item: (item[1].start, item[1].end)):
        if span.start != position:
            raise CheckpointError(
                f"{file} has a damaged header: {name} should begin at byte {position}, not {span.start}."
            )
        position = span.end
    if position != size:
        raise CheckpointError(
            f"{file} is {size} bytes long, expected {position}: it is cut short or damaged, download it "
            "again."
        )
    return spans


def _span(file: str, entry: dict, data_start: int) -> TensorSpan:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise ValueError(f"dtype {entry['dtype']!r} is not one of {', '.join(_DTYPES)}")
    shape = tuple(entry["shape"])
    start, end = entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise ValueError(f"shape {shape} and offsets {(start, end)} must be integers from 0")
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"offsets {(start, end)} do not fit shape {shape} of {dtype}")
    return TensorSpan(file, data_start + start, data_start + end, dtype, shape)


def _read_index(path: Path) -> dict[str, str]:
    """The weight map of an index: tensor names and the files they are in, all in the index's own folder."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        pairs = weight_map.items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"The index {path} is damaged ({type(error).__name__}: {error}): download it again."
        ) from error
    folder = Path(os.path.abspath(path.parent))  # not resolved: the shards themselves may be links
    for name, file in pairs:
        if not isinstance(file, str) or not file or "\0" in file:
            raise CheckpointError(
                f"The index {path} names no file for {name}: expected a file name, got {file!r}."
            )
        inside = os.path.normpath(folder / file)
        if os.path.isabs(file) or os.path.commonpath([folder, inside]) != str(folder):
            raise CheckpointError(f"The index {path} names {file!r}, a file outside its folder: refused.")
        if not file.endswith(".safetensors"):
            raise CheckpointError(
                f"The index {path} names {file!r}, which is not a safetensors file: convert the weights to "
                "safetensors."
            )
    return weight_map
