"""Safetensors files, written by their parts: headers, the division into shards, the index.

The format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .safetensors_header import DTYPE_NAMES

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

Layout = tuple[torch.dtype, tuple[int, ...]]


def size_in_bytes(size: int | str, *, name: str = "max_shard_size") -> int:
    """A size as users give it, in bytes.

    Args:
        size (`int` or `str`): bytes, or a string such as `"5GB"` or `"300MiB"`.
        name (`str`, defaults to `"max_shard_size"`): what it is the size of, for the error.

    Raises:
        ValueError: if it is neither, or not above 0.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.safetensors_writing import size_in_bytes
    >>> size_in_bytes("1.5GB")
    1500000000

    ```
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMG]I?B)\s*", str(size).upper())
    try:
        number = int(float(match[1]) * _UNITS[match[2]]) if match else int(size)
    except ValueError:
        number = 0
    if number <= 0:
        raise ValueError(f"{name} is {size!r}, expected bytes, or a string such as '5GB'.")
    return number


def floating_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype as users give it.

    Args:
        dtype (`str` or `torch.dtype`): the dtype, or its name such as `"bfloat16"`.

    Raises:
        ValueError: if it is none, or none of floating point.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.safetensors_writing import floating_dtype
    >>> floating_dtype("bfloat16")
    torch.bfloat16

    ```
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"Unknown dtype {dtype!r}, expected a name such as 'float32' or 'bfloat16'.")
    return found


def length_of(layout: Layout) -> int:
    """Bytes of a tensor of this dtype and shape.

    Args:
        layout (`tuple[torch.dtype, tuple[int, ...]]`): the dtype and the shape.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.checkpoints.safetensors_writing import length_of
    >>> length_of((torch.bfloat16, (3, 4)))
    24

    ```
    """
    dtype, shape = layout
    return math.prod(shape) * dtype.itemsize


def divide(lengths: Iterable[tuple[str, int]], max_shard_size: int) -> dict[str, list[str]]:
    """Divide tensors, in their order, into files.

    Args:
        lengths (`Iterable[tuple[str, int]]`): names of tensors and their bytes.
        max_shard_size (`int`): bytes of tensors in one file; a larger tensor has a file of its own.

    Returns:
        `dict[str, list[str]]`: file names, as Transformers expects them, and the tensors in them.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.safetensors_writing import divide
    >>> divide([("a", 16), ("b", 8), ("c", 8)], 16)["model-00002-of-00002.safetensors"]
    ['b', 'c']

    ```
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, length in lengths:
        if shards[-1] and size + length > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += length
    if len(shards) == 1:
        return {SAFE_WEIGHTS_NAME: shards[0]}
    stem = SAFE_WEIGHTS_NAME.removesuffix(".safetensors")
    return {
        f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }


def header_of(tensors: Mapping[str, Layout]) -> bytes:
    """The beginning of a safetensors file that holds these tensors, one after the other.

    Args:
        tensors (`Mapping[str, tuple[torch.dtype, tuple[int, ...]]]`): their dtypes and shapes.

    Example:

    ```python
    >>> import torch
    >>> from safetensors.torch import load
    >>> from transformers_emo.checkpoints.safetensors_writing import header_of
    >>> load(header_of({"a": (torch.float32, (1,))}) + bytes(4))
    {'a': tensor([0.])}

    ```
    """
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + length_of((dtype, shape))
        entries[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    return encode_header(entries)


def encode_header(entries: Mapping[str, Any]) -> bytes:
    """The beginning of a safetensors file, given its JSON object; padded so that tensors are aligned.

    Args:
        entries (`Mapping[str, Any]`): the object.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.safetensors_writing import encode_header
    >>> encode_header({})
    b'\\x08\\x00\\x00\\x00\\x00\\x00\\x00\\x00{}      '

    ```
    """
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_index(
    folder: str | os.PathLike, shards: Mapping[str, Sequence[str]], tensors: Mapping[str, Layout]
) -> None:
    """Write the index of a checkpoint of several files; a single file needs none.

    Args:
        folder (`str` or `os.PathLike`): where the files are.
        shards (`Mapping[str, Sequence[str]]`): from `divide`.
        tensors (`Mapping[str, tuple[torch.dtype, tuple[int, ...]]]`): dtypes and shapes.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.checkpoints.safetensors_writing import write_index
    >>> write_index(tmp_path, {"1.safetensors": ["a"], "2.safetensors": ["b"]},
    ...             dict.fromkeys("ab", (torch.float32, (2,))))
    >>> (tmp_path / "model.safetensors.index.json").is_file()
    True

    ```
    """
    if len(shards) < 2:
        return
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(shape) for _, shape in tensors.values()),
            "total_size": sum(map(length_of, tensors.values())),
        },
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    write_json(Path(folder, SAFE_WEIGHTS_INDEX_NAME), index)


def write_json(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Write a JSON file as Transformers does.

    Args:
        path (`str` or `os.PathLike`): the file.
        content (`dict`): what it holds.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.safetensors_writing import write_json
    >>> write_json(tmp_path / "a.json", {"a": 1})
    >>> (tmp_path / "a.json").read_text()
    '{\\n  "a": 1\\n}\\n'

    ```
    """
    Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
