"""Experts never to use: by masks, when loading and when choosing."""

import pytest
import torch
from tolerances import assert_same_numbers, clear_words
from transformers import AutoModelForCausalLM
from transformers_emo import EmoConfig, ExpertSubset, SubsetError, select_experts
from transformers_emo.subsets.exclusion import remaining_subset

INPUT_IDS = torch.tensor([[5, 17, 60, 2, 33, 8, 90], [44, 44, 3, 71, 12, 9, 28]])
NEVER = {0: [1, 3], 2: [0]}
REMAINING = [[0, 2, *range(4, 12)], list(range(12)), list(range(1, 12))]


def logits(model):
    with torch.no_grad():
        return model(INPUT_IDS).logits


@pytest.mark.parametrize(
    "never",
    [
        NEVER,
        [[1, 3], None, [0]],
        [[1, 3], [], [0]],
        ExpertSubset([[1, 3, 11], [11], [0, 11]]),  # a domain's: the shared expert stays
        {"experts": [[1, 3, 11], [11], [0, 11]]},
    ],
    ids=["by layer", "lists", "empty lists", "subset", "its JSON"],
)
def test_the_rest_remains(make_checkpoint, never, tmp_path):
    folder = make_checkpoint()
    full = AutoModelForCausalLM.from_pretrained(folder)
    expected = AutoModelForCausalLM.from_pretrained(folder, expert_subset=REMAINING)
    got = AutoModelForCausalLM.from_pretrained(folder, exclude_experts=never)
    assert got.config.retained_experts == REMAINING
    assert torch.equal(logits(got), logits(expected))
    with full.use_experts(exclude_experts=never):
        assert_same_numbers(logits(full), logits(expected))
    new = {"max_new_tokens": 6, "do_sample": False}
    words = clear_words(expected, INPUT_IDS, **new)
    assert torch.equal(full.generate(INPUT_IDS, exclude_experts=never, **new), words)


def test_layers_may_be_text_as_json_has_them(make_model):
    config = make_model().config
    assert remaining_subset(None, {"1": [0, 2]}, config) == remaining_subset(None, {1: [0, 2]}, config)
    with pytest.raises(SubsetError, match="no layer 9"):
        remaining_subset(None, {"9": [0]}, config)


def test_a_subset_and_an_exclusion_hold_together(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    subset = ExpertSubset([[0, 1, 2, 3, 11]] * 3)
    subset.save(tmp_path / "subset.json")
    ExpertSubset([[1, 11], [11], [11]]).save(tmp_path / "never.json")
    model = AutoModelForCausalLM.from_pretrained(
        folder, expert_subset=tmp_path / "subset.json", exclude_experts=tmp_path / "never.json"
    )
    assert model.config.retained_experts == [[0, 2, 3, 11], [0, 1, 2, 3, 11], [0, 1, 2, 3, 11]]
    # Of a subset too, ids are those of the root; one that is not there is not used anyway.
    with model.use_experts(exclude_experts={1: [0, 7]}):
        masked = logits(model)
    expected = AutoModelForCausalLM.from_pretrained(
        folder, expert_subset=[[0, 2, 3, 11], [1, 2, 3, 11], [0, 1, 2, 3, 11]]
    )
    assert_same_numbers(masked, logits(expected))


@pytest.mark.parametrize(
    ("never", "message"),
    [
        ({0: [11]}, "Expert 11 of layer 0 cannot be excluded"),
        ({3: [1]}, "There is no layer 3: expected 0 to 2"),
        ([[1]] * 2, "has 2 layers, the model 3"),
        ([[12], [], []], "has no expert 12"),
        ({1: list(range(11))}, "keeps no routed expert in layer 1"),
        ({0: ["a"]}, "names expert 'a'"),
    ],
)
def test_what_cannot_be_excluded_is_refused(make_model, never, message):
    model = make_model()
    with pytest.raises(SubsetError, match=message):
        model.generate(INPUT_IDS, exclude_experts=never)


def test_always_active_experts_cannot_be_excluded():
    config = EmoConfig(
        num_hidden_layers=1,
        num_experts=8,
        num_experts_per_tok=4,
        num_shared_experts=0,
        always_active_experts=[2],
    )
    with pytest.raises(SubsetError, match="Expert 2 of layer 0 cannot be excluded"):
        remaining_subset(None, {0: [2]}, config)
    assert remaining_subset(None, ExpertSubset([[1, 2]]), config).experts == [[0, 2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize("method", ["layerwise", "global", "reap", "random"])
def test_excluded_experts_are_never_chosen(make_model, method):
    model = make_model()
    batches = None if method == "random" else [INPUT_IDS]
    kwargs = {"input_ids": batches, "method": method, "progress": False}
    free = select_experts(model, num_experts=5, **kwargs)
    best = [ids[0] for ids in free.experts]
    subset = select_experts(model, num_experts=5, exclude_experts=[[e] for e in best], **kwargs)
    assert all(e not in ids and len(ids) == 5 for e, ids in zip(best, subset.experts, strict=True))
    assert [scores[e] for e, scores in zip(best, subset.scores, strict=True)] == [None] * 3
    if method != "layerwise":  # the others of the free choice stay, and one comes in
        for old, new in zip(free.experts, subset.experts, strict=True):
            assert set(old[1:]) < set(new)
        assert subset.top(4).experts != subset.experts
    with pytest.raises(SubsetError, match="has 11 to choose from"):
        select_experts(model, num_experts=12, exclude_experts=[[e] for e in best], **kwargs)
