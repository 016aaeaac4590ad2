"""Memory of large gradients: used again, never while someone holds it."""

import gc
import mmap
import os

import pytest
import torch
from transformers_emo.modeling_emo.kernels import gradient_memory
from transformers_emo.modeling_emo.kernels.gradient_memory import empty_gradient

pytestmark = pytest.mark.skipif(
    not gradient_memory._HAS_ADVICE, reason="the system cannot be told that memory is free but wanted again"
)


@pytest.fixture(autouse=True)
def own_blocks(monkeypatch):
    monkeypatch.setattr(gradient_memory, "_free", {})
    monkeypatch.setattr(gradient_memory, "_LEAST_BYTES", 1 << 20)


def ones(*shape: int) -> torch.Tensor:
    return empty_gradient(torch.empty(*shape)).fill_(1)


def test_memory_is_used_again_once_nobody_holds_it():
    first = ones(512, 1024)
    place = first.data_ptr()
    assert ones(512, 1024).data_ptr() != place
    view = first[3]
    del first
    gc.collect()
    assert ones(512, 1024).data_ptr() != place  # a view holds it
    assert view.sum() == 1024
    del view
    gc.collect()
    held = [ones(512, 1024) for _ in range(3)]
    assert place in {tensor.data_ptr() for tensor in held}


def test_other_dtypes_and_shapes_of_a_size_share_memory():
    first = ones(512, 1024)
    place = first.data_ptr()
    del first
    other = empty_gradient(torch.empty(2, 512, 1024, dtype=torch.bfloat16))
    assert other.data_ptr() == place
    assert other.shape == (2, 512, 1024) and other.dtype == torch.bfloat16 and other.is_contiguous()


def test_small_tensors_use_the_memory_of_pytorch():
    assert empty_gradient(torch.empty(3, 4)).untyped_storage().resizable()


def test_without_room_nothing_is_kept_and_pytorch_is_asked(monkeypatch):
    del (held := [ones(512, 1024)])[0]
    assert not held and gradient_memory._free

    def full(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", full)
    assert ones(512, 1025).untyped_storage().resizable()
    assert not gradient_memory._free


def test_a_kernel_without_the_advice_does_no_harm(monkeypatch):
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345)
    assert ones(512, 1024).sum() == 512 * 1024


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_a_forked_child_does_not_use_its_parents_memory():
    """It would copy each page that it writes to."""
    held = ones(512, 1024)
    child = os.fork()
    if child == 0:
        del held
        gc.collect()
        os._exit(len(gradient_memory._free))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    del held
    gc.collect()
    assert len(gradient_memory._free) == 1


def test_autograd_takes_the_gradient_as_it_is():
    """A copy would cost what the memory saves."""
    made = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            found = empty_gradient(grad)
            made.append(found.data_ptr())
            return found.copy_(grad).mul_(2)

    weight = torch.nn.Parameter(torch.ones(512, 1024))
    Double.apply(weight).sum().backward()
    assert weight.grad.data_ptr() == made[0] and (weight.grad == 2).all()
