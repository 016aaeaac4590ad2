"""Writing a safetensors checkpoint tensor by tensor. Each file's header comes first: it needs shapes only."""

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

from .safetensors_writing import divide, encode_header, header_of, write_index

_HASH_BYTES = 1 << 20  # stays in the processor's cache


@dataclass(frozen=True)
class PlannedTensor:
    """The name and shape of a tensor that will be written."""

    name: str
    shape: tuple[int, ...]


def plan_shards(
    tensors: Iterable[PlannedTensor], dtype: torch.dtype, max_shard_size: int
) -> dict[str, list[PlannedTensor]]:
    """Divide tensors, in their order, into files, as `save_pretrained` does.

    Args:
        tensors (`Iterable[PlannedTensor]`): all tensors.
        dtype (`torch.dtype`): the dtype in which they will be written.
        max_shard_size (`int`): the most bytes of tensors in one file. A larger tensor gets a file of its own.

    Returns:
        `dict[str, list[PlannedTensor]]`: file names, as Transformers expects them, and their tensors.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.checkpoints.writing.tensor_writer import PlannedTensor, plan_shards
    >>> list(plan_shards([PlannedTensor("a", (4,)), PlannedTensor("b", (4,))], torch.float32, 16))
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']

    ```
    """
    planned = {tensor.name: tensor for tensor in tensors}
    lengths = ((name, math.prod(tensor.shape) * dtype.itemsize) for name, tensor in planned.items())
    shards = divide(lengths, max_shard_size)
    return {file: [planned[name] for name in names] for file, names in shards.items()}


def write_checkpoint(
    folder: Path,
    shards: dict[str, list[PlannedTensor]],
    dtype: torch.dtype,
    write: Callable[[str, int, int], None],
    *,
    done: Callable[[], object] | None = None,
    threads: int | None = None,
) -> dict[str, str]:
    """Write the files that `plan_shards` planned, and their index if there are several.

    Args:
        folder (`Path`): the folder to write to.
        shards (`dict[str, list[PlannedTensor]]`): from `plan_shards`.
        dtype (`torch.dtype`): the dtype of the tensors.
        write (`Callable[[str, int, int], None]`): writes one tensor. It gets the tensor's name, the
            descriptor of an open file and the byte at which the tensor begins, and must write all bytes of
            the tensor and no others. It is called from several threads.
        done (`Callable[[], object]`, *optional*): called after each tensor.
        threads (`int`, *optional*): how many threads write; by default one for each processor, at most 8.

    Returns:
        `dict[str, str]`: the SHA-256 of each file of tensors, of the bytes read back from it.

    Raises:
        Whatever `write` raises. No further tensor is begun then.

    Example:

    ```python
    >>> import os, struct, torch
    >>> from safetensors.torch import load_file
    >>> from transformers_emo.checkpoints.writing.tensor_writer import *
    >>> shards = plan_shards([PlannedTensor("a", (2,))], torch.float32, 100)
    >>> def write(name, descriptor, offset):
    ...     os.pwrite(descriptor, struct.pack("<2f", 1, 2), offset)
    >>> hashes = write_checkpoint(tmp_path, shards, torch.float32, write)
    >>> load_file(tmp_path / "model.safetensors")
    {'a': tensor([1., 2.])}

    ```
    """
    threads = threads or min(8, os.cpu_count() or 1)
    # Hashing takes about as long as copying. It runs at the same time, and reads from the page cache.
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
                header = header_of({tensor.name: (dtype, tensor.shape) for tensor in planned})
                position = os.pwrite(descriptor, header, 0)
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
            stopped.set()  # jobs that run now end by themselves, jobs that wait do nothing
            raise
    layouts = {tensor.name: (dtype, tensor.shape) for planned in shards.values() for tensor in planned}
    write_index(folder, {file: [t.name for t in planned] for file, planned in shards.items()}, layouts)
    return hashes


def _hash_behind(descriptor: int, ends: list[tuple[int, Future]]) -> str:
    """Hash a file from its beginning, each tensor once it is written. A file that ends early is an error."""
    digest = hashlib.sha256()
    buffer = bytearray(_HASH_BYTES)
    position = 0
    for end, written in ends:
        written.result()
        while position < end:
            view = memoryview(buffer)[: min(len(buffer), end - position)]
            got = os.preadv(descriptor, [view], position)
            if got == 0:
                raise OSError(f"A file of weights ends at byte {position}, expected {end}: check the disk.")
            digest.update(view[:got])
            position += got
    return digest.hexdigest()


def rename_tensors(source: Path, target: Path, names: dict[str, str]) -> None:
    """Copy a safetensors file, and give its tensors other names. Their bytes stay as they are.

    Args:
        source (`Path`): the file.
        target (`Path`): the new file. It must not exist.
        names (`dict[str, str]`): the new names of tensors by their old names. Others keep theirs.

    Example:

    ```python
    >>> import torch
    >>> from safetensors.torch import load_file, save_file
    >>> from transformers_emo.checkpoints.writing.tensor_writer import rename_tensors
    >>> save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    >>> rename_tensors(tmp_path / "a.safetensors", tmp_path / "b.safetensors", {"a": "b"})
    >>> load_file(tmp_path / "b.safetensors")
    {'b': tensor([1., 1.])}

    ```
    """
    with open(source, "rb") as old, open(target, "xb") as new:
        (length,) = struct.unpack("<Q", old.read(8))
        header = json.loads(old.read(length))
        new.write(encode_header({names.get(name, name): entry for name, entry in header.items()}))
        shutil.copyfileobj(old, new, 16 << 20)
