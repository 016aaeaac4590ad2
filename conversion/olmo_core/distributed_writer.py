"""Writes a torch.distributed.checkpoint chunk by chunk, for torch's and OLMo-core's readers.

torch's own writer needs every tensor at once. The format: `.metadata` is a pickle of
`torch.distributed.checkpoint.metadata.Metadata`, which names for each chunk a file and a range of its bytes;
there lies what `torch.save` writes. OLMo-core's reader asks a chunk's place for its file, offset and length
only, so torch's class serves both.
"""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ...modeling_emo.kernels.private_torch import private_torch

_StorageInfo = private_torch("torch.distributed.checkpoint.filesystem._StorageInfo")

MAX_FILE_BYTES = 4 << 30


def write_distributed_checkpoint(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    chunks: Iterable[tuple[str, torch.Tensor]],
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> dict[str, str]:
    """Write tensors, given as consecutive rows, to `.distcp` files, and `.metadata` at the end.

    Args:
        folder (`Path`): where to; made if need be.
        shapes (`dict[str, tuple[int, ...]]`): each tensor's shape, under its whole name, such as
            `model.embeddings.weight`.
        chunks (`Iterable[tuple[str, torch.Tensor]]`): rows of a tensor, under its name; a tensor's chunks
            follow one another in the order of their rows. One chunk is held at a time.
        max_file_bytes (`int`, defaults to 4 GiB): a file takes no further chunk beyond it.

    Returns:
        `dict[str, str]`: the SHA-256 of each file.

    Raises:
        ValueError: if a tensor's chunks are not all of its rows, or of another dtype than its first.

    Example:

    ```python
    >>> import torch, torch.distributed.checkpoint as dcp
    >>> from transformers_emo.conversion.olmo_core.distributed_writer import write_distributed_checkpoint
    >>> rows = [("model.w", torch.ones(2, 3)), ("model.w", torch.zeros(1, 3))]
    >>> hashes = write_distributed_checkpoint(tmp_path, {"model.w": (3, 3)}, rows)
    >>> read = {"model": {"w": torch.empty(3, 3)}}
    >>> dcp.load(read, checkpoint_id=str(tmp_path), no_dist=True)
    >>> read["model"]["w"].sum(1)
    tensor([3., 3., 0.])

    ```
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, Any] = {}
    hashes: dict[str, str] = {}
    with ThreadPoolExecutor(1) as hasher, closing(_ahead(chunks)) as incoming:
        held = next(incoming, None)
        while held is not None:
            file = f"__0_{len(hashes)}.distcp"
            with open(folder / file, "xb") as out:
                hashed = _Hashed(out, hasher)
                while held is not None and hashed.written < max_file_bytes:
                    name, rows = held
                    offset = _add(entries, shapes, name, rows)
                    start = hashed.written
                    # A view would be saved with the whole storage it is a view of.
                    own = rows if _owns_its_storage(rows) else rows.clone()
                    torch.save(own, cast(IO[bytes], hashed))
                    places[MetadataIndex(fqn=name, offset=offset)] = _StorageInfo(
                        relative_path=file, offset=start, length=hashed.written - start
                    )
                    held = next(incoming, None)
                hashes[file] = hashed.digest.hexdigest()
    _check(entries, shapes)
    paths = {name: tuple(name.split(".", 1)) for name in entries}
    root = Metadata(state_dict_metadata={**entries}, planner_data=paths, storage_data=places)
    data = pickle.dumps(root, protocol=4)
    (folder / ".metadata").write_bytes(data)
    hashes[".metadata"] = hashlib.sha256(data).hexdigest()
    return hashes


def row_ranges(rows: int, row_bytes: int, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut rows into ranges of at most so many bytes, or of one row.

    Args:
        rows (`int`): how many there are.
        row_bytes (`int`): bytes of one.
        max_bytes (`int`): bytes of a range at most.

    Yields:
        `tuple[int, int]`: the first row and the one after the last.

    Example:

    ```python
    >>> from transformers_emo.conversion.olmo_core.distributed_writer import row_ranges
    >>> list(row_ranges(5, 4, 8))
    [(0, 2), (2, 4), (4, 5)]

    ```
    """
    step = max(1, max_bytes // max(1, row_bytes))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _ahead(chunks: Iterable[tuple[str, torch.Tensor]]) -> Generator[tuple[str, torch.Tensor], None, None]:
    """The same chunks; the next one is made while one is used."""
    incoming = iter(chunks)
    with ThreadPoolExecutor(1) as maker:
        coming = maker.submit(next, incoming, None)
        while (chunk := coming.result()) is not None:
            coming = maker.submit(next, incoming, None)
            yield chunk


class _Hashed:
    """A file that counts and hashes what is written; hashing goes on beside writing."""

    def __init__(self, file: IO[bytes], hasher: ThreadPoolExecutor):
        self.file, self.hasher = file, hasher
        self.digest = hashlib.sha256()
        self.written = 0

    def write(self, data: bytes | memoryview) -> int:
        hashing = self.hasher.submit(self.digest.update, data)
        length = self.file.write(data)
        self.written += length
        hashing.result()  # the memory is the caller's
        return length

    def flush(self) -> None:
        self.file.flush()


def _add(
    entries: dict[str, TensorStorageMetadata],
    shapes: dict[str, tuple[int, ...]],
    name: str,
    rows: torch.Tensor,
) -> torch.Size:
    """Note a chunk, and give its place in the tensor."""
    if name not in entries:
        entries[name] = TensorStorageMetadata(
            properties=TensorProperties(dtype=rows.dtype), size=torch.Size(shapes[name]), chunks=[]
        )
    entry = entries[name]
    if entry.properties.dtype != rows.dtype:
        raise ValueError(f"A chunk of {name} is of {rows.dtype}, its first of {entry.properties.dtype}.")
    start = sum(chunk.sizes[0] for chunk in entry.chunks)
    offset = torch.Size([start, *[0] * (rows.dim() - 1)])
    entry.chunks.append(ChunkStorageMetadata(offsets=offset, sizes=rows.shape))
    return offset


def _check(entries: dict[str, TensorStorageMetadata], shapes: dict[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        entry = entries.get(name)
        got = [] if entry is None else [tuple(chunk.sizes) for chunk in entry.chunks]
        if sum(size[0] for size in got) != shape[0] or any(size[1:] != shape[1:] for size in got):
            raise ValueError(f"{name} should be of shape {list(shape)}, got chunks of {got or 'nothing'}.")


def _owns_its_storage(rows: torch.Tensor) -> bool:
    return rows.is_contiguous() and rows.untyped_storage().nbytes() == math.prod(rows.shape) * rows.itemsize
