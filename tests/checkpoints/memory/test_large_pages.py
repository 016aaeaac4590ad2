"""Memory for weights, in large pages."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers_emo.checkpoints.memory import large_pages

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
def test_weights_are_in_large_pages():
    assert "hg" in advice(large_pages.empty(16 << 20, torch.float32))


def test_large_pages_are_requested_for_those_inside_the_tensor(monkeypatch):
    calls = []
    library = SimpleNamespace(madvise=lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(large_pages, "c_library", lambda: library)
    monkeypatch.setattr(large_pages, "_LARGE_PAGES", 14)
    page, tensor = 2 << 20, large_pages.empty(16 << 20, torch.float32)
    [(first, length, what)] = calls
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    assert what == 14 and first % page == length % page == 0
    assert begin <= first < begin + page and end - page < first + length <= end
    large_pages.empty(1000, torch.float32)  # no whole page
    assert len(calls) == 1


@pytest.mark.parametrize("numel", [0, 1, 1 << 20, (3 << 20) + 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_memory_has_the_size_asked_for(numel, dtype):
    tensor = large_pages.empty(numel, dtype).fill_(3)
    assert tensor.shape == (numel,)
    assert tensor.dtype == dtype
    assert (tensor == 3).all()


def no_library():
    raise OSError("a static interpreter")


@pytest.mark.parametrize(
    ("name", "value"), [("_LARGE_PAGES", None), ("_LARGE_PAGES", 12345), ("c_library", no_library)]
)
def test_systems_without_large_pages_give_ordinary_memory(monkeypatch, name, value):
    monkeypatch.setattr(large_pages, name, value)
    assert large_pages.empty(4 << 20, torch.float32).fill_(1).sum() == 4 << 20
