"""Tensors that are pages of their files: pieces of files side by side in memory, without a copy.

The system gives new memory page by page. It clears each page, and then the page is written to. That takes
longer than reading a file that the system has in memory already. Here the system's own pages of the file
become the tensor.

A piece of a file can begin anywhere in a page. But matrices are whole pages long, so all those of a file
begin at the same place in a page. A stacked parameter begins at this place too. The pages of its experts are
mapped one expert after the other. Only the page in which two experts meet is read, and filled from both.

A page that is written to is copied first (`MAP_PRIVATE`). So files never change, and training works. Other
pages need no memory of their own: processes share them, and the system may drop them and read them again.

Nothing is read while a model is loaded but what cannot be mapped. A page is read when it is first used: of a
model of experts, those that tokens take.

If a program shortens such a file in place, or the disk fails, the process that uses it ends (`SIGBUS`). A
file that is replaced by another one stays as it was for this process. There is a price: the pages of a file
lie scattered over memory, which was read at three quarters of the speed of other memory.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch

from ..errors import CheckpointError
from ..safetensors_header import TensorSpan
from .large_pages import c_library

PAGE = mmap.PAGESIZE
LEAST_BYTES = 512 << 10  # shorter pieces are read: each would need up to two mappings
# Constants that Python's `mmap` does not have.
_MAP_FIXED, _MAP_FAILED = 0x10, ctypes.c_void_p(-1).value

_mappings = 0
_lock = threading.RLock()  # reentrant: a finalizer may run in a thread that holds it


class _Folder(Protocol):
    """The part of `LocalFiles` that is used here."""

    folder: Path

    def opened(self, file: str) -> AbstractContextManager[int]: ...

    def read_into(self, file: str, start: int, buffer: memoryview) -> None: ...


def map_spans(files: _Folder, spans: Sequence[TensorSpan]) -> torch.Tensor | None:
    """The bytes of parts of files as one tensor, most of it pages of these files.

    Pages are read from the disk when they are first used.

    Args:
        files (`LocalFiles`): the folder of the files.
        spans (`Sequence[TensorSpan]`): the parts, of one dtype.

    Returns:
        `torch.Tensor`, *optional*: a tensor of that dtype with one dimension. `None` if it is better to read
        the parts: they are short, begin at different places in a page, or cannot be mapped on this system.

    Raises:
        CheckpointError: if a file cannot be opened or ends too early.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.checkpoint import Checkpoint
    >>> from transformers_emo.checkpoints.local_files import LocalFiles
    >>> from transformers_emo.checkpoints.memory.mapped_files import map_spans
    >>> files = LocalFiles("model_cards/toy-emo")
    >>> checkpoint = Checkpoint.from_files(files.folder, ["model.safetensors"], files)
    >>> map_spans(files, [checkpoint.tensors["model.norm.weight"]]) is None  # 512 bytes
    True

    ```
    """
    if not sys.platform.startswith("linux") or sys.maxsize < 2**32:
        return None
    runs = _merged(spans)
    shift = _place_in_page(runs)
    if shift is None or shift % spans[0].dtype.itemsize or not _reserve(2 * len(runs)):
        return None
    total = sum(run.end - run.start for run in runs)
    try:
        block = mmap.mmap(-1, shift + total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # not enough memory: PyTorch's own error says so
        _release(2 * len(runs))
        return None
    memory = (ctypes.c_char * len(block)).from_buffer(block)
    # The tensor keeps `memory` alive, and `memory` the block. With the block all its mappings end.
    weakref.finalize(memory, _release, 2 * len(runs)).atexit = False
    view, place = memoryview(block), shift
    for run in runs:
        end = place + run.end - run.start
        first, last = -(-place // PAGE) * PAGE, end // PAGE * PAGE
        if (run.start - place) % PAGE or last - first < LEAST_BYTES:
            files.read_into(run.file, run.start, view[place:end])
        else:
            offset = run.start + first - place
            with files.opened(run.file) as descriptor:
                if os.fstat(descriptor).st_size < run.end:  # using a page behind the end ends the process
                    raise CheckpointError(
                        f"{files.folder / run.file} ends before byte {run.end}: it was cut short meanwhile. "
                        "Load it again when it is whole."
                    )
                if not _map(descriptor, offset, ctypes.addressof(memory) + first, last - first):
                    return None
            files.read_into(run.file, run.start, view[place:first])
            files.read_into(run.file, offset + last - first, view[last:end])
        place = end
    return torch.frombuffer(
        memory, dtype=spans[0].dtype, offset=shift, count=total // spans[0].dtype.itemsize
    )


def _merged(spans: Sequence[TensorSpan]) -> list[TensorSpan]:
    """Join parts that follow each other in a file."""
    runs: list[TensorSpan] = []
    for span in spans:
        start = span.start
        if runs and runs[-1].file == span.file and runs[-1].end == start:
            start = runs.pop().start
        runs.append(TensorSpan(span.file, start, span.end, span.dtype, ()))
    return runs


def _place_in_page(runs: Sequence[TensorSpan]) -> int | None:
    """Where in a page the tensor has to begin so that most of it can be mapped."""
    bytes_at: Counter[int] = Counter()
    place = 0
    for run in runs:
        if run.end - run.start >= LEAST_BYTES:
            bytes_at[(run.start - place) % PAGE] += run.end - run.start
        place += run.end - run.start
    shift, mapped = max(bytes_at.items(), key=lambda item: item[1], default=(None, 0))
    return shift if 2 * mapped > place else None


def _map(descriptor: int, offset: int, address: int, length: int) -> bool:
    """Map pages of a file at an address. `False` if they cannot be mapped."""
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED
    return c_library().mmap(address, length, protection, flags, descriptor, offset) != _MAP_FAILED


def _reserve(count: int) -> bool:
    """Whether the process may have so many more mappings. Half of those allowed are left to other code."""
    global _mappings
    try:
        most = int(Path("/proc/sys/vm/max_map_count").read_text()) // 2
    except (OSError, ValueError):
        most = 30_000
    with _lock:
        if _mappings + count > most:
            return False
        _mappings += count
        return True


def _release(count: int) -> None:
    global _mappings
    with _lock:
        _mappings -= count
