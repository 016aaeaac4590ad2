"""What can be known of accelerators without one: nothing waits inside a layer, nothing is made elsewhere.

`meta` tensors take the ways of an accelerator's through the code, fake ones (`fake_devices.py`) keep to the
rules of devices besides. The table of waits is that of CONTRIBUTING.md.
"""

import importlib
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from device_scenarios import LENGTH, POOLS, SCENARIOS, SUBSET, new_ids, new_model
from host_waits import host_waits
from transformers_emo import EmoForCausalLM
from transformers_emo.modeling_emo import lengths_from_segments

TESTS = Path(__file__).parents[1]
MASK = "expert_switching.use_experts: a tensor of Python numbers"
CHECK = "cache_layer.check_masks: a copy between host and device"
# What this package's code waits for, outside the layers; all else waits for nothing.
OURS = {
    "forward_under_a_mask": {MASK: 1},
    "generate_within_pools_of_a_subset": {MASK: 1, CHECK: 1},
    "generate_without_some_experts": {MASK: 1},
}
# Transformers' own, in layers: a static cache is made when its first token comes.
THEIRS_IN_LAYERS = {"generate_with_a_static_cache": {"cache_utils.lazy_initialization"}}


def check(scenario: str, in_layers: dict, ours: dict, made_on_cpu: dict) -> None:
    assert {place.partition(":")[0] for place in in_layers} <= THEIRS_IN_LAYERS.get(scenario, set())
    assert ours == OURS.get(scenario, {})
    assert made_on_cpu == {}


EACH_KIND = ("forward_with_padding", "training_step", "generate_within_pools_of_a_subset")


@pytest.mark.parametrize(
    "scenario, experts",
    [(scenario, "grouped_mm") for scenario in SCENARIOS]
    + list(product(EACH_KIND, ["batched_mm", "emo", "emo_sorted"])),
)
def test_nothing_waits_in_a_layer_and_the_rest_is_known(scenario, experts):
    waits = SCENARIOS[scenario]("meta", experts)
    check(scenario, waits.in_layers, waits.ours, waits.made_on_cpu)


def test_a_generated_token_waits_once_and_a_padded_batch_once():
    """Transformers asks whether all sequences are finished, and whether anything is padded."""
    assert sum(SCENARIOS["forward_with_padding"]("meta", "grouped_mm").theirs.values()) == 1
    waits = SCENARIOS["generate"]("meta", "grouped_mm").theirs
    of_each_token = [place for place, number in waits.items() if number >= 4]
    if len(of_each_token) > 1:  # Transformers of before looks at the mask of every token, too
        of_each_token.remove("masking_utils._ignore_causal_mask_sdpa: _local_scalar_dense")
    assert [waits[place] for place in of_each_token] == [4]


# Deepgemm's kernel has no gradients: it is for inference alone.
@pytest.mark.parametrize(
    ("scenario", "experts"),
    [
        *product(["forward", "steps_with_a_static_cache"], ["deepgemm", "sonicmoe"]),
        ("training_step", "sonicmoe"),
    ],
)
def test_kernels_that_are_downloaded_are_called_as_they_want(scenario, experts, monkeypatch):
    """Stand-ins for them, of the same arguments: they themselves need a GPU."""
    module = importlib.import_module(f"transformers.integrations.{experts}")
    shapes = []

    def grouped_product(inputs, weights, out, layout, **_):
        assert inputs.shape[1] == weights.shape[2] and out.shape == (len(inputs), weights.shape[1])
        shapes.append(weights.shape)

    def moe(hidden, scores, token, expert, gate_up, _, down, __, *, E, **___):  # noqa: N803
        assert gate_up.shape == (2 * down.shape[0], hidden.shape[1], E) and len(token) == len(expert)
        shapes.append(gate_up.shape)
        return hidden * scores.sum() * gate_up.sum() * down.sum(), None

    kernel = SimpleNamespace(
        grouped_bf16_matmul_nt=grouped_product,
        m_alignment=128,
        moe_general_routing_inputs=moe,
        activation_type_enum=SimpleNamespace(SWIGLU=0),
    )
    monkeypatch.setattr(module, f"load_{experts}_kernel", lambda: kernel)
    if experts == "deepgemm":
        monkeypatch.setattr(module, "is_sm100", lambda: False)
    waits = SCENARIOS[scenario]("meta", experts)
    check(scenario, waits.in_layers, waits.ours, waits.made_on_cpu)
    assert shapes


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
def test_with_values_too_nothing_waits_in_a_layer(experts):
    model = tiny_model(**POOLS)
    model.set_experts_implementation(experts)
    ids = torch.randint(2, 96, (2, LENGTH))
    with host_waits("cpu") as waits, model.use_experts(SUBSET):
        model.train()(ids, labels=ids, attention_within_documents=True).loss.backward()
        model.eval().generate(ids, document_pool=4, max_new_tokens=3, do_sample=False)
    assert waits.in_layers == {}


def test_waits_are_seen():
    """What the tests above would see if there were something, also in a layer: the loop over experts asks."""
    model = tiny_model(num_hidden_layers=1)
    model.set_experts_implementation("eager")
    with torch.no_grad(), host_waits("cpu") as waits:
        model(torch.tensor([[3, 4, 5]]))
    assert any("_unique2" in place for place in waits.in_layers)
    x = torch.zeros(3, device="meta")
    with host_waits("meta") as waits:
        x.nonzero()
        assert x.sum() == 1 and x.tolist() == [1, 1, 1] and x.new_tensor([2.0]).is_meta
        _ = x.cpu()
    assert sum(waits.in_layers.values()) == 5  # no code of ours asks: as in a backward pass
    with pytest.raises(AssertionError, match="on the CPU and on"), host_waits("meta"):
        torch.ones(3, device="meta") + torch.ones(3)


def test_flash_attention_waits_once_a_forward_for_its_documents(monkeypatch):
    segments = torch.zeros(2, 6, dtype=torch.long, device="meta")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # no look at the numbers themselves
    with host_waits("meta") as waits:
        lengths_from_segments(segments)
    assert sum(waits.ours.values()) == 2


def test_devices_do_not_mix():
    """One process for all of it: what it defines is for good."""
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    run = subprocess.run(
        [sys.executable, TESTS / "fake_devices.py"], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found) >= 15
    for scenario, result in found.items():
        if scenario.startswith("split"):
            assert result == "right"
        else:
            check(scenario, *result)


def test_masks_follow_the_model():
    model = new_model("meta", "grouped_mm")
    model.to_empty(device="cpu")
    with model.use_experts(SUBSET):
        before = [mask.clone() for mask in model.model.expert_masks]
        model.to(torch.bfloat16)
        assert all(torch.equal(a, b) for a, b in zip(before, model.model.expert_masks, strict=True))
        model.to("meta")
        assert all(mask.is_meta for mask in model.model.expert_masks)
        with host_waits("meta") as waits:
            model(new_ids("meta"))
    assert waits.ours == {} and model.model.expert_masks == [None] * 3


def test_a_generator_may_be_of_another_device():
    model = new_model("meta", "grouped_mm", **POOLS).train()
    model.model.pool_generator = torch.Generator().manual_seed(0)
    ids = new_ids("meta")
    assert model(ids, labels=ids).document_pool_size.is_meta


def test_a_model_made_on_the_device_has_nothing_elsewhere():
    with torch.device("meta"):
        model = EmoForCausalLM(new_model("meta", "grouped_mm").config)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
