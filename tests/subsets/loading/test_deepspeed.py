"""DeepSpeed's ZeRO-3 takes files or tensors, and no lazy ones. (It is not installed here: only asked for.)"""

import pytest
import torch
from transformers.modeling_utils import PreTrainedModel
from transformers_emo import EmoForCausalLM
from transformers_emo.subsets.loading import from_pretrained, weight_loading

SUBSET = [[0, 3, 4, 8, 11]] * 3


@pytest.fixture
def given(monkeypatch):
    """ZeRO-3 is on; what Transformers' loader is given: the state dict and the files."""
    monkeypatch.setattr(weight_loading, "is_deepspeed_zero3_enabled", lambda: True)
    assert from_pretrained is not None  # imported before anything is replaced
    load, calls = PreTrainedModel._load_pretrained_model, []

    def record(model, state_dict, files, *args, **kwargs):
        calls.append((state_dict, files))
        return load(model, state_dict, files, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(record))
    return calls


def test_the_files_of_a_whole_model_are_left_to_it(make_checkpoint, given):
    folder = make_checkpoint()
    EmoForCausalLM.from_pretrained(folder)
    assert given[0][0] is None and given[0][1] == [str(folder / "model.safetensors")]


def test_of_a_subset_it_gets_tensors(make_checkpoint, given, monkeypatch):
    folder = make_checkpoint()
    model = EmoForCausalLM.from_pretrained(folder, expert_subset=SUBSET)
    assert all(type(tensor) is torch.Tensor for tensor in given[0][0].values())
    monkeypatch.undo()
    expected = EmoForCausalLM.from_pretrained(folder, expert_subset=SUBSET)
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_only_the_first_process_reads(make_checkpoint, given, monkeypatch):
    folder = make_checkpoint()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="stop"):

        def stop(model, state_dict, files, *args, **kwargs):
            assert all(tensor.is_meta for tensor in state_dict.values())
            raise RuntimeError("stop")

        patched.setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(stop))
        EmoForCausalLM.from_pretrained(folder, expert_subset=SUBSET)
