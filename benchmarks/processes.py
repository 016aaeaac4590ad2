"""Processes of benchmarks: how large they grow, what they read, and parts in one of their own.

It needs no package, so that another Python with other packages can use it too.
"""

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path


def kernel_count(file: str, name: str) -> int:
    """A number that Linux keeps for this process."""
    lines = Path("/proc/self", file).read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name)))


def peak_bytes() -> int:
    """Largest resident size so far. Not `ru_maxrss`, which a child process inherits from its parent."""
    return kernel_count("status", "VmHWM") * 1024


def disk_bytes() -> int:
    """Bytes that the kernel has fetched from storage for this process."""
    return kernel_count("io", "read_bytes")


def resident(*, peak: bool, forget: bool = False) -> float:
    """Megabytes of the process in memory; with `peak` the most since they were last forgotten.

    Not a number where there is no Linux to ask.
    """
    try:
        if forget:
            with suppress(AttributeError):  # another C library
                ctypes.CDLL(None).malloc_trim(0)  # what was freed before would hide what is taken now
            Path("/proc/self/clear_refs").write_text("5")
        return kernel_count("status", "VmHWM" if peak else "VmRSS") * 1024 / 1e6
    except OSError:
        return float("nan")


def peak_megabytes(call: Callable[[], object]) -> float:
    """How far the process grows during a call."""
    gc.collect()
    before = resident(peak=False, forget=True)
    call()
    return resident(peak=True) - before


def in_own_process(script: str, arguments: Iterable[object]) -> dict:
    """Run a benchmark with other arguments, in a process of its own; the last line it prints, as JSON."""
    command = [sys.executable, script, *map(str, arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])
