"""The folder of a model is opened once: headers are read once, and sizes checked once, by each call."""

import sys
from collections import Counter
from pathlib import Path

import pytest
from transformers_emo import CheckpointError, EmoForCausalLM, extract_subset, select_experts, write_back
from transformers_emo.checkpoints.local_files import LocalFiles
from transformers_emo.subsets.loading import model_source, wanted_tensors, weight_loading, weights_check
from transformers_emo.subsets.loading.model_source import ModelSource, check_hub_kwargs

FIRST, SECOND = [[0, 3, 11]] * 3, [[0, 5, 7, 11]] * 3


@pytest.fixture
def counts(monkeypatch):
    """How often the header of each file was read, and how often sizes were checked."""
    counted: Counter[str] = Counter()
    read_into = LocalFiles.read_into

    def reading(self, file, start, buffer):
        if start == 0 and len(buffer) == 8:
            counted[f"header of {file}"] += 1
        read_into(self, file, start, buffer)

    def checking(*args, **kwargs):
        counted["sizes"] += 1
        weights_check.check_sizes(*args, **kwargs)

    monkeypatch.setattr(LocalFiles, "read_into", reading)
    for module in (model_source, wanted_tensors, weight_loading):
        monkeypatch.setattr(module, "check_sizes", checking)
    return counted


CALLS = {
    "whole model": lambda folder, out: EmoForCausalLM.from_pretrained(folder),
    "subset": lambda folder, out: EmoForCausalLM.from_pretrained(folder, expert_subset=FIRST),
    "exclusion": lambda folder, out: EmoForCausalLM.from_pretrained(folder, exclude_experts={0: [1]}),
    "extract": lambda folder, out: extract_subset(folder, FIRST, out, progress=False),
    "select": lambda folder, out: select_experts(
        folder, input_ids=[[[1, 2, 3]]], num_experts=4, progress=False
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("shards", [False, True])
def test_headers_are_read_once_and_sizes_checked_once(call, shards, make_checkpoint, counts, tmp_path):
    folder = make_checkpoint(shards=shards)
    CALLS[call](folder, tmp_path / "out")
    files = {file.name for file in folder.glob("*.safetensors")}
    assert counts == {f"header of {name}": 1 for name in files} | {"sizes": 1}


def test_a_swap_opens_its_source_once(make_checkpoint, counts):
    folder = make_checkpoint()
    model = EmoForCausalLM.from_pretrained(folder, expert_subset=FIRST)
    counts.clear()
    model.swap_experts(SECOND, progress=False)
    assert counts == {"header of model.safetensors": 1, "sizes": 1}
    counts.clear()
    model.swap_experts([[0, 7, 11]] * 3, progress=False)  # held already: nothing is opened
    with model.use_experts([[7, 11]] * 3):
        assert not counts


def test_writing_back_opens_each_model_once(make_checkpoint, counts, tmp_path):
    folder = make_checkpoint()
    extract_subset(folder, FIRST, tmp_path / "part", progress=False)
    counts.clear()
    write_back(folder, tmp_path / "part", out=tmp_path / "out", progress=False)
    # Two models, whose files have one name.
    assert counts == {"header of model.safetensors": 2, "sizes": 2}


def test_quantised_weights_are_refused_by_name_and_with_what_to_do(make_checkpoint, edit_json):
    folder = make_checkpoint()
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(CheckpointError, match=f"The weights of {folder} are quantised.*give the unquantised"):
        ModelSource.open(folder)


def test_a_keyword_that_says_nothing_of_the_hub_is_refused():
    with pytest.raises(TypeError, match=r"swap_experts\(\) got an unexpected keyword argument 'revison'"):
        check_hub_kwargs("swap_experts", {"revison": "main", "token": None})


def test_the_way_from_the_call_to_the_bytes_leads_through_ten_files_at_most(make_checkpoint, monkeypatch):
    """Files of the package on the stack whenever bytes are read: those that a reader has to follow."""
    entered = set()
    read_into = LocalFiles.read_into

    def reading(self, file, start, buffer):
        frame = sys._getframe()
        while frame is not None:
            if frame.f_globals.get("__name__", "").startswith("transformers_emo."):
                entered.add(Path(frame.f_code.co_filename).name)
            frame = frame.f_back
        read_into(self, file, start, buffer)

    monkeypatch.setattr(LocalFiles, "read_into", reading)
    EmoForCausalLM.from_pretrained(make_checkpoint(), expert_subset=FIRST)
    assert {"from_pretrained.py", "model_source.py", "lazy_tensor.py"} <= entered
    assert len(entered) <= 10
