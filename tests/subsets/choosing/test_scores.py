"""Scores of experts: weights, tokens that do not count, and batches in any order."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_same_numbers
from transformers_emo.configuration import LayerExperts
from transformers_emo.subsets.choosing.scores import ExpertOutput, RouterProbability

# What is summed up in float64 is in float32: probabilities of 6 logits, outputs of 8 numbers.
SUMS = {"dtype": torch.float32, "terms": 6 + 2 * 8}
LAYER = LayerExperts(num_experts=6, num_shared=1, always_active=(), top_k=3)


def tokens(seed, count=20):
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(count, 6, generator=generator)
    weights_TK, index_TK = logits_TE[:, :5].softmax(-1).topk(3)
    return {
        "logits": logits_TE,
        "input": torch.randn(count, 8, generator=generator),
        "output": torch.randn(count, 8, generator=generator),
        "index": index_TK,
        "weights": weights_TK,
        "norm": torch.rand(count, 3, generator=generator),
        "weight": torch.randint(0, 3, (count,), generator=generator).double(),
    }


def scored(kind, parts):
    if kind == "probability":
        score = RouterProbability(LAYER)
        for part in parts:
            score.add_logits(part["logits"], part["weight"])
        return score.result()
    score = ExpertOutput(LAYER, kind)
    for part in parts:
        names = ("input", "output", "index", "weights", "norm", "weight")
        score.add_outputs(*(part[name] for name in names))
    return score.result()


@given(st.integers(0, 2**16), st.lists(st.integers(0, 20), max_size=4), st.permutations(range(20)))
@pytest.mark.parametrize("kind", ["probability", "easy_ep", "reap"])
def test_neither_batches_nor_their_order_matter(kind, seed, cuts, order):
    whole = tokens(seed)
    bounds = sorted({0, 20, *cuts})
    order = torch.tensor(order)
    parts = [
        {name: value[order[a:b]] for name, value in whole.items()}
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    assert_same_numbers(scored(kind, parts), scored(kind, [whole]), **SUMS)


@pytest.mark.parametrize("kind", ["probability", "easy_ep", "reap"])
def test_a_token_of_weight_two_counts_twice_and_one_of_weight_zero_does_not(kind):
    whole = tokens(1)
    repeats = whole["weight"].long()
    assert set(repeats.tolist()) == {0, 1, 2}
    copied = {name: value.repeat_interleave(repeats, dim=0) for name, value in whole.items()}
    copied["weight"] = torch.ones(len(copied["weight"]))
    whole["logits"][repeats == 0] = float("nan")
    whole["output"][repeats == 0] = float("nan")
    assert_same_numbers(scored(kind, [whole]), scored(kind, [copied]), **SUMS)


def test_outputs_along_the_input_do_not_count_for_easy_ep():
    part = tokens(2)
    part["output"] = part["input"] * torch.rand(20, 1)
    score = scored("easy_ep", [part])
    assert (score >= 0).all() and score.max() < 1e-5
    assert scored("easy_ep", [part | {"output": -3 * part["input"]}]).max() > 0.1


def test_always_active_experts_have_the_highest_score():
    with_active = RouterProbability(LayerExperts(4, 0, (2,), 2))
    with_active.add_logits(torch.zeros(1, 4), torch.ones(1))
    assert with_active.result().tolist() == [0.25, 0.25, 1.0, 0.25]
