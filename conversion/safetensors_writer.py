"""Writes a safetensors checkpoint tensor by tensor: each file's header first, from shapes alone.

The format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_HASH_BYTES = 1 << 20  # stays in the processor's cache


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
    folder: Path,
    shards: dict[str, list[PlannedTensor]],
    dtype: torch.dtype,
    write: Callable[[str, int, int], None],
    *,
    done: Callable[[], object] | None = None,
    threads: int | None = None,
) -> dict[str, str]:
    """Write planned files, and their index if there are several.

    Args:
        folder (`Path`): where to.
        shards (`dict[str, list[PlannedTensor]]`): what `plan_shards` gave.
        dtype (`torch.dtype`): what tensors are in.
        write (`Callable[[str, int, int], None]`): writes the tensor of a name to an open file, given by its
            descriptor, from a byte of it on: all its bytes, and no others. Called from several threads.
        done (`Callable[[], object]`, *optional*): called after each tensor.
        threads (`int`, *optional*): threads that write; one a processor by default, at most 8.

    Returns:
        `dict[str, str]`: the SHA-256 of each file of tensors, taken of what is in the files.

    Raises:
        Whatever `write` raises; no further tensor is begun then.

    Example:

    ```python
    >>> import os, struct, torch
    >>> from safetensors.torch import load_file
    >>> from transformers_emo.conversion.safetensors_writer import *
    >>> shards = plan_shards([PlannedTensor("a", (2,))], torch.float32, 100)
    >>> def write(name, descriptor, offset):
    ...     os.pwrite(descriptor, struct.pack("<2f", 1, 2), offset)
    >>> hashes = write_checkpoint(tmp_path, shards, torch.float32, write)
    >>> load_file(tmp_path / "model.safetensors")
    {'a': tensor([1., 2.])}

    ```
    """
    threads = threads or min(8, os.cpu_count() or 1)
    # Hashing takes about as long as copying: it goes on beside it, file by file, from the page cache.
    with (
        ExitStack() as files,
        ThreadPoolExecutor(threads) as writers,
        ThreadPoolExecutor(min(threads, 4)) as hashers,
    ):
        hashing, writing = {}, []
        stopped = threading.Event()

        def guarded(name: str, descriptor: int, offset: int) -> None:
            if not stopped.is_set():
                write(name, descriptor, offset)

        try:
            for file, planned in shards.items():
                descriptor = os.open(folder / file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
                files.callback(os.close, descriptor)
                position = os.pwrite(descriptor, _header(planned, dtype), 0)
                ends = []
                for tensor in planned:
                    job = writers.submit(guarded, tensor.name, descriptor, position)
                    position += math.prod(tensor.shape) * dtype.itemsize
                    ends.append((position, job))
                writing += [job for _, job in ends]
                hashing[file] = hashers.submit(_hash_behind, descriptor, ends)
            for job in writing:
                job.result()
                if done is not None:
                    done()
            hashes = {file: job.result() for file, job in hashing.items()}
        except BaseException:
            stopped.set()  # what is under way ends, what waits does nothing
            raise
    if len(shards) > 1:
        numel = sum(math.prod(tensor.shape) for planned in shards.values() for tensor in planned)
        index = {
            "metadata": {"total_parameters": numel, "total_size": numel * dtype.itemsize},
            "weight_map": {tensor.name: file for file, planned in shards.items() for tensor in planned},
        }
        write_json(folder / "model.safetensors.index.json", index)
    return hashes


def _hash_behind(descriptor: int, ends: list[tuple[int, Future]]) -> str:
    """Hash a file in its order, behind those who write it. A file that ends too early is an error."""
    digest = hashlib.sha256()
    buffer = bytearray(_HASH_BYTES)
    position = 0
    for end, written in ends:
        written.result()
        while position < end:
            view = memoryview(buffer)[: min(len(buffer), end - position)]
            got = os.preadv(descriptor, [view], position)
            if got == 0:
                raise OSError(f"A file of weights ends at byte {position}, expected {end}.")
            digest.update(view[:got])
            position += got
    return digest.hexdigest()


def rename_tensors(source: Path, target: Path, names: dict[str, str]) -> None:
    """Copy a safetensors file under other names; the tensors' bytes are copied as they are.

    Args:
        source (`Path`): the file.
        target (`Path`): the new one.
        names (`dict[str, str]`): the new name of each tensor.

    Example:

    ```python
    >>> import torch
    >>> from safetensors.torch import load_file, save_file
    >>> from transformers_emo.conversion.safetensors_writer import rename_tensors
    >>> save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    >>> rename_tensors(tmp_path / "a.safetensors", tmp_path / "b.safetensors", {"a": "b"})
    >>> load_file(tmp_path / "b.safetensors")
    {'b': tensor([1., 1.])}

    ```
    """
    with open(source, "rb") as old, open(target, "xb") as new:
        (length,) = struct.unpack("<Q", old.read(8))
        header = json.loads(old.read(length))
        new.write(_encoded({names.get(name, name): entry for name, entry in header.items()}))
        shutil.copyfileobj(old, new, 16 << 20)


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
    return _encoded(entries)


def _encoded(entries: dict[str, dict]) -> bytes:
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
