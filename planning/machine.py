"""What a machine has: memory that is free, room on disks, processors and GPUs."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

PROCESS_BYTES = 450_000_000
"""Memory of Python, PyTorch and this package without weights: 434 MB on Linux, x86-64, PyTorch 2.13."""

# Where Linux says how much memory a container may have, and how much of it is taken: version 2, then 1.
_CONTAINER = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class Machine:
    """What a machine has.

    Args:
        memory (`int`): bytes of memory, or of a container's share of it.
        free_memory (`int`): bytes that programs can still have.
        processors (`int`): processors that this process may use.
        gpus (`list[int]`): the memory of each GPU in bytes.
        free_disk (`int`): bytes free where results would be written.
        free_cache (`int`): bytes free where the Hub's files are kept.

    Example: see `this_machine`.
    """

    memory: int
    free_memory: int
    processors: int
    gpus: list[int]
    free_disk: int
    free_cache: int


def this_machine(folder: str | os.PathLike = ".", cache_dir: str | os.PathLike | None = None) -> Machine:
    """What this machine has now.

    Args:
        folder (`str` or `os.PathLike`, defaults to `"."`): where results would be written.
        cache_dir (`str` or `os.PathLike`, *optional*): where downloads go; the Hub's cache by default.

    Example:

    ```python
    >>> from transformers_emo.planning import this_machine
    >>> machine = this_machine()
    >>> 0 < machine.free_memory <= machine.memory
    True

    ```
    """
    total, free = _memory()
    for limit_file, used_file in _CONTAINER:
        limit, used = _number(limit_file), _number(used_file)
        if limit is not None and limit < total:
            total = limit
            free = min(free, max(limit - (used or 0), 0))
    count = getattr(os, "process_cpu_count", None) or (lambda: len(os.sched_getaffinity(0)))
    try:
        processors = count() or 1
    except AttributeError:  # macOS before Python 3.13
        processors = os.cpu_count() or 1
    return Machine(
        memory=total,
        free_memory=free,
        processors=processors,
        gpus=_gpus(),
        free_disk=_free(folder),
        free_cache=_free(cache_dir or constants.HF_HUB_CACHE),
    )


def _memory() -> tuple[int, int]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        numbers = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        return numbers["MemTotal"], numbers["MemAvailable"]
    except (OSError, ValueError, KeyError, IndexError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total  # what is free is not known without another package


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None


def _gpus() -> list[int]:
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]


def _free(folder: str | os.PathLike) -> int:
    """Bytes free where a folder is, or would be."""
    path = Path(folder).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free
