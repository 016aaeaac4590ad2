"""Memory for weights, in large pages.

Weights are read again for every token. With pages of 2 MB instead of 4 KB the processor looks up fewer
addresses and reads ahead further, and there are fewer pages to be had from the system while loading.
"""

import ctypes
import functools
import mmap
from contextlib import suppress

import torch

_PAGE = 2 << 20
_LARGE_PAGES = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux


def empty(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """`torch.empty` on the CPU, in large pages where the system has them and they are filled.

    Args:
        numel (`int`): how many numbers.
        dtype (`torch.dtype`): of the tensor.

    Returns:
        `torch.Tensor`: (numel,), uninitialised.

    Raises:
        RuntimeError: PyTorch's, if there is no room for so many numbers.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.checkpoints.large_pages import empty
    >>> empty(3, torch.bfloat16).shape
    torch.Size([3])

    ```
    """
    tensor = torch.empty(numel, dtype=dtype, device="cpu")
    first = -(-tensor.data_ptr() // _PAGE) * _PAGE
    length = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE - first
    if first > 0 and length > 0 and _LARGE_PAGES is not None:
        with suppress(OSError, AttributeError):  # no C library to be had; what it answers does not matter
            c_library().madvise(first, length, _LARGE_PAGES)
    return tensor


@functools.cache
def c_library() -> ctypes.CDLL:
    """The C library's `mmap` and `madvise`, which Python offers for its own memory alone.

    Returns:
        `ctypes.CDLL`: with the types of their arguments.

    Raises:
        OSError, AttributeError: if this Python cannot load its C library, or that has no such functions.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.large_pages import c_library
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
