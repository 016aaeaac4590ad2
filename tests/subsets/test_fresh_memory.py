"""Memory for weights, in large pages."""

import os
import re
from pathlib import Path

import pytest
import torch
from transformers_emo.subsets import fresh_memory

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def advice(tensor):
    """What Linux has been told of the memory in the tensor's middle."""
    place = tensor.data_ptr() + tensor.nbytes // 2
    flags, inside = "", False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= place < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line
    return flags.split()


@pytest.mark.skipif(not LARGE_PAGES.exists(), reason="a system without large pages")
@pytest.mark.skipif("THP_MEM_ALLOC_ENABLE" in os.environ, reason="PyTorch does it for all tensors")
def test_weights_lie_in_large_pages():
    assert "hg" in advice(fresh_memory.empty(16 << 20, torch.float32))
    assert "hg" not in advice(torch.empty(16 << 20))


@pytest.mark.parametrize("numel", [0, 1, 1 << 20, (3 << 20) + 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_memory_is_of_the_size_asked_for(numel, dtype):
    tensor = fresh_memory.empty(numel, dtype).fill_(3)
    assert tensor.shape == (numel,)
    assert tensor.dtype == dtype
    assert (tensor == 3).all()


def no_library():
    raise OSError("a static interpreter")


@pytest.mark.parametrize(
    ("name", "value"), [("_LARGE_PAGES", None), ("_LARGE_PAGES", 12345), ("c_library", no_library)]
)
def test_systems_without_large_pages_give_memory_all_the_same(monkeypatch, name, value):
    monkeypatch.setattr(fresh_memory, name, value)
    assert fresh_memory.empty(4 << 20, torch.float32).fill_(1).sum() == 4 << 20
