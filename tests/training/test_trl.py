"""TRL's `SFTTrainer` trains EMO and its adapters; skipped where TRL is not installed.

Its loss is its own: it asks the decoder for hidden states, and the losses of document pools are not in it.
"""

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
        str(tmp_path),
        max_steps=2,
        learning_rate=0.01,
        per_device_train_batch_size=2,
        max_length=64,
        packing=packing,
        router_aux_loss_coef=0.0,  # otherwise Mixtral's, which takes shared experts for routed ones
        bf16=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
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
    assert all(3 <= size <= 7 for size in sizes) if config is POOLS else sizes == [None, None]
    trainer.save_model(str(tmp_path / "adapter"))

    ids = torch.tensor([[5, 6, 7, 8]])
    trained = trainer.model.eval()(ids).logits
    loaded = load_adapter(load_subset(**config), tmp_path / "adapter").eval()(ids).logits
    assert_other_numbers(trained, load_subset(**config)(ids).logits)
    assert_same_numbers(loaded, trained)
    with pytest.raises(ValueError, match="was trained on the experts"):
        other = EmoForCausalLM.from_pretrained(TOY, expert_subset=[[0, 1, 2, 3, 4, 5, 7, 31]] * 4)
        load_adapter(other, tmp_path / "adapter")
