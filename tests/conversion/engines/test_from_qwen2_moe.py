"""Exports that others have trained become EMO models again."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerances import assert_same_numbers
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers_emo import CheckpointError, EmoForCausalLM, write_back
from transformers_emo.conversion import convert_qwen2_moe, export_model

IDS = torch.tensor([[5, 9, 1, 40, 7, 88, 3, 60]])
VARIANTS = {
    "as released": {},
    "no shared expert": {"num_shared_experts": 0},
    "tied": {"tie_word_embeddings": True},
    "dense layers": {"num_experts_per_layer": [12, 0, 12], "dense_intermediate_size": 40},
    "pools": {"document_pool_min": 3, "document_pool_max": 11, "document_pool_eval": 4},
    "fewer experts than picks": {"num_experts": 3, "num_experts_per_tok": 8},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_there_and_back_every_tensor_is_the_same(make_checkpoint, tmp_path, changes):
    folder = make_checkpoint(**changes)
    export_model(folder, tmp_path / "qwen", progress=False)
    config = convert_qwen2_moe(tmp_path / "qwen", tmp_path / "emo", progress=False)
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "emo"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name.endswith("mlp.gate.weight") and config.num_shared_experts:
            tensor[-1] = 0  # the shared expert's row, which nothing reads
        assert torch.equal(tensor, after[name]), name
    ours = EmoForCausalLM.from_pretrained(folder).config
    differ = {
        key
        for key in ours.to_dict().keys() | config.to_dict().keys()
        if ours.to_dict().get(key) != config.to_dict().get(key)
    }
    assert differ <= {"transformers_version", "_name_or_path"}


def test_a_fine_tuned_export_is_written_back(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    export_model(folder, tmp_path / "qwen", expert_subset=[[0, 3, 7, 11]] * 3, progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[1] += 1.0  # expert 3
        model.model.layers[1].mlp.shared_expert.down_proj.weight += 1.0
    model.save_pretrained(tmp_path / "tuned")
    convert_qwen2_moe(tmp_path / "tuned", tmp_path / "emo", progress=False)
    tuned = EmoForCausalLM.from_pretrained(tmp_path / "emo")
    with torch.no_grad():
        assert_same_numbers(tuned(IDS).logits, model(IDS).logits)
    write_back(folder, tmp_path / "emo", out=tmp_path / "full", progress=False)
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "full"))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.layers.1.mlp.experts.3.down_proj.weight"]


def test_trained_biases_become_those_of_an_emo_and_go_out_again(make_checkpoint, tmp_path):
    export_model(make_checkpoint(), tmp_path / "qwen", progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.bias += 0.5
    model.save_pretrained(tmp_path / "tuned")
    convert_qwen2_moe(tmp_path / "tuned", tmp_path / "emo", progress=False)
    with torch.no_grad():
        ours = EmoForCausalLM.from_pretrained(tmp_path / "emo")(IDS).logits
        assert_same_numbers(ours, model(IDS).logits)
    export_model(tmp_path / "emo", tmp_path / "again", verify=True, progress=False)


def test_a_head_that_was_trained_stays_apart_from_the_embeddings(make_checkpoint, tmp_path):
    export_model(make_checkpoint(tie_word_embeddings=True), tmp_path / "qwen", progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen")
    with torch.no_grad():
        model.lm_head.weight += 0.5
    model.save_pretrained(tmp_path / "tuned")
    assert not convert_qwen2_moe(tmp_path / "tuned", tmp_path / "emo", progress=False).tie_word_embeddings
    with torch.no_grad():
        ours = EmoForCausalLM.from_pretrained(tmp_path / "emo")(IDS).logits
        assert_same_numbers(ours, model(IDS).logits)


def test_a_trained_gate_is_refused(make_checkpoint, tmp_path):
    export_model(make_checkpoint(), tmp_path / "qwen", progress=False)
    tensors = load_file(tmp_path / "qwen" / "model.safetensors")
    tensors["model.layers.2.mlp.shared_expert_gate.weight"][0, 3] = 0.01
    save_file(tensors, tmp_path / "qwen" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="was trained .*layers.2.*0.01"):
        convert_qwen2_moe(tmp_path / "qwen", tmp_path / "emo", progress=False)


def test_any_other_qwen2_moe_is_refused(tmp_path):
    config = Qwen2MoeConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
    )
    torch.manual_seed(0)
    Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "qwen")
    with pytest.raises(ValueError, match="24 wide, and the others 16; the gate"):
        convert_qwen2_moe(tmp_path / "qwen", tmp_path / "emo", progress=False)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_type": "olmoe"}, ValueError, "'olmoe', expected 'qwen2_moe'"),
        ({"use_sliding_window": True}, ValueError, "sliding window"),
        ({"decoder_sparse_step": 2}, ValueError, "decoder_sparse_step"),
        ({"emo": {"x": 1}}, ValueError, "not what an export writes"),
        ({"num_experts": 5}, ValueError, "experts were changed"),
        ({"num_hidden_layers": 4}, (CheckpointError, ValueError), "4|lacks"),
        ({"hidden_size": 64}, CheckpointError, "expected"),
        ({"quantization_config": {"quant_method": "awq"}}, CheckpointError, "quantised"),
    ],
)
def test_a_config_that_does_not_fit_is_named(make_checkpoint, edit_json, tmp_path, changes, error, message):
    export_model(make_checkpoint(), tmp_path / "qwen", progress=False)
    edit_json(tmp_path / "qwen" / "config.json", **changes)
    with pytest.raises(error, match=message):
        convert_qwen2_moe(tmp_path / "qwen", tmp_path / "emo", progress=False)


def test_an_unmerged_adapter_is_not_lost_silently(make_checkpoint, tmp_path):
    export_model(make_checkpoint(), tmp_path / "qwen", progress=False)
    tensors = load_file(tmp_path / "qwen" / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 2)
    save_file(tensors, tmp_path / "qwen" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="lora_A.*Merge adapters"):
        convert_qwen2_moe(tmp_path / "qwen", tmp_path / "emo", progress=False)


def test_without_emo_in_its_config_it_is_a_model_of_its_own(make_checkpoint, edit_json, tmp_path):
    folder = make_checkpoint()
    export_model(folder, tmp_path / "qwen", expert_subset=[[0, 3, 7, 11]] * 3, progress=False)
    edit_json(tmp_path / "qwen" / "config.json", emo=None)
    config = convert_qwen2_moe(tmp_path / "qwen", tmp_path / "emo", type="bf16", progress=False)
    assert config.retained_experts is None and config.num_experts == 4
    assert json.loads((tmp_path / "emo" / "config.json").read_text())["dtype"] == "bfloat16"
