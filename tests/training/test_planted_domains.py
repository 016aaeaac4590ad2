"""Planted domains: with pools each settles on experts of its own, without them it does not.

Four domains with vocabularies of their own. The next token is one of two that the last two tokens decide, by
a random table of the domain: tables are learned by experts, and not by attention.
"""

from itertools import combinations

import pytest
import torch
from transformers_emo import EmoConfig, EmoForCausalLM
from transformers_emo.training import DocumentCollator, EmoTrainer, training_arguments

DOMAINS, TOKENS, LENGTH, EOS = 4, 16, 32, 1
ROUTED, KEPT = 15, 3  # a quarter of the experts is three routed ones and the shared one


def documents(domain: int, number: int, seed: int) -> torch.Tensor:
    """(number, LENGTH) ids, each row a document that ends in EOS."""
    table = torch.randint(TOKENS, (TOKENS, TOKENS, 2), generator=torch.Generator().manual_seed(domain))
    generator = torch.Generator().manual_seed(seed * DOMAINS + domain)
    before, last = torch.randint(TOKENS, (2, number), generator=generator)
    columns = []
    for _ in range(LENGTH - 1):
        columns.append(last + 2 + domain * TOKENS)
        before, last = last, table[before, last, torch.randint(2, (number,), generator=generator)]
    return torch.stack([*columns, torch.full((number,), EOS)], dim=1)


def trained(folder, smallest_pool: int) -> EmoForCausalLM:
    config = EmoConfig(
        vocab_size=2 + DOMAINS * TOKENS,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_experts=ROUTED + 1,
        num_experts_per_tok=3,
        pad_token_id=0,
        eos_token_id=EOS,
        document_pool_min=smallest_pool,
        document_pool_max=ROUTED,
        attention_within_documents=True,
    )
    torch.manual_seed(0)
    model = EmoForCausalLM(config)
    rows = torch.cat([documents(domain, 4000, seed=1) for domain in range(DOMAINS)])
    rows = rows[torch.randperm(len(rows))]
    windows = [{"input_ids": window} for window in rows.reshape(-1, 2 * LENGTH)]
    arguments = training_arguments(
        "pretrain",
        folder,
        max_steps=1500,
        warmup_steps=50,
        per_device_train_batch_size=16,
        logging_steps=100,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    EmoTrainer(model, arguments, DocumentCollator(config), windows).train()
    return model.eval()


@torch.no_grad()
def loss(model, ids) -> float:
    return model(ids, labels=ids).loss.item()


@torch.no_grad()
def favourites(model, domain: int) -> list[list[int]]:
    """The routed experts of each layer that the domain's calibration documents give most probability."""
    logits = model(documents(domain, 16, seed=2), output_router_logits=True).router_logits
    probabilities = [layer[:, :ROUTED].softmax(-1).mean(0) for layer in logits]
    return [layer.topk(KEPT).indices.sort().values.tolist() for layer in probabilities]


def rises_and_overlap(model) -> tuple[list[float], float]:
    """How each domain's loss rises with a quarter of the experts, and how alike the domains' sets are."""
    chosen = [favourites(model, domain) for domain in range(DOMAINS)]
    rises = []
    for domain, layers in enumerate(chosen):
        test = documents(domain, 64, seed=3)
        with model.use_experts([[*ids, ROUTED] for ids in layers]):
            quarter = loss(model, test)
        rises.append(quarter - loss(model, test))
    shared = [
        len(set(a) & set(b)) / KEPT
        for one, other in combinations(chosen, 2)
        for a, b in zip(one, other, strict=True)
    ]
    return rises, sum(shared) / len(shared)


@pytest.mark.slow
def test_pools_give_each_domain_experts_of_its_own(tmp_path):
    rises, overlap = rises_and_overlap(trained(tmp_path, smallest_pool=2))
    standard_rises, standard_overlap = rises_and_overlap(trained(tmp_path, smallest_pool=ROUTED))
    print(f"rises {rises}, overlap {overlap:.2f}; standard {standard_rises}, {standard_overlap:.2f}")
    assert max(rises) < 0.15
    assert min(standard_rises) > 0.5
    assert overlap < min(0.25, standard_overlap)
