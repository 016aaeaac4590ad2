"""Reading the headers of safetensors files, and the index of a model with several files.

Both may come from strangers: anything wrong with them is a `CheckpointError`.

The format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from .errors import CheckpointError
from .small_files import parse_json, read_json

DTYPES = {
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
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class TensorSpan:
    """Where a tensor lies: bytes `start` to `end` of `file`, with its dtype and shape."""

    file: str
    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Source(Protocol):
    """Something that gives the bytes of a checkpoint's files: a folder, or a repository of the Hub."""

    def size(self, file: str) -> int:
        """The size of a file in bytes. Raises `CheckpointError` if there is no such file."""

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of a file from `start`. Raises `CheckpointError` if it cannot."""

    def close(self) -> None:
        """Close open files."""


def read_header(source: Source, file: str) -> dict[str, TensorSpan]:
    """Read where the tensors of a safetensors file lie. They must fill the file to its last byte.

    Args:
        source (`Source`): gives the file's size and its first bytes.
        file (`str`): the file's name.

    Raises:
        CheckpointError: if the header is damaged, or the file is not as long as the header says.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.local_files import LocalFiles
    >>> from transformers_emo.checkpoints.safetensors_header import read_header
    >>> read_header(LocalFiles("model_cards/toy-emo"), "model.safetensors")["model.norm.weight"].shape
    (128,)

    ```
    """
    header, size, length = _read_json(source, file)
    try:
        header.pop("__metadata__", None)
        spans = {name: _span(file, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{file} has a damaged safetensors header ({type(error).__name__}: {error}): download it again."
        ) from error
    position = 8 + length
    for name, span in sorted(spans.items(), key=lambda item: (item[1].start, item[1].end)):
        if span.start != position:
            raise CheckpointError(
                f"{file} has a damaged header: {name} should begin at byte {position}, not "
                f"{span.start}. Download it again."
            )
        position = span.end
    if position != size:
        raise CheckpointError(
            f"{file} is {size} bytes long, expected {position}: it is cut short or damaged, download it "
            "again."
        )
    return spans


def read_metadata(source: Source, file: str) -> dict[str, str]:
    """Read what a safetensors file says of itself.

    Args:
        source (`Source`): gives the file's size and its first bytes.
        file (`str`): the file's name.

    Returns:
        `dict[str, str]`: its `__metadata__`, empty if it has none.

    Raises:
        CheckpointError: if the header is damaged.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.local_files import LocalFiles
    >>> from transformers_emo.checkpoints.safetensors_header import read_metadata
    >>> read_metadata(LocalFiles("model_cards/toy-emo"), "model.safetensors")
    {'format': 'pt'}

    ```
    """
    metadata = _read_json(source, file)[0].get("__metadata__") or {}
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{file} has damaged metadata: expected names and texts. Download it again.")
    return metadata


def _read_json(source: Source, file: str) -> tuple[dict, int, int]:
    """The header of a file as it is written, the file's size, and the length of the header."""
    size = source.size(file)
    if size < 8:
        raise CheckpointError(
            f"{file} is {size} bytes long, too short for a safetensors file: download it again."
        )
    prefix = bytearray(8)
    source.read_into(file, 0, memoryview(prefix))
    (length,) = struct.unpack("<Q", prefix)
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{file} is damaged or no safetensors file: its header would be {length} bytes long, and the "
            f"file has {size}. Download it again."
        )
    raw = bytearray(length)
    source.read_into(file, 8, memoryview(raw))
    try:
        header = parse_json(raw.decode("utf-8"))
        if not isinstance(header, dict):
            raise ValueError(f"expected an object, got a {type(header).__name__}")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} has a damaged safetensors header ({type(error).__name__}: {error}): download it again."
        ) from error
    return header, size, length


def _span(file: str, entry: dict, data_start: int) -> TensorSpan:
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise ValueError(f"dtype {entry['dtype']!r} is not one of {', '.join(DTYPES)}")
    shape = tuple(entry["shape"])
    start, end = entry["data_offsets"]
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, start, end)):
        raise ValueError(f"shape {shape} and offsets {(start, end)} must be integers from 0 to 2^63")
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"offsets {(start, end)} do not fit shape {shape} of {dtype}")
    return TensorSpan(file, data_start + start, data_start + end, dtype, shape)


def read_index(path: Path) -> dict[str, str]:
    """Read the weight map of an index: for each tensor the file that it is in.

    Args:
        path (`Path`): the index, `model.safetensors.index.json`.

    Raises:
        CheckpointError: if it is damaged, or names a file outside its own folder or one that is not
            safetensors.

    Example:

    ```python
    >>> import json
    >>> from transformers_emo.checkpoints.safetensors_header import read_index
    >>> index = tmp_path / "model.safetensors.index.json"
    >>> _ = index.write_text(json.dumps({"weight_map": {"norm.weight": "a.safetensors"}}))
    >>> read_index(index)
    {'norm.weight': 'a.safetensors'}

    ```
    """
    try:
        weight_map = read_json(path, MAX_HEADER_BYTES)["weight_map"]
        pairs = weight_map.items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"The index {path} is damaged ({type(error).__name__}: {error}): download it again."
        ) from error
    folder = Path(os.path.abspath(path.parent))  # links are not followed: the shards may be links
    for name, file in pairs:
        if not isinstance(file, str) or not file or re.search(r"[\0\r\n]", file):
            raise CheckpointError(
                f"The index {path} names no file for {name}: expected a file name, got {file!r}. "
                "Download it again."
            )
        inside = os.path.normpath(folder / file)
        if os.path.isabs(file) or os.path.commonpath([folder, inside]) != str(folder):
            raise CheckpointError(
                f"The index {path} names {file!r}, a file outside its folder: refused. Get the model from a "
                "source that you trust."
            )
        if not file.endswith(".safetensors"):
            raise CheckpointError(
                f"The index {path} names {file!r}, which is not a safetensors file: convert the weights to "
                "safetensors."
            )
    return weight_map
