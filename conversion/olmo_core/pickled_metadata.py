"""Reading the `.metadata` of a torch.distributed.checkpoint: its tensors, and where their chunks lie.

The file is a pickle, and is read as data (`inert_pickle`). It names torch's metadata classes, and a class of
the training library (`olmo_core.distributed.checkpoint.filesystem._StorageInfo`). None of them is imported or
built.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...checkpoints import CheckpointError
from ...checkpoints.small_files import read_small
from .inert_pickle import Global, Record, UnsafePickleError, read_pickle

__all__ = ["ChunkLocation", "TensorMetadata", "UnsafePickleError", "dtype_of", "read_metadata"]

_METADATA = "torch.distributed.checkpoint.metadata"
_STORAGE_INFOS = (
    ("olmo_core.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
)
_DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float64",
        "float32",
        "bfloat16",
        "float16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
    )
}
_MAX_BYTES = 256 << 20
# The most chunks that lie side by side, on average. No training run writes a grid of more than this squared.
_MAX_BESIDE = 128


@dataclass(frozen=True)
class ChunkLocation:
    """A block of a tensor, and the bytes of a file in which it is saved."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class TensorMetadata:
    """A tensor of the checkpoint: its dtype, its shape and its chunks."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[ChunkLocation, ...]


def read_metadata(path: str | os.PathLike) -> dict[str, TensorMetadata]:
    """Read `.metadata` without unpickling it.

    Args:
        path (`str` or `os.PathLike`): the file.

    Returns:
        `dict[str, TensorMetadata]`: the tensors by their names. Values that were saved as pickles, such as
        `optim.param_groups`, are left out.

    Raises:
        UnsafePickleError: if the file holds anything but the metadata of tensors, or is damaged.
        CheckpointError: if the file cannot be read, the chunks of a tensor overlap, leave gaps, reach beyond
            its shape or are not saved, or the file of a chunk is outside the folder.

    Example:

    ```python
    >>> import torch, torch.distributed.checkpoint as dcp
    >>> from transformers_emo.conversion import read_metadata
    >>> dcp.save({"w": torch.ones(2, 3)}, checkpoint_id=str(tmp_path / "step"), no_dist=True)
    Metadata(...)
    >>> read_metadata(tmp_path / "step" / ".metadata")["w"].shape
    (2, 3)

    ```
    """
    path = Path(path)
    try:
        data = read_small(path, _MAX_BYTES)
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {path}: {error.strerror}. Expected the folder of a torch.distributed.checkpoint."
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is larger than {_MAX_BYTES} bytes, and no metadata is: name another folder."
        ) from error
    root = read_pickle(data, _ADMITTED, source=str(path))
    try:
        tensors = _tensors(root, max_chunks=len(data))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UnsafePickleError(
            f"{path} is no metadata of tensors ({type(error).__name__}: {error}): copy it again."
        ) from error
    for name, tensor in tensors.items():
        _check_boxes(name, tensor)
    return tensors


def _tensors(root: Any, max_chunks: int) -> dict[str, TensorMetadata]:
    fields = _fields(root, "Metadata")
    locations = {}
    for key, info in _of_type(fields["storage_data"], dict).items():
        index = _fields(key, "MetadataIndex")
        offset = index.get("offset")  # there is none for values that are no tensors
        offset = None if offset is None else _sizes(offset)
        place = (_of_type(index["fqn"], str), offset)
        if place in locations:
            raise ValueError(f"a chunk of {place[0]!r} has two places")
        locations[place] = _storage(info)
    tensors = {}
    for name, record in _of_type(fields["state_dict_metadata"], dict).items():
        if _kind(record) == "BytesStorageMetadata":
            continue
        _of_type(name, str)
        entry = _fields(record, "TensorStorageMetadata")
        properties = entry["properties"]
        if _kind(properties) != "TensorProperties" or type(properties.state) is not tuple:
            raise ValueError(f"the properties of {name!r} are of an unknown kind")
        dtype, layout = dtype_of(properties.state[0]), properties.state[1]
        if layout != "torch.strided":
            raise ValueError(f"{name!r} is no dense tensor")
        chunks = []
        max_chunks -= len(_of_type(entry["chunks"], list))
        if max_chunks < 0:  # one list shared by many tensors
            raise ValueError("there are more chunks than the file has bytes")
        for chunk in entry["chunks"]:
            box = _fields(chunk, "ChunkStorageMetadata")
            offsets, sizes = _sizes(box["offsets"]), _sizes(box["sizes"])
            if (name, offsets) not in locations:
                raise ValueError(f"the chunk of {name!r} at {list(offsets)} is saved nowhere")
            chunks.append(ChunkLocation(offsets, sizes, *locations[name, offsets]))
        tensors[name] = TensorMetadata(dtype, _sizes(entry["size"]), tuple(chunks))
    return tensors


def _storage(info: Any) -> tuple[str, int, int]:
    if type(info) is not Record or (info.kind.module, info.kind.name) not in _STORAGE_INFOS:
        raise ValueError("a chunk's place is of an unknown kind")
    state = _of_type(info.state, dict)
    file = _of_type(state["relative_path"], str)
    if not file or file != os.path.basename(file) or file in (".", "..") or "\\" in file or "\0" in file:
        raise ValueError(f"a chunk is said to be in {file!r}, expected a file of the same folder")
    if state.get("transform_descriptors"):
        raise ValueError(f"chunks in {file} are compressed or encrypted, which is not supported")
    start, length = state["offset"], state["length"]
    if type(start) is not int or type(length) is not int or start < 0 or length < 0:
        raise ValueError(f"the place of a chunk in {file} is no pair of integers from 0")
    return file, start, length


def _check_boxes(name: str, tensor: TensorMetadata) -> None:
    """Check that the chunks cover each element of the tensor once."""
    shape = tensor.shape
    covered = compared = 0
    active: list[ChunkLocation] = []
    across = _most_cut(tensor)
    for chunk in sorted(tensor.chunks, key=lambda chunk: chunk.offsets[across : across + 1]):
        box = list(zip(chunk.offsets, chunk.sizes, strict=False))
        inside = len(chunk.offsets) == len(chunk.sizes) == len(shape) and all(
            offset + size <= extent for (offset, size), extent in zip(box, shape, strict=True)
        )
        if not inside:
            raise CheckpointError(
                f"A chunk of {name} begins at {list(chunk.offsets)} and is {list(chunk.sizes)} large: that "
                f"is beyond its shape {list(shape)}. Copy the checkpoint again."
            )
        covered += math.prod(chunk.sizes)
        if 0 in chunk.sizes:
            continue
        # Sorted by one dimension, so a chunk that ends before this one begins overlaps none that follows.
        active = [other for other in active if not shape or _end(other, across) > chunk.offsets[across]]
        compared += len(active)
        if compared > _MAX_BESIDE * max(len(tensor.chunks), _MAX_BESIDE):
            raise CheckpointError(
                f"{name} is cut into {len(tensor.chunks)} chunks, too many of them side by side. No training "
                "run writes that, and a search for overlaps would take very long: copy the checkpoint again."
            )
        for other in active:
            if all(
                a < b + n and b < a + m for (a, m), b, n in zip(box, other.offsets, other.sizes, strict=True)
            ):
                raise CheckpointError(
                    f"Two chunks of {name} overlap, at {list(other.offsets)} and "
                    f"{list(chunk.offsets)}. Copy the checkpoint again."
                )
        active.append(chunk)
    if covered != math.prod(shape):
        raise CheckpointError(
            f"The chunks of {name} have {covered} elements, expected {math.prod(shape)} for its shape "
            f"{list(shape)}: a part is missing. Copy the checkpoint again."
        )


def _end(chunk: ChunkLocation, dimension: int) -> int:
    return chunk.offsets[dimension] + chunk.sizes[dimension]


def _most_cut(tensor: TensorMetadata) -> int:
    """The dimension in which chunks begin at the most places. The fewest lie side by side along it."""
    begins = [len({chunk.offsets[d : d + 1] for chunk in tensor.chunks}) for d in range(len(tensor.shape))]
    return max(range(len(begins)), key=begins.__getitem__, default=0)


def _kind(record: Any) -> str:
    return record.kind.name if type(record) is Record and record.kind.module == _METADATA else ""


def _fields(record: Any, name: str) -> dict[str, Any]:
    if _kind(record) != name:
        raise ValueError(f"expected a {name}, got a {type(record).__name__}")
    return _of_type(record.state, dict)


def _of_type(value: Any, wanted: Callable[..., Any]) -> Any:
    if type(value) is not wanted:
        raise ValueError(f"expected a {getattr(wanted, '__name__', wanted)}, got a {type(value).__name__}")
    return value


def _sizes(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > 16 or any(type(n) is not int or n < 0 for n in value):
        raise ValueError("sizes and offsets must be tuples of at most 16 integers from 0")
    return value


def _size(arguments: tuple) -> tuple[int, ...]:
    if len(arguments) != 1:
        raise ValueError("a size has one argument")
    return _sizes(arguments[0])


def _layout(arguments: tuple) -> str:
    if len(arguments) != 1 or type(arguments[0]) is not str:
        raise ValueError("a layout has one name")
    return arguments[0]


def _memory_format(arguments: tuple) -> None:
    if len(arguments) != 1 or type(arguments[0]) is not int:
        raise ValueError("a memory format has one number")


def _path(arguments: tuple) -> None:
    """Where the checkpoint was saved. It is not used."""


def _refused(_: tuple) -> Any:
    raise ValueError("a dtype cannot be called")


_ADMITTED: dict[tuple[str, str], Callable[[tuple], Any] | None] = {
    **{
        (_METADATA, name): None
        for name in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "StorageMeta",
        )
    },
    **dict.fromkeys(_STORAGE_INFOS),
    (_METADATA, "_MEM_FORMAT_ENCODING"): _memory_format,
    ("torch", "Size"): _size,
    ("pathlib", "PosixPath"): _path,
    ("pathlib", "WindowsPath"): _path,
    ("pathlib._local", "PosixPath"): _path,  # Python 3.13
    ("pathlib._local", "WindowsPath"): _path,
    ("torch.serialization", "_get_layout"): _layout,
    **{("torch", name): _refused for name in _DTYPES},
}


def dtype_of(value: Any) -> torch.dtype:
    """The dtype that a name in a pickle means.

    Args:
        value (`Global`): the name, such as `torch.float32`.

    Raises:
        ValueError: if no tensor of a checkpoint can have it.

    Example:

    ```python
    >>> from transformers_emo.conversion.olmo_core.inert_pickle import Global
    >>> from transformers_emo.conversion.olmo_core.pickled_metadata import dtype_of
    >>> dtype_of(Global("torch", "bfloat16"))
    torch.bfloat16

    ```
    """
    if type(value) is not Global or value.module != "torch" or value.name not in _DTYPES:
        raise ValueError("a tensor is of an unknown dtype")
    return _DTYPES[value.name]
