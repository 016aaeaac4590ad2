"""Document pools in a cache, and the experts of the model it is used with: swapped, masked or of a twin."""

import copy

import pytest
import torch
from transformers_emo import EmoForCausalLM

PROMPT = torch.tensor([[5, 17, 60, 2, 33, 8, 90], [44, 44, 3, 71, 12, 9, 28]])
KWARGS = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
FIRST = [[0, 1, 2, 3, 4, 11]] * 3
SECOND = [[5, 6, 7, 8, 9, 11]] * 3


@pytest.fixture
def folder(make_checkpoint):
    return make_checkpoint()


def go_on(model, first, **kwargs):
    """The next turn of a conversation."""
    more = torch.cat([first.sequences, PROMPT[:, :2]], dim=1)
    cache = copy.deepcopy(first.past_key_values)
    return model.generate(more, past_key_values=cache, output_logits=True, **KWARGS | kwargs)


def test_pools_of_experts_that_were_swapped_are_refused(folder):
    model = EmoForCausalLM.from_pretrained(folder, expert_subset=FIRST)
    first = model.generate(PROMPT, document_pool=4, **KWARGS)
    before = go_on(model, first).sequences
    twin = model.share_backbone(SECOND)
    with pytest.raises(ValueError, match="other experts than the model holds"):
        go_on(twin, first)
    model.swap_experts(SECOND)
    with pytest.raises(ValueError, match="other experts than the model holds"):
        go_on(model, first)
    with pytest.raises(ValueError, match="other experts than the model holds"):
        model(PROMPT[:, :1], past_key_values=first.past_key_values)
    assert go_on(model, first, document_pool=False).sequences.shape == before.shape
    model.swap_experts(FIRST)
    assert torch.equal(go_on(model, first).sequences, before)


def test_pools_without_an_expert_under_the_mask_are_refused(folder):
    model = EmoForCausalLM.from_pretrained(folder)
    first = model.generate(PROMPT, document_pool=4, expert_subset=FIRST, **KWARGS)
    for masked in ({"expert_subset": SECOND}, {"exclude_experts": [ids[:-1] for ids in FIRST]}):
        with pytest.raises(ValueError, match="may be used in layer 0"):
            go_on(model, first, **masked)
        with model.use_experts(**masked), pytest.raises(ValueError, match="may be used in layer 0"):
            model(PROMPT[:, :1], past_key_values=first.past_key_values)


def test_pools_stay_under_a_mask_that_allows_some_of_their_experts(folder):
    model = EmoForCausalLM.from_pretrained(folder)
    first = model.generate(PROMPT, document_pool=4, expert_subset=FIRST, **KWARGS)
    expected = go_on(model, first)  # of a pool, its mask leaves all
    assert torch.equal(go_on(model, first, expert_subset=FIRST).sequences, expected.sequences)
    some = [sorted({*ids[:3], *SECOND[0]}) for ids in FIRST]
    assert torch.stack(go_on(model, first, expert_subset=some).logits).isfinite().all()
