"""The network against the outputs of the authors' own code."""

import hashlib
import json

import pytest
import torch
from conftest import GOLDENS
from safetensors import safe_open
from safetensors.torch import load_file
from tolerances import assert_same_numbers, clear_words
from transformers import AutoModelForCausalLM

CASES = sorted(path.name for path in (GOLDENS / "A_hf_forward").iterdir())
PADDINGS = ("nopad", "leftpad")


@pytest.fixture(scope="module", params=CASES)
def golden(request):
    folder = GOLDENS / "A_hf_forward" / request.param
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    return model, load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")


def inputs_of(inputs, padding):
    return {name: inputs[f"{padding}.{name}"] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_logits_and_router_logits_are_the_authors(golden, padding, attention, experts):
    model, inputs, outputs = golden
    model.set_attn_implementation(attention)
    model.set_experts_implementation(experts)
    batch = inputs_of(inputs, padding)
    with torch.no_grad():
        out = model(**batch, output_router_logits=True)
    real = batch["attention_mask"].bool()
    assert_same_numbers(out.logits[real], outputs[f"{padding}.logits"][real])
    for layer, logits in enumerate(out.router_logits):
        expected = outputs[f"{padding}.router_logits.{layer}"]
        assert_same_numbers(logits[real.flatten()], expected[real.flatten()])


@pytest.mark.parametrize("padding", PADDINGS)
def test_losses_are_the_authors(golden, padding):
    model, inputs, outputs = golden
    batch, labels = inputs_of(inputs, padding), inputs[f"{padding}.labels"]
    with torch.no_grad():
        out = model(**batch, labels=labels, output_router_logits=True)
        items = model(**batch, labels=labels, output_router_logits=True, num_items_in_batch=57)
        unlabelled = model(**batch, output_router_logits=True)
    for got, name in (
        (out.loss, "loss"),
        (out.ce_loss, "ce_loss"),
        (out.aux_loss, "lb_loss"),
        (items.loss, "loss_num_items"),
        (items.ce_loss, "ce_loss_num_items"),
        (items.aux_loss, "lb_loss_num_items"),
        (unlabelled.aux_loss, "lb_loss_mask_only"),
    ):
        assert_same_numbers(got, outputs[f"{padding}.{name}"])


@pytest.mark.parametrize("padding", PADDINGS)
def test_greedy_ids_are_the_authors(golden, padding):
    model, inputs, outputs = golden
    batch = inputs_of(inputs, padding)
    if padding == "nopad":
        length = int(inputs["generate.prompt_len_nopad"])
        batch = {name: tensor[:, :length] for name, tensor in batch.items()}
    ids = clear_words(model, **batch, max_new_tokens=20)
    assert torch.equal(ids, outputs[f"{padding}.generate_ids"])


@pytest.mark.parametrize("name", [f"{method}_k{k}" for method in ("layerwise", "global") for k in (4, 8)])
def test_loaded_subset_is_the_authors_pruned_model(name, tmp_path):
    golden = json.loads((GOLDENS / "B_subset" / "base" / f"{name}.json").read_text())
    outputs = load_file(GOLDENS / "B_subset" / "base" / "outputs.safetensors")
    inputs = load_file(GOLDENS / "A_hf_forward" / "base" / "inputs.safetensors")
    folder = GOLDENS / "A_hf_forward" / "base" / "checkpoint"
    model = AutoModelForCausalLM.from_pretrained(folder, expert_subset=golden["pruning_metadata_json"])
    for padding in PADDINGS:
        batch = inputs_of(inputs, padding)
        with torch.no_grad():
            out = model(**batch, labels=inputs[f"{padding}.labels"], output_router_logits=True)
        real = batch["attention_mask"].bool()
        assert_same_numbers(out.logits[real], outputs[f"{name}.{padding}.logits"][real])
        assert_same_numbers(out.loss, outputs[f"{name}.{padding}.loss"])
        assert_same_numbers(out.aux_loss, outputs[f"{name}.{padding}.lb_loss"])

    model.save_pretrained(tmp_path)
    digest = hashlib.sha256()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len(file.keys()) == golden["pruned_checkpoint_num_tensors"]
        for key in sorted(file.keys()):
            digest.update(key.encode())
            digest.update(file.get_tensor(key).numpy().tobytes())
    assert digest.hexdigest() == golden["pruned_checkpoint_sha256_sorted_keys_then_bytes"]
    saved = json.loads((tmp_path / "config.json").read_text())
    expected = golden["pruned_config_json"]
    for key in expected.keys() - {"auto_map", "transformers_version"}:
        assert saved[key] == expected[key], key
