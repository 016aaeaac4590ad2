"""Parameters that are pages of their files: the same bytes, and nobody's file changes."""

import ctypes
import gc
import mmap
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers_emo.checkpoints import Checkpoint, CheckpointError
from transformers_emo.checkpoints.local_files import LocalFiles
from transformers_emo.checkpoints.memory import mapped_files
from transformers_emo.checkpoints.memory.mapped_files import PAGE, map_spans
from transformers_emo.checkpoints.safetensors_header import TensorSpan

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="files are mapped on Linux alone"
)
INPUT_IDS = torch.tensor([[5, 17, 60, 2, 33, 8, 90]])
SUBSET = [[0, 2, 3, 7, 11]] * 2


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model whose matrices are long enough to be mapped: one MiB each."""
    from conftest import tiny_model

    model = tiny_model(num_hidden_layers=2, hidden_size=512, intermediate_size=1024).to(torch.bfloat16)
    folder = tmp_path_factory.mktemp("large")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(large, tmp_path):
    for file in large.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def is_mapped(folder) -> bool:
    return f"{folder}/model" in Path("/proc/self/maps").read_text()


def logits(model):
    with torch.no_grad():
        return model(INPUT_IDS).logits


def load(folder, disable_mmap=False, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, disable_mmap=disable_mmap, **kwargs).eval()


@pytest.mark.parametrize("subset", [None, SUBSET], ids=["whole", "subset"])
def test_mapped_and_read_models_are_the_same(large, subset):
    kwargs = {} if subset is None else {"expert_subset": subset}
    mapped = load(large, **kwargs)
    assert is_mapped(large)
    state = mapped.state_dict()
    read = load(large, **kwargs, disable_mmap=True).state_dict()
    assert state.keys() == read.keys() and all(torch.equal(state[name], read[name]) for name in read)
    assert all(tensor.is_contiguous() for tensor in state.values())


def test_memory_is_given_back(large):
    model = load(large)
    assert is_mapped(large) and mapped_files._mappings > 0
    del model
    gc.collect()
    assert not is_mapped(large) and mapped_files._mappings == 0


@pytest.mark.parametrize("disable_mmap", [None, True])
def test_nothing_is_mapped_unless_the_user_asks_for_it(large, disable_mmap):
    model = load(large, disable_mmap=disable_mmap)
    assert not is_mapped(large)
    del model


def test_tensors_in_another_dtype_are_not_mapped(large):
    model = load(large, dtype=torch.float32)
    assert not is_mapped(large)
    del model


def test_writing_changes_neither_the_file_nor_other_models(large):
    before = {file.name: file.read_bytes() for file in large.iterdir()}
    model, other = load(large), load(large)
    expected = logits(other)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    optimizer.step()
    assert not torch.equal(logits(model.eval()), expected)
    assert torch.equal(logits(other), expected)
    assert {file.name: file.read_bytes() for file in large.iterdir()} == before


def test_a_mapped_model_can_be_saved_over_its_own_files(copy):
    model = load(copy)
    assert is_mapped(copy)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[3] *= 2
    expected = logits(model)
    model.save_pretrained(copy)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(load(copy)), expected)


def test_other_experts_are_swapped_into_mapped_ones(large):
    model = load(large, expert_subset=SUBSET)
    other = [[0, 1, 3, 10, 11], [2, 4, 5, 6, 11]]
    model.swap_experts(other)
    assert torch.equal(logits(model), logits(load(large, expert_subset=other)))


def test_slices_are_mapped(large):
    checkpoint = Checkpoint.from_folder(large)
    name = "model.layers.1.mlp.experts.{}.gate_proj.weight"
    lazy = checkpoint.lazy([name.format(e) for e in (4, 9, 1)], shape=(3, 1024, 512))
    expected = lazy[...]
    lazy.mapped = True
    for index in (slice(1, 3), (slice(0, 2), slice(100, 200)), slice(2, 2)):
        assert torch.equal(lazy[index], expected[index])
    rows = lazy[1:3]
    assert is_mapped(large)
    del rows


def test_a_file_that_became_shorter_is_an_error_and_does_not_end_the_process(copy):
    checkpoint = Checkpoint.from_folder(copy)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    lazy, end = checkpoint.lazy([name]), checkpoint.tensors[name].end
    os.truncate(copy / "model.safetensors", end - 100_000)
    lazy.mapped = True
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        lazy[...]


@pytest.mark.parametrize("what", ["map", "room"])
def test_tensors_are_read_if_the_system_cannot_map_them(large, monkeypatch, what):
    expected = logits(load(large, disable_mmap=True))
    if what == "map":  # a file system without
        libc = mapped_files.c_library
        monkeypatch.setattr(mapped_files, "c_library", lambda: Refusing(libc()))
    else:  # all mappings that a process may have are taken
        monkeypatch.setattr(mapped_files, "_mappings", 1 << 40)
    model = load(large)
    assert not is_mapped(large)
    assert torch.equal(logits(model), expected)


class Refusing:
    """A C library whose `mmap` fails, as on file systems without."""

    def __init__(self, libc):
        self.madvise = libc.madvise

    def mmap(self, *args):
        return mapped_files._MAP_FAILED


def test_experts_come_off_the_disk_when_they_are_used(copy):
    file = copy / "model.safetensors"
    tensors = Checkpoint.from_folder(copy).tensors
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    # A temporary folder may be in memory itself (tmpfs): then nothing ever comes off a disk. That the right
    # bytes arrive is tested above on any system.
    if any(pages_in_memory(file)):
        pytest.skip("the file system keeps files in memory whatever it is told")
    model = load(copy)
    assert is_mapped(copy)
    matrices = {name: span for name, span in tensors.items() if ".mlp.experts." in name}
    present = pages_in_memory(file)
    for name, span in matrices.items():
        assert not any(present[span.start // PAGE + 1 : span.end // PAGE]), name
    layer = model.model.layers[1].mlp
    x = torch.linspace(-1, 1, 512, dtype=torch.bfloat16)[None]
    with torch.no_grad():
        taken = set(layer.gate(x)[2].flatten().tolist())
        layer(x[None])
    present = pages_in_memory(file)  # the system may have read more: it reads ahead
    for name, span in matrices.items():
        if "layers.1." in name and int(name.split(".")[5]) in taken:
            assert all(present[span.start // PAGE + 1 : span.end // PAGE]), name
    del model


def pages_in_memory(file) -> list[bool]:
    with file.open("rb") as opened:
        view = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    flags = (ctypes.c_ubyte * -(-len(view) // PAGE))()
    memory = (ctypes.c_char * len(view)).from_buffer(view)
    assert (
        ctypes.CDLL(None).mincore(
            ctypes.c_void_p(ctypes.addressof(memory)), ctypes.c_size_t(len(view)), flags
        )
        == 0
    )
    return [bool(flag & 1) for flag in flags]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    parts=st.lists(
        st.tuples(
            st.integers(0, 1), st.integers(0, 20), st.sampled_from([0, 8, 24, 4000]), st.integers(0, 7 * PAGE)
        ),
        min_size=1,
        max_size=6,
    )
)
def test_any_parts_of_files_are_mapped_as_their_bytes(parts, tmp_path_factory, monkeypatch):
    """Parts on both sides of pages, side by side or not, of two files, with one place in a page or more."""
    monkeypatch.setattr(mapped_files, "LEAST_BYTES", 2 * PAGE)
    folder = tmp_path_factory.getbasetemp() / "parts"
    if not folder.exists():
        folder.mkdir()
        for name in "01":
            (folder / name).write_bytes(os.urandom(30 * PAGE))
    spans = [
        TensorSpan(str(file), page * PAGE + 8 + odd, page * PAGE + 8 + odd + length, torch.uint8, ())
        for file, page, odd, length in parts
    ]
    files = LocalFiles(folder)
    found = map_spans(files, spans)
    files.close()
    expected = b"".join((folder / span.file).read_bytes()[span.start : span.end] for span in spans)
    assert found is None or bytes(found.numpy()) == expected
    if len(spans) == 1:
        assert (found is not None) == (len(expected) >= 2 * PAGE)
