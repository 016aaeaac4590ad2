"""Memory for large gradients, kept from one backward pass to the next.

A block's experts have gradients of gigabytes. Fresh memory comes page by page, each cleared first, which
takes longer than the gradients take to compute, and `zero_grad` gives it all back. Here memory is asked for
in large pages, and what is given back stays for the next pass, marked as free: the system takes it whenever
anyone needs memory (`MADV_FREE`; until then tools count it as the process's).
"""

import ctypes
import math
import mmap
import os
import weakref
from contextlib import suppress

import torch

# What is smaller the C library keeps by itself.
_LEAST_BYTES = 32 << 20
_PAGE = 2 << 20
_HAS_ADVICE = all(hasattr(mmap, name) for name in ("MADV_FREE", "MADV_HUGEPAGE"))

_free: dict[int, list[mmap.mmap]] = {}


def empty_gradient(like: torch.Tensor) -> torch.Tensor:
    """An uninitialised, contiguous tensor for a gradient.

    Its storage cannot be resized. Other devices than the CPU, anything but Linux, and small gradients get
    PyTorch's own memory.

    Args:
        like (`torch.Tensor`): what the gradient is of.

    Returns:
        `torch.Tensor`: of the same shape and dtype.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.kernels.gradient_memory import empty_gradient
    >>> empty_gradient(torch.ones(2, 3, dtype=torch.bfloat16)).shape
    torch.Size([2, 3])

    ```
    """
    size = like.numel() * like.itemsize
    if size < _LEAST_BYTES or not _HAS_ADVICE or not like.is_cpu:
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    length = math.ceil(size / _PAGE) * _PAGE
    try:
        block = _free.get(length, []).pop()
    except IndexError:
        try:
            block = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:  # no room: PyTorch may find some once nothing is kept here, or says what is missing
            _free.clear()
            return torch.empty_like(like, memory_format=torch.contiguous_format)
        _advise(block, mmap.MADV_HUGEPAGE)
    memory = (ctypes.c_char * size).from_buffer(block)
    # The tensor holds `memory`, and that the block.
    weakref.finalize(memory, _give_back, block, os.getpid()).atexit = False
    return torch.frombuffer(memory, dtype=like.dtype).view(like.shape)


def _give_back(block: mmap.mmap, owner: int) -> None:
    if os.getpid() == owner:  # a forked child would copy what it writes to
        _advise(block, mmap.MADV_FREE)
        _free.setdefault(len(block), []).append(block)


def _advise(block: mmap.mmap, advice: int) -> None:
    with suppress(OSError):  # kernels may be built without: slower then, or the memory is kept
        block.madvise(advice)
