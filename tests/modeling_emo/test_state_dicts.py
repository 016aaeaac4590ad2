"""`load_state_dict`, by whoever calls it: experts stacked or one by one, in one file or several."""

import pytest
import torch
from accelerate import Accelerator, load_checkpoint_in_model
from safetensors.torch import load_file, load_model
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import load_sharded_checkpoint
from transformers_emo import EmoForCausalLM

EXPERT = "model.layers.0.mlp.experts."


@pytest.fixture
def saved(make_model):
    return make_model(seed=1)


@pytest.fixture
def model(make_model):
    return make_model(seed=2)


@pytest.fixture
def folder(saved, tmp_path):
    """In files that each hold a part of a layer's experts."""
    saved.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 3
    return tmp_path / "saved"


def on_disk(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def assert_loaded(model, saved):
    expected = saved.state_dict()
    assert [n for n, p in model.state_dict().items() if not torch.equal(p, expected[n])] == []


def test_sharded_checkpoint_by_the_trainers_loader(model, saved, folder):
    load_sharded_checkpoint(model, str(folder), strict=False)
    assert_loaded(model, saved)


def test_sharded_checkpoint_by_accelerate(model, saved, folder):
    load_checkpoint_in_model(model, folder)
    assert_loaded(model, saved)


def test_one_file_by_accelerate_and_safetensors(model, saved, make_model, tmp_path):
    saved.save_pretrained(tmp_path)
    load_checkpoint_in_model(model, tmp_path)
    assert_loaded(model, saved)
    other = make_model(seed=3)
    load_model(other, tmp_path / "model.safetensors")
    assert_loaded(other, saved)


def test_state_of_accelerate(saved, tmp_path):
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(saved)
    accelerator.save_state(tmp_path)
    expected = {name: tensor.clone() for name, tensor in prepared.state_dict().items()}
    with torch.no_grad():
        for parameter in prepared.parameters():
            parameter.zero_()
    accelerator.load_state(tmp_path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in prepared.state_dict().items())


def test_best_model_of_the_trainer(model, saved, folder, tmp_path):
    trainer = Trainer(model, TrainingArguments(tmp_path, use_cpu=True, report_to=[]))
    trainer.state.best_model_checkpoint = str(folder)
    trainer._load_best_model()
    assert_loaded(model, saved)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_both_layouts_load_in_one_call(model, saved, folder, strict, assign):
    stacked = {name: tensor.clone() for name, tensor in saved.state_dict().items()}
    for state in (stacked, on_disk(folder)):
        with torch.no_grad():
            model.model.layers[0].mlp.experts.down_proj.add_(1)
        model.load_state_dict(state, strict=strict, assign=assign)
        assert_loaded(model, saved)


def test_some_experts_are_put_in_their_places_and_the_others_are_named(model, saved, folder):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    part = {name: t for name, t in on_disk(folder).items() if name.startswith(EXPERT + "3.")}
    del part[EXPERT + "3.up_proj.weight"]
    result = model.load_state_dict(part, strict=False)
    assert EXPERT + "3.up_proj.weight" in result.missing_keys
    assert EXPERT + "3.gate_proj.weight" not in result.missing_keys
    ours, theirs = model.model.layers[0].mlp.experts, saved.model.layers[0].mlp.experts
    width = ours.intermediate_dim
    assert torch.equal(ours.down_proj[3], theirs.down_proj[3])
    assert torch.equal(ours.gate_up_proj[3, :width], theirs.gate_up_proj[3, :width])
    assert torch.equal(ours.gate_up_proj[3, width:], before[EXPERT + "gate_up_proj"][3, width:])
    assert torch.equal(ours.down_proj[:3], before[EXPERT + "down_proj"][:3])
    with pytest.raises(RuntimeError, match=r"Missing key.*experts\.3\.up_proj\.weight"):
        model.load_state_dict(part)


def test_an_expert_that_the_files_lack_is_missed(model, folder):
    state = {name: t for name, t in on_disk(folder).items() if EXPERT + "5." not in name}
    with pytest.raises(RuntimeError, match=r"Missing key.*experts\.5\.gate_proj\.weight"):
        model.load_state_dict(state)
    assert EXPERT + "5.down_proj.weight" in model.load_state_dict(state, strict=False).missing_keys


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("only_experts", [True, False])
def test_experts_of_a_larger_model_are_refused(folder, strict, only_experts):
    part = EmoForCausalLM.from_pretrained(folder, expert_subset=[[0, 3, 4, 8, 11]] * 3)
    state = on_disk(folder)
    if only_experts:
        state = {name: tensor for name, tensor in state.items() if ".mlp.experts." in name}
    with pytest.raises(RuntimeError, match=r"experts\.5: the weights have this expert, and the model only 5"):
        part.load_state_dict(state, strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_an_expert_of_another_size_is_refused(model, folder, strict):
    state = on_disk(folder)
    state[EXPERT + "2.up_proj.weight"] = state[EXPERT + "2.up_proj.weight"].T
    with pytest.raises(RuntimeError, match=r"size mismatch for .*experts\.2\.up_proj\.weight"):
        model.load_state_dict(state, strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_experts_in_both_layouts_at_once_are_refused(model, saved, folder, strict):
    with pytest.raises(RuntimeError, match="stacked and expert by expert"):
        model.load_state_dict(on_disk(folder) | saved.state_dict(), strict=strict)


def test_some_experts_without_memory_to_go_to_are_refused(folder, saved):
    with torch.device("meta"):
        empty = EmoForCausalLM(saved.config)
    state = on_disk(folder)
    empty.load_state_dict(state, assign=True)
    assert_loaded(empty, saved)
    with torch.device("meta"):
        empty = EmoForCausalLM(saved.config)
    with pytest.raises(RuntimeError, match="load all of them at once"):
        empty.load_state_dict(
            {n: t for n, t in state.items() if "experts.1." in n}, strict=False, assign=True
        )


def test_resuming_saves_what_was_loaded(model, folder, tmp_path):
    load_sharded_checkpoint(model, str(folder), strict=False)
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in on_disk(folder).items())
