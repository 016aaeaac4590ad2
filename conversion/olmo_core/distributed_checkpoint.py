"""Reading tensors of a torch.distributed.checkpoint, any rows of them, without unpickling anything.

Each chunk in a `.distcp` file is what `torch.save` writes: a zip archive. Its `data.pkl` describes one
tensor, and its `data/<key>` holds the tensor's elements, uncompressed. The description is read as data
(`inert_pickle`), and the elements are read from their place in the file.
"""

from __future__ import annotations

import io
import math
import os
import struct
import threading
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from ...checkpoints import CheckpointError
from ...checkpoints.local_files import LocalFiles
from ...checkpoints.safetensors_header import Source
from .inert_pickle import Global, read_pickle
from .pickled_metadata import ChunkLocation, TensorMetadata, read_metadata

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # of a member of a zip archive; its name and extra field follow
_MAX_DESCRIPTION = 1 << 20
_MAX_ORDER = 16  # bytes of the member `byteorder`, which says `little`
_MAX_READ = 8 << 20  # bytes of a chunk that are read beside its elements
_CHECKED_AT_ONCE = 1 << 20  # so many bytes stay in the processor's cache


class StoredTensor:
    """A tensor of the checkpoint. Any rows of it can be read.

    Args:
        name (`str`): its name.
        metadata (`TensorMetadata`): its dtype, shape and chunks.
        source (`Source`): gives the bytes of files.

    Example: see `DistributedCheckpoint`.
    """

    def __init__(self, name: str, metadata: TensorMetadata, source: Source):
        self.name = name
        self.dtype = metadata.dtype
        self.shape = metadata.shape
        self._chunks = metadata.chunks
        self._source = source
        self._starts: dict[tuple[int, ...], int] = {}  # where each chunk's elements begin in its file
        self._lock = threading.Lock()

    def check(self) -> None:
        """Check that every chunk exists, is whole, and has the dtype and shape that the metadata says.

        Raises:
            CheckpointError: if a chunk does not.

        Example: see `DistributedCheckpoint`.
        """
        for chunk in self._chunks:
            self._start(chunk)

    def check_bytes(self) -> None:
        """Check that the elements of every chunk have the checksum (CRC-32) that `torch.save` wrote.

        This reads the whole tensor. After `torch.serialization.set_crc32_options(False)`, `torch.save` writes
        checksums that do not hold.

        Raises:
            CheckpointError: if a chunk has another checksum, or cannot be read.

        Example: see `DistributedCheckpoint`.
        """
        buffer = memoryview(bytearray(_CHECKED_AT_ONCE))
        for chunk in self._chunks:
            begin, length, expected = _storage(self._source, self.name, self.dtype, chunk)[1:]
            found = 0
            for start in range(begin, begin + length, len(buffer)):
                part = buffer[: min(len(buffer), begin + length - start)]
                self._source.read_into(chunk.file, start, part)
                found = zlib.crc32(part, found)
            if found != expected:
                raise CheckpointError(
                    f"The elements of {self.name} at {list(chunk.offsets)}, in {chunk.file} from byte "
                    f"{begin}, have the checksum {found:08x}, and were saved with {expected:08x}: the file "
                    "is damaged, copy it again. If it was saved without checksums, convert without "
                    "verification."
                )

    def ranges(self, start: int, stop: int) -> list[tuple[str, int, int, int]] | None:
        """Where the bytes of some rows lie, if each chunk holds whole rows.

        Args:
            start, stop (`int`): the first row and the one after the last.

        Returns:
            `list[tuple[str, int, int, int]]`, *optional*: for each chunk with such rows the file, the first
            byte, the number of bytes, and how many bytes of the rows come before. `None` if chunks hold parts
            of rows.

        Raises:
            CheckpointError: if a chunk is missing, cut short or damaged.

        Example: see `DistributedCheckpoint`.
        """
        if not self.shape or any(chunk.sizes[1:] != self.shape[1:] for chunk in self._chunks):
            return None
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        found = []
        for chunk in self._chunks:
            first, last = max(start, chunk.offsets[0]), min(stop, chunk.offsets[0] + chunk.sizes[0])
            if first < last:
                begin = self._start(chunk) + (first - chunk.offsets[0]) * row_bytes
                found.append((chunk.file, begin, (last - first) * row_bytes, (first - start) * row_bytes))
        return found

    def rows(
        self, start: int = 0, stop: int | None = None, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Read rows of the first dimension.

        Args:
            start (`int`, defaults to 0): the first row.
            stop (`int`, *optional*): the row after the last; all rows by default.
            out (`torch.Tensor`, *optional*): a contiguous tensor of the rows' shape and dtype, which is
                filled and returned.

        Returns:
            `torch.Tensor` of shape `(stop - start, *shape[1:])`, contiguous, in the checkpoint's dtype.

        Raises:
            CheckpointError: if a chunk is missing, cut short or damaged.

        Example: see `DistributedCheckpoint`.
        """
        if not self.shape:
            return self._read(self._chunks[0], 0, 1).reshape(())
        stop = self.shape[0] if stop is None else stop
        rows = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype) if out is None else out
        for chunk in self._chunks:
            first, last = max(start, chunk.offsets[0]), min(stop, chunk.offsets[0] + chunk.sizes[0])
            if first < last:
                box = tuple(
                    slice(offset, offset + size)
                    for offset, size in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)
                )
                place = rows[(slice(first - start, last - start), *box)]
                within = (first - chunk.offsets[0], last - chunk.offsets[0])
                if place.is_contiguous():
                    self._read(chunk, *within, into=place)
                else:
                    place.copy_(self._read(chunk, *within))
        return rows

    def _read(
        self, chunk: ChunkLocation, first: int, last: int, into: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Read rows `first` to `last` of a chunk. A scalar has one row."""
        if into is None:
            into = torch.empty((last - first, *chunk.sizes[1:]), dtype=self.dtype)
        if into.numel():
            row_bytes = math.prod(chunk.sizes[1:]) * self.dtype.itemsize
            buffer = memoryview(into.view(-1).view(torch.uint8).numpy().data)
            self._source.read_into(chunk.file, self._start(chunk) + first * row_bytes, buffer)
        return into

    def _start(self, chunk: ChunkLocation) -> int:
        with self._lock:
            if chunk.offsets not in self._starts:
                self._starts[chunk.offsets] = _elements_start(self._source, self.name, self.dtype, chunk)
            return self._starts[chunk.offsets]


class DistributedCheckpoint:
    """A torch.distributed.checkpoint on disk, written by any number of ranks.

    Args:
        folder (`str` or `os.PathLike`): the folder with `.metadata` and the `.distcp` files.

    Raises:
        CheckpointError: if `.metadata` is missing, refused (`UnsafePickleError`) or damaged.

    Example:

    ```python
    >>> import torch, torch.distributed.checkpoint as dcp
    >>> from transformers_emo.conversion import DistributedCheckpoint
    >>> dcp.save({"w": torch.arange(6).view(3, 2)}, checkpoint_id=str(tmp_path / "step"), no_dist=True)
    Metadata(...)
    >>> checkpoint = DistributedCheckpoint(tmp_path / "step")
    >>> checkpoint["w"].check()
    >>> checkpoint["w"].check_bytes()
    >>> checkpoint["w"].rows(1, 3)
    tensor([[2, 3],
            [4, 5]])
    >>> [length for file, start, length, before in checkpoint["w"].ranges(1, 3)]
    [32]
    >>> checkpoint.close()

    ```
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._source = LocalFiles(self.folder)
        self._tensors = {
            name: StoredTensor(name, metadata, self._source)
            for name, metadata in read_metadata(self.folder / ".metadata").items()
        }

    @property
    def names(self) -> list[str]:
        """`list[str]`: the tensors' names."""
        return list(self._tensors)

    def __getitem__(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise CheckpointError(
                f"{self.folder} holds no tensor {name}, which its config needs: use the config.json of "
                "the same step."
            )
        return self._tensors[name]

    def close(self) -> None:
        """Close the files. They are opened again when they are needed."""
        self._source.close()


def _elements_start(source: Source, name: str, dtype: torch.dtype, chunk: ChunkLocation) -> int:
    """The byte of its file at which the elements of a chunk begin."""
    return _storage(source, name, dtype, chunk)[0]


def _storage(
    source: Source, name: str, dtype: torch.dtype, chunk: ChunkLocation
) -> tuple[int, int, int, int]:
    """Where the elements of a chunk begin in its file; where their storage begins, its length and CRC-32."""
    size = source.size(chunk.file)
    if chunk.start + chunk.length > size:
        raise CheckpointError(
            f"{chunk.file} is {size} bytes long, but {name} is said to reach to byte "
            f"{chunk.start + chunk.length}: the file is cut short, copy it again."
        )
    window = _Window(source, chunk)
    try:
        with zipfile.ZipFile(io.BufferedReader(window, 1 << 12)) as archive:
            members = {member.filename.partition("/")[2]: member for member in archive.infolist()}
            description = members["data.pkl"]
            if description.file_size > _MAX_DESCRIPTION or description.compress_type:
                raise ValueError("its description is too long or compressed")
            order = b"little"
            if (said := members.get("byteorder")) is not None:
                if said.file_size > _MAX_ORDER or said.compress_type:
                    raise ValueError(
                        f"its `byteorder` is {said.file_size} bytes long or compressed, expected at most "
                        f"{_MAX_ORDER}"
                    )
                order = archive.read(said)
            key, offset = _described(archive.read(description), dtype, chunk, f"{name} in {chunk.file}")
            storage = members[f"data/{key}"]
    except CheckpointError:
        raise
    # zipfile raises these for damaged archives.
    except (
        zipfile.BadZipFile,
        KeyError,
        ValueError,
        TypeError,
        EOFError,
        OSError,
        RuntimeError,
        struct.error,
        zlib.error,
    ) as error:
        raise CheckpointError(
            f"The chunk of {name} at {list(chunk.offsets)}, in {chunk.file} from byte {chunk.start}, is no "
            f"tensor as torch.save writes it ({type(error).__name__}: {error}): copy the file again."
        ) from error
    header = bytearray(_LOCAL_HEADER.size)
    begin = chunk.start + storage.header_offset
    source.read_into(chunk.file, begin, memoryview(header))
    signature, *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    begin += len(header) + name_length + extra_length
    end = begin + (offset + math.prod(chunk.sizes)) * dtype.itemsize
    if (
        signature != b"PK\x03\x04"
        or storage.compress_type
        or order.strip() != b"little"
        or end > min(begin + storage.file_size, chunk.start + chunk.length)
    ):
        raise CheckpointError(
            f"The chunk of {name} at {list(chunk.offsets)} does not lie plainly in {chunk.file}: expected "
            f"{math.prod(chunk.sizes)} uncompressed little-endian elements of {dtype}. Copy the file again."
        )
    return begin + offset * dtype.itemsize, begin, storage.file_size, storage.CRC


def _described(data: bytes, dtype: torch.dtype, chunk: ChunkLocation, source: str) -> tuple[str, int]:
    """The key of the storage of a chunk, and the element of the storage at which the chunk begins."""
    admitted: dict[tuple[str, str], Any] = {
        ("torch._utils", "_rebuild_tensor_v2"): lambda arguments: arguments,
        ("collections", "OrderedDict"): lambda arguments: {},  # no hooks
        **{("torch", name): None for name in _STORAGES},
    }
    tensor = read_pickle(data, admitted, persistent=lambda key: key, source=source)
    (kind, storage, key, *_), offset, sizes, strides, *_ = tensor
    if kind != "storage" or type(storage) is not Global or _STORAGES.get(storage.name) is not dtype:
        raise ValueError(f"expected a tensor of {dtype}")
    if type(key) is not str or type(offset) is not int or offset < 0 or type(sizes) is not tuple:
        raise ValueError("its description is of an unknown form")
    expected, step = [], 1
    for extent in reversed(chunk.sizes):
        expected.append(step)
        step *= extent
    contiguous = (
        type(strides) is tuple
        and len(strides) == len(sizes)
        and all(
            stride == want or extent <= 1
            for stride, want, extent in zip(strides, reversed(expected), sizes, strict=False)
        )
    )
    if sizes != chunk.sizes or not contiguous:
        raise ValueError(f"expected a contiguous tensor of shape {list(chunk.sizes)}")
    return key, offset


class _Window(io.RawIOBase):
    """The bytes of one chunk, as if they were a file."""

    def __init__(self, source: Source, chunk: ChunkLocation):
        self._source, self._chunk, self._position = source, chunk, 0
        self._left = _MAX_READ

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = max(0, offset + {0: 0, 1: self._position, 2: self._chunk.length}[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._chunk.length - self._position))
        self._left -= length
        if self._left < 0:
            raise ValueError(f"its directory is longer than {_MAX_READ} bytes, the limit")
        if length:
            start = self._chunk.start + self._position
            self._source.read_into(self._chunk.file, start, memoryview(buffer)[:length])
            self._position += length
        return length
