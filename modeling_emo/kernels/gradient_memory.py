"""Memory for large gradients, kept from one backward pass to the next.

The gradients of one layer's experts take gigabytes. The system clears new memory page by page, which takes
longer than computing the gradients, and `zero_grad` gives all of it back. So this module asks for large pages
and keeps the memory that comes back for the next pass. That memory is marked as free (`MADV_FREE`): the
system takes it when any process needs memory. Until then tools count it as memory of this process.
"""

import ctypes
import math
import mmap
import os
import weakref
from contextlib import suppress

import torch

# The C library keeps smaller blocks by itself.
_LEAST_BYTES = 32 << 20
_PAGE = 2 << 20
_HAS_ADVICE = all(hasattr(mmap, name) for name in ("MADV_FREE", "MADV_HUGEPAGE"))

_free: dict[int, list[mmap.mmap]] = {}


def empty_gradient(like: torch.Tensor) -> torch.Tensor:
    """An uninitialised, contiguous tensor for a gradient.

    Its storage cannot be resized. Small gradients, devices other than the CPU and systems other than Linux
    get PyTorch's own memory.

    Args:
        like (`torch.Tensor`): the tensor that the gradient belongs to.

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
        except OSError:  # PyTorch may find memory once nothing is kept here, or names what is missing
            _free.clear()
            return torch.empty_like(like, memory_format=torch.contiguous_format)
        _advise(block, mmap.MADV_HUGEPAGE)
    memory = (ctypes.c_char * size).from_buffer(block)
    # The tensor keeps `memory` alive, and `memory` keeps the block.
    weakref.finalize(memory, _give_back, block, os.getpid()).atexit = False
    return torch.frombuffer(memory, dtype=like.dtype).view(like.shape)


def _give_back(block: mmap.mmap, owner: int) -> None:
    if os.getpid() == owner:  # a forked child would have to copy every page that it writes to
        _advise(block, mmap.MADV_FREE)
        _free.setdefault(len(block), []).append(block)


def _advise(block: mmap.mmap, advice: int) -> None:
    with suppress(OSError):  # some kernels are built without: then it is slower, or the memory stays in use
        block.madvise(advice)
