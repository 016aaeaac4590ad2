"""The parts of writing safetensors files: sizes and dtypes, headers, the division into files, the index.

The format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ...imports.transformers_versions import private_names
from ..safetensors_header import DTYPE_NAMES

with private_names("model files"):
    from huggingface_hub.serialization._base import parse_size_to_int

_SHARD_PATTERN = SAFE_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")

Layout = tuple[torch.dtype, tuple[int, ...]]


def size_in_bytes(size: int | str, *, name: str = "max_shard_size") -> int:
    """A size as users give it, in bytes.

    Args:
        size (`int` or `str`): a number of bytes, or a string such as `"5GB"`, in powers of ten.
        name (`str`, defaults to `"max_shard_size"`): the argument's name, for the error.

    Raises:
        ValueError: if it is neither, or not above 0.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.writing.safetensors_writing import size_in_bytes
    >>> size_in_bytes("1.5GB")
    1500000000

    ```
    """
    try:
        has_unit = isinstance(size, str) and not size.strip().isdecimal()
        number = parse_size_to_int(str(size)) if has_unit else int(size)
    except (TypeError, ValueError, OverflowError):
        number = 0
    if number <= 0:
        raise ValueError(
            f"{name} is {size!r}, expected bytes, or a string such as '5GB': give a number above 0, with or "
            "without one of the units KB, MB, GB and TB."
        )
    return number


def floating_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype of floating-point numbers, as users give it.

    Args:
        dtype (`str` or `torch.dtype`): the dtype, or its name such as `"bfloat16"`.

    Raises:
        ValueError: if it is no dtype, or one of integers.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.writing.safetensors_writing import floating_dtype
    >>> floating_dtype("bfloat16")
    torch.bfloat16

    ```
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"Unknown dtype {dtype!r}, expected a name such as 'float32' or 'bfloat16'.")
    return found


def length_of(layout: Layout) -> int:
    """How many bytes a tensor of this dtype and shape has.

    Args:
        layout (`tuple[torch.dtype, tuple[int, ...]]`): the dtype and the shape.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.checkpoints.writing.safetensors_writing import length_of
    >>> length_of((torch.bfloat16, (3, 4)))
    24

    ```
    """
    dtype, shape = layout
    return math.prod(shape) * dtype.itemsize


def divide(lengths: Iterable[tuple[str, int]], max_shard_size: int) -> dict[str, list[str]]:
    """Divide tensors, in their order, into files, as `save_pretrained` does.

    Args:
        lengths (`Iterable[tuple[str, int]]`): the name of each tensor and its number of bytes.
        max_shard_size (`int`): the most bytes of tensors in one file. A larger tensor gets a file of its own.

    Returns:
        `dict[str, list[str]]`: file names, as Transformers expects them, and the tensors in them.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.writing.safetensors_writing import divide
    >>> divide([("a", 16), ("b", 8), ("c", 8)], 16)["model-00002-of-00002.safetensors"]
    ['b', 'c']

    ```
    """
    split = split_state_dict_into_shards_factory(
        dict(lengths),
        get_storage_size=lambda length: length,
        filename_pattern=_SHARD_PATTERN,
        max_shard_size=max_shard_size,
    )
    return split.filename_to_tensors


def header_of(tensors: Mapping[str, Layout]) -> bytes:
    """The header of a safetensors file that holds these tensors, one after the other.

    Args:
        tensors (`Mapping[str, tuple[torch.dtype, tuple[int, ...]]]`): their dtypes and shapes.

    Example:

    ```python
    >>> import torch
    >>> from safetensors.torch import load
    >>> from transformers_emo.checkpoints.writing.safetensors_writing import header_of
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
    """The header of a safetensors file, from its JSON object. It is padded so that tensors are aligned.

    Args:
        entries (`Mapping[str, Any]`): the JSON object.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.writing.safetensors_writing import encode_header
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
    """Write the index of a checkpoint with several files. A single file needs none.

    Args:
        folder (`str` or `os.PathLike`): the folder of the files.
        shards (`Mapping[str, Sequence[str]]`): from `divide`.
        tensors (`Mapping[str, tuple[torch.dtype, tuple[int, ...]]]`): dtypes and shapes.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.checkpoints.writing.safetensors_writing import write_index
    >>> write_index(tmp_path, {"1.safetensors": ["a"], "2.safetensors": ["b"]},
    ...             dict.fromkeys("ab", (torch.float32, (2,))))
    >>> (tmp_path / "model.safetensors.index.json").is_file()
    True

    ```
    """
    if len(shards) > 1:
        write_json(Path(folder, SAFE_WEIGHTS_INDEX_NAME), index_of(shards, tensors))


def index_of(shards: Mapping[str, Sequence[str]], tensors: Mapping[str, Layout]) -> dict[str, Any]:
    """What the index of a checkpoint with several files says.

    Args:
        shards (`Mapping[str, Sequence[str]]`): from `divide`.
        tensors (`Mapping[str, tuple[torch.dtype, tuple[int, ...]]]`): dtypes and shapes.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.checkpoints.writing.safetensors_writing import index_of
    >>> index_of({"1.safetensors": ["a"]}, {"a": (torch.float32, (2,))})["metadata"]
    {'total_parameters': 2, 'total_size': 8}

    ```
    """
    return {
        "metadata": {
            "total_parameters": sum(math.prod(shape) for _, shape in tensors.values()),
            "total_size": sum(map(length_of, tensors.values())),
        },
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }


def written_bytes(tensors: Mapping[str, Layout], max_shard_size: int) -> int:
    """How long the files of some tensors will be together: their headers, bytes and index.

    Args:
        tensors (`Mapping[str, tuple[torch.dtype, tuple[int, ...]]]`): dtypes and shapes.
        max_shard_size (`int`): as for `divide`.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.checkpoints.writing.safetensors_writing import header_of, written_bytes
    >>> tensors = {"a": (torch.float32, (2,))}
    >>> written_bytes(tensors, 100) == len(header_of(tensors)) + 8
    True

    ```
    """
    shards = divide(((name, length_of(layout)) for name, layout in tensors.items()), max_shard_size)
    headers = (len(header_of({name: tensors[name] for name in names})) for names in shards.values())
    index = len(_json_text(index_of(shards, tensors)).encode()) if len(shards) > 1 else 0
    return sum(map(length_of, tensors.values())) + sum(headers) + index


def write_json(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Write a JSON file in the form that Transformers writes.

    Args:
        path (`str` or `os.PathLike`): the file.
        content (`dict`): the JSON object.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.writing.safetensors_writing import write_json
    >>> write_json(tmp_path / "a.json", {"a": 1})
    >>> (tmp_path / "a.json").read_text()
    '{\\n  "a": 1\\n}\\n'

    ```
    """
    Path(path).write_text(_json_text(content), encoding="utf-8")


def _json_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
