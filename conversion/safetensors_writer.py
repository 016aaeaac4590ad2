"""Writes a safetensors checkpoint tensor by tensor: each file's header first, from shapes alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ..subsets.safetensors_files import divide, header_of, write_index


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
    planned = {tensor.name: tensor for tensor in tensors}
    lengths = ((name, math.prod(tensor.shape) * dtype.itemsize) for name, tensor in planned.items())
    shards = divide(lengths, max_shard_size)
    return {file: [planned[name] for name in names] for file, names in shards.items()}


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
            header = header_of({tensor.name: (dtype, tensor.shape) for tensor in planned})
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
    layouts = {tensor.name: (dtype, tensor.shape) for planned in shards.values() for tensor in planned}
    write_index(folder, {file: [t.name for t in planned] for file, planned in shards.items()}, layouts)
    return hashes
