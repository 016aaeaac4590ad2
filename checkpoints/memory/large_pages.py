"""Memory for weights, in large pages.

Weights are read again for every token. With pages of 2 MB instead of 4 KB the processor looks up fewer
addresses and reads ahead further. Loading is faster too, because the system has fewer pages to give.
"""

import ctypes
import functools
import mmap
from contextlib import suppress

import torch

_PAGE = 2 << 20
_LARGE_PAGES = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux


def empty(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """`torch.empty` on the CPU, in large pages if the system has them and the tensor fills some.

    Args:
        numel (`int`): the number of elements.
        dtype (`torch.dtype`): their dtype.

    Returns:
        `torch.Tensor`: (numel,), uninitialised.

    Raises:
        RuntimeError: PyTorch's own, if there is not enough memory.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.checkpoints.memory.large_pages import empty
    >>> empty(3, torch.bfloat16).shape
    torch.Size([3])

    ```
    """
    tensor = torch.empty(numel, dtype=dtype, device="cpu")
    first = -(-tensor.data_ptr() // _PAGE) * _PAGE
    length = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE - first
    if first > 0 and length > 0 and _LARGE_PAGES is not None:
        with suppress(OSError, AttributeError):  # without large pages the tensor is the same
            c_library().madvise(first, length, _LARGE_PAGES)
    return tensor


@functools.cache
def c_library() -> ctypes.CDLL:
    """The C library with `mmap` and `madvise`. Python's own functions work on memory of Python only.

    Returns:
        `ctypes.CDLL`: the library, which knows the types of their arguments.

    Raises:
        OSError: if this Python cannot load its C library.
        AttributeError: if the library has no such functions.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.memory.large_pages import c_library
    >>> c_library() is c_library()
    True

    ```
    """
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
    ]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library
