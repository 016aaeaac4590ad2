"""Models that the package `compressed-tensors` wrote are read as it reads them."""

import json

import pytest
import torch
from conftest import GOLDENS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers_emo import EmoForCausalLM, extract_subset
from transformers_emo.modeling_emo.kernels.packed.packed_tensor import PackedTensor

FOLDER = GOLDENS / "E_compressed_tensors"
KINDS = ("4", "4_asymmetric", "8_channel", "8_asymmetric_channel")
IDS = torch.tensor([[5, 17, 40, 2, 33, 8, 30]])


def meant(kind):
    """What the weights stand for, by that package; the rest as it was."""
    plain = load_file(FOLDER / "plain" / "model.safetensors")
    return plain | load_file(FOLDER / kind / "meant.safetensors")


def stacked(tensors, experts):
    parts = {
        part: [tensors[f"model.layers.0.mlp.experts.{e}.{part}_proj.weight"] for e in experts]
        for part in ("gate", "up", "down")
    }
    gate_up = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)]
    return torch.stack(gate_up), torch.stack(parts["down"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("subset", [None, [[0, 2, 3]]])
def test_its_weights_are_those_that_it_means(kind, subset, tmp_path):
    expected = meant(kind)
    model = EmoForCausalLM.from_pretrained(FOLDER / kind, expert_subset=subset)
    found = {
        name: tensor.dequantize() if isinstance(tensor, PackedTensor) else tensor
        for name, tensor in model.state_dict().items()
    }
    experts = range(4) if subset is None else subset[0]
    gate_up, down = stacked(expected, experts)
    assert torch.equal(found["model.layers.0.mlp.experts.gate_up_proj"], gate_up)
    assert torch.equal(found["model.layers.0.mlp.experts.down_proj"], down)
    for name in ("lm_head", "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"):
        assert isinstance(model.state_dict()[f"{name}.weight"], PackedTensor)
        assert torch.equal(found[f"{name}.weight"], expected[f"{name}.weight"])
    assert torch.equal(found["model.embed_tokens.weight"], expected["model.embed_tokens.weight"])
    if subset is None:
        plain = EmoForCausalLM.from_pretrained(FOLDER / "plain")
        plain.load_state_dict(found)
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_again_they_are_the_same_bytes(kind, tmp_path):
    EmoForCausalLM.from_pretrained(FOLDER / kind).save_pretrained(tmp_path / "saved")
    extract_subset(FOLDER / kind, [[0, 1, 2, 3]], tmp_path / "extracted", progress=False)
    before = load_file(FOLDER / kind / "model.safetensors")
    config = json.loads((FOLDER / kind / "config.json").read_text())["quantization_config"]
    for name in ("saved", "extracted"):
        after = load_file(tmp_path / name / "model.safetensors")
        assert before.keys() == after.keys()
        for tensor, values in before.items():
            assert values.dtype == after[tensor].dtype and torch.equal(values, after[tensor]), tensor
        again = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        group, old = again["config_groups"]["group_0"], config["config_groups"]["group_0"]
        for key in ("num_bits", "type", "symmetric", "strategy", "group_size"):
            assert group["weights"][key] == old["weights"].get(key), key
        assert again["ignore"][: len(config["ignore"])] == config["ignore"]
    assert torch.equal(
        *(
            AutoModelForCausalLM.from_pretrained(tmp_path / name)(IDS).logits
            for name in ("saved", "extracted")
        )
    )
