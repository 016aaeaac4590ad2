"""TRL's trainers train EMO, its parts and adapters; skipped where TRL is not installed.

Their losses are their own: they ask the decoder for hidden states. So there are no document pools in them.
"""

import math

import datasets
import pytest
import torch
from tolerances import assert_other_numbers, assert_same_numbers
from transformers_emo import EmoForCausalLM, EmoTokenizer
from transformers_emo.training import load_adapter, lora_config

trl = pytest.importorskip("trl")

TOY = "model_cards/toy-emo"
SUBSET = [[0, 1, 2, 3, 4, 5, 6, 31]] * 4
POOLS = {"document_pool_min": 3, "document_pool_max": 7, "attention_within_documents": True}
SETTINGS = {
    "per_device_train_batch_size": 2,
    "router_aux_loss_coef": 0.0,  # otherwise Mixtral's, which takes shared experts for routed ones
    "bf16": False,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
}
NO_POOLS = {"document_pool_min": None, "document_pool_max": None}


def load_subset(**config) -> EmoForCausalLM:
    return EmoForCausalLM.from_pretrained(TOY, expert_subset=SUBSET, **config)


@pytest.mark.parametrize("config", [NO_POOLS, POOLS], ids=["without_pools", "with_pools"])
@pytest.mark.parametrize("packing", [False, True])
def test_adapter_of_a_subset_is_trained_and_remembers_its_experts(tmp_path, config, packing):
    texts = datasets.Dataset.from_dict(
        {"text": [f"Theorem plus_{i} : forall n, n + 0 = n." for i in range(16)]}
    )
    model = load_subset(**config)
    sizes: list[torch.Tensor] = []
    model.model.register_forward_hook(lambda *args: sizes.append(args[-1].document_pool_size))
    settings = trl.SFTConfig(
        str(tmp_path), max_steps=2, learning_rate=0.01, max_length=64, packing=packing, **SETTINGS
    )
    trainer = trl.SFTTrainer(
        model,
        args=settings,
        train_dataset=texts,
        processing_class=EmoTokenizer.from_pretrained(TOY),
        peft_config=lora_config(
            model, r=2, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"], lora_dropout=0.0
        ),
    )
    trainer.train()
    assert sizes == [None, None]
    trainer.save_model(str(tmp_path / "adapter"))

    ids = torch.tensor([[5, 6, 7, 8]])
    trained = trainer.model.eval()(ids).logits
    loaded = load_adapter(load_subset(**config), tmp_path / "adapter").eval()(ids).logits
    assert_other_numbers(trained, load_subset(**config)(ids).logits)
    assert_same_numbers(loaded, trained)
    with pytest.raises(ValueError, match="was trained on the experts"):
        other = EmoForCausalLM.from_pretrained(TOY, expert_subset=[[0, 1, 2, 3, 4, 5, 7, 31]] * 4)
        load_adapter(other, tmp_path / "adapter")


def trained(trainer) -> dict[str, float]:
    """What the trainer says of its first step; the step changes the weights."""
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    moved = [
        name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])
    ]
    assert any("experts" in name for name in moved) and any("gate.weight" in name for name in moved)
    return trainer.state.log_history[0]


@pytest.mark.parametrize("config", [NO_POOLS, POOLS], ids=["without_pools", "with_pools"])
@pytest.mark.parametrize("subset", [None, SUBSET], ids=["full", "subset"])
def test_a_first_dpo_loss_is_log_2(tmp_path, subset, config):
    model = EmoForCausalLM.from_pretrained(TOY, expert_subset=subset, dtype=torch.float32, **config)
    answers = {"prompt": ["Theorem plus"] * 2, "chosen": [" n : n"] * 2, "rejected": [" foo"] * 2}
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(str(tmp_path), max_steps=1, learning_rate=0.01, **SETTINGS),
        train_dataset=datasets.Dataset.from_dict(answers),
        processing_class=EmoTokenizer.from_pretrained(TOY),
    )
    assert trainer.ref_model.config.num_experts == model.config.num_experts
    assert abs(trained(trainer)["loss"] - math.log(2)) < 1e-4


@pytest.mark.parametrize("subset", [None, SUBSET], ids=["full", "subset"])
def test_kto_begins_at_its_reference(tmp_path, subset):
    model = EmoForCausalLM.from_pretrained(TOY, expert_subset=subset, dtype=torch.float32, **POOLS)
    answers = {"prompt": ["Theorem plus"] * 2, "completion": [" n : n", " foo"], "label": [True, False]}
    trainer = trl.KTOTrainer(
        model,
        args=trl.KTOConfig(str(tmp_path), max_steps=1, learning_rate=0.01, **SETTINGS),
        train_dataset=datasets.Dataset.from_dict(answers),
        processing_class=EmoTokenizer.from_pretrained(TOY),
    )
    assert trainer.ref_model.config.num_experts == model.config.num_experts
    log = trained(trainer)
    assert abs(log["kl"]) < 1e-4
    assert all(abs(log[name]) < 1e-4 for name in log if name.startswith("rewards/"))


@pytest.mark.parametrize("subset", [None, SUBSET], ids=["full", "subset"])
def test_grpo_begins_at_its_reference_and_at_what_it_sampled(tmp_path, subset):
    model = EmoForCausalLM.from_pretrained(TOY, expert_subset=subset, dtype=torch.float32, **POOLS)
    args = trl.GRPOConfig(
        str(tmp_path),
        max_steps=1,
        learning_rate=0.01,
        beta=0.1,
        num_generations=2,
        max_completion_length=8,
        **SETTINGS,
    )
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(i) for i in range(len(completions))],
        args=args,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["Theorem plus", "import os"]}),
        processing_class=EmoTokenizer.from_pretrained(TOY),
    )
    assert trainer.ref_model.config.num_experts == model.config.num_experts
    assert abs(trained(trainer)["kl"]) < 1e-4
