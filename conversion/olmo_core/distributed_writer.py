"""Writing a torch.distributed.checkpoint chunk by chunk, for the readers of torch and OLMo-core.

torch's own writer needs all tensors at once. In this format `.metadata` is a pickle of
`torch.distributed.checkpoint.metadata.Metadata`. It names for each chunk a file and a range of its bytes,
which are what `torch.save` writes. OLMo-core's reader uses only the file, the offset and the length of a
chunk, so torch's class works for both.
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
    """Write tensors to `.distcp` files, some rows after the other, and `.metadata` at the end.

    Args:
        folder (`Path`): the folder to write to. It is made if it does not exist.
        shapes (`dict[str, tuple[int, ...]]`): the shape of each tensor by its whole name, such as
            `model.embeddings.weight`.
        chunks (`Iterable[tuple[str, torch.Tensor]]`): names of tensors and rows of them. The chunks of a
            tensor come in the order of their rows. One chunk is in memory while the next is made.
        max_file_bytes (`int`, defaults to 4 GiB): a file that has so many bytes gets no further chunk.

    Returns:
        `dict[str, str]`: the SHA-256 of each file.

    Raises:
        ValueError: if the chunks of a tensor are not all of its rows, or differ in dtype.

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
                    # `torch.save` would save a view with the whole storage behind it.
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
    """Divide rows into ranges of at most so many bytes. A range has at least one row.

    Args:
        rows (`int`): the number of rows.
        row_bytes (`int`): the bytes of one row.
        max_bytes (`int`): the most bytes of a range.

    Yields:
        `tuple[int, int]`: the first row of a range and the row after its last.

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
    """The same chunks. While one is used, the next one is made."""
    incoming = iter(chunks)
    with ThreadPoolExecutor(1) as maker:
        coming = maker.submit(next, incoming, None)
        while (chunk := coming.result()) is not None:
            coming = maker.submit(next, incoming, None)
            yield chunk


class _Hashed:
    """A file that counts and hashes the bytes written to it. Hashing runs while they are written."""

    def __init__(self, file: IO[bytes], hasher: ThreadPoolExecutor):
        self.file, self.hasher = file, hasher
        self.digest = hashlib.sha256()
        self.written = 0

    def write(self, data: bytes | memoryview) -> int:
        hashing = self.hasher.submit(self.digest.update, data)
        length = self.file.write(data)
        self.written += length
        hashing.result()  # the caller may change the memory afterwards
        return length

    def flush(self) -> None:
        self.file.flush()


def _add(
    entries: dict[str, TensorStorageMetadata],
    shapes: dict[str, tuple[int, ...]],
    name: str,
    rows: torch.Tensor,
) -> torch.Size:
    """Note a chunk, and return where it begins in its tensor."""
    if name not in entries:
        entries[name] = TensorStorageMetadata(
            properties=TensorProperties(dtype=rows.dtype), size=torch.Size(shapes[name]), chunks=[]
        )
    entry = entries[name]
    if entry.properties.dtype != rows.dtype:
        raise ValueError(
            f"A chunk of {name} is of {rows.dtype}, its first of "
            f"{entry.properties.dtype}: give all chunks in one dtype."
        )
    start = sum(chunk.sizes[0] for chunk in entry.chunks)
    offset = torch.Size([start, *[0] * (rows.dim() - 1)])
    entry.chunks.append(ChunkStorageMetadata(offsets=offset, sizes=rows.shape))
    return offset


def _check(entries: dict[str, TensorStorageMetadata], shapes: dict[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        entry = entries.get(name)
        got = [] if entry is None else [tuple(chunk.sizes) for chunk in entry.chunks]
        if sum(size[0] for size in got) != shape[0] or any(size[1:] != shape[1:] for size in got):
            raise ValueError(
                f"{name} should be of shape {list(shape)}, got chunks of {got or 'nothing'}: give "
                "all of its rows."
            )


def _owns_its_storage(rows: torch.Tensor) -> bool:
    return rows.is_contiguous() and rows.untyped_storage().nbytes() == math.prod(rows.shape) * rows.itemsize
