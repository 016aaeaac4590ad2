"""Matrix products that round as on another processor: as `EMO_TEST_PROCESSOR=1 pytest` runs the tests.

Libraries choose the order of their sums by processor, shape and place in memory. Here it is a random order
for each shape: two computations give the same bits only if they multiply the same shapes.
"""

import warnings
import zlib

import torch

_library = torch.library.Library("aten", "IMPL")


def _order(terms: int, *operands: torch.Tensor) -> torch.Tensor:
    seed = zlib.crc32(repr([tuple(operand.shape) for operand in operands]).encode())
    return torch.randperm(terms, generator=torch.Generator().manual_seed(seed))


def _shuffled(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both factors with the terms of their sums in another order, and room for the product."""
    out = left.new_empty((*left.shape[:-1], right.shape[-1]))
    if left.shape[-1] != right.shape[-2]:  # PyTorch is to refuse them
        return left, right, out
    order = _order(left.shape[-1], left, right)
    return left[..., order], right[..., order, :], out


def _mm(left, right):
    left, right, out = _shuffled(left, right)
    return torch.mm(left, right, out=out)


def _bmm(left, right):
    left, right, out = _shuffled(left, right)
    return torch.bmm(left, right, out=out)


def _addmm(bias, left, right, *, beta=1, alpha=1):
    left, right, out = _shuffled(left, right)
    return torch.addmm(bias, left, right, beta=beta, alpha=alpha, out=out)


def _baddbmm(bias, left, right, *, beta=1, alpha=1):
    left, right, out = _shuffled(left, right)
    return torch.baddbmm(bias, left, right, beta=beta, alpha=alpha, out=out)


def imitate() -> None:
    """From now on, in this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels of PyTorch are replaced
        for name, product in {"mm": _mm, "bmm": _bmm, "addmm": _addmm, "baddbmm": _baddbmm}.items():
            _library.impl(name, product, "CPU")
