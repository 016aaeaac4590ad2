"""Writes a safetensors checkpoint tensor by tensor: each file's header first, from shapes alone.

The format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]


def plan_shards(
    tensors: Iterable[PlannedTensor], dtype: torch.dtype, max_shard_size: int
) -> dict[str, list[PlannedTensor]]:
    """Divide tensors, in their order, into files.

    Args:
        tensors (`Iterable[PlannedTensor]`): all tensors.
        dtype (`torch.dtype`): what they will be written in.
        max_shard_size (`int`): bytes of tensors in one file; a larger tensor has a file of its own.

    Returns:
        `dict[str, list[PlannedTensor]]`: file names, as Transformers expects them, and their tensors.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.conversion.safetensors_writer import PlannedTensor, plan_shards
    >>> list(plan_shards([PlannedTensor("a", (4,)), PlannedTensor("b", (4,))], torch.float32, 16))
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']

    ```
    """
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        length = math.prod(tensor.shape) * dtype.itemsize
        if shards[-1] and size + length > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += length
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }


def write_checkpoint(
    folder: Path, shards: dict[str, list[PlannedTensor]], dtype: torch.dtype, tensors: Iterator[torch.Tensor]
) -> dict[str, str]:
    """Write planned files, and their index if there are several.

    Args:
        folder (`Path`): where to.
        shards (`dict[str, list[PlannedTensor]]`): what `plan_shards` gave.
        dtype (`torch.dtype`): what tensors are converted to.
        tensors (`Iterator[torch.Tensor]`): the tensors, in the order of the plan; two are held at most.

    Returns:
        `dict[str, str]`: the SHA-256 of each file of tensors.

    Raises:
        ValueError: if a tensor is not of the shape planned, or there are fewer or more than planned.

    Example:

    ```python
    >>> import torch
    >>> from safetensors.torch import load_file
    >>> from transformers_emo.conversion.safetensors_writer import *
    >>> shards = plan_shards([PlannedTensor("a", (2,))], torch.float32, 100)
    >>> hashes = write_checkpoint(tmp_path, shards, torch.float32, iter([torch.ones(2)]))
    >>> load_file(tmp_path / "model.safetensors")
    {'a': tensor([1., 1.])}

    ```
    """
    hashes = {}
    for file, planned in shards.items():
        digest = hashlib.sha256()
        hashed: Future | None = None
        # Hashing takes as long as reading and writing: it goes on beside them.
        with open(folder / file, "xb") as out, ThreadPoolExecutor(1) as hasher:
            header = _header(planned, dtype)
            out.write(header)
            digest.update(header)
            for expected in planned:
                tensor = next(tensors, None)
                if tensor is None or tuple(tensor.shape) != expected.shape:
                    got = "nothing" if tensor is None else list(tensor.shape)
                    raise ValueError(f"{expected.name} should be of shape {list(expected.shape)}, got {got}.")
                data = tensor.to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data
                if hashed is not None:
                    hashed.result()
                hashed = hasher.submit(digest.update, data)
                out.write(data)
        hashes[file] = digest.hexdigest()
    if next(tensors, None) is not None:
        raise ValueError("There are more tensors than planned.")
    if len(shards) > 1:
        numel = sum(math.prod(tensor.shape) for planned in shards.values() for tensor in planned)
        index = {
            "metadata": {"total_parameters": numel, "total_size": numel * dtype.itemsize},
            "weight_map": {tensor.name: file for file, planned in shards.items() for tensor in planned},
        }
        write_json(folder / "model.safetensors.index.json", index)
    return hashes


def write_json(path: str | os.PathLike, content: dict) -> None:
    """Write a JSON file as Transformers does.

    Args:
        path (`str` or `os.PathLike`): the file.
        content (`dict`): what it holds.

    Example:

    ```python
    >>> from transformers_emo.conversion.safetensors_writer import write_json
    >>> write_json(tmp_path / "a.json", {"a": 1})
    >>> (tmp_path / "a.json").read_text()
    '{\\n  "a": 1\\n}\\n'

    ```
    """
    Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _header(planned: list[PlannedTensor], dtype: torch.dtype) -> bytes:
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in planned:
        end = position + math.prod(tensor.shape) * dtype.itemsize
        entries[tensor.name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
