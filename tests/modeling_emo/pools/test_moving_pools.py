"""Pools that follow the text: chosen again from what the router wanted of late, for each row by itself."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TOY
from padded_prompts import NEW, PROMPTS, batch
from tolerances import assert_same_numbers
from transformers import AutoTokenizer, DynamicCache
from transformers_emo import EmoForCausalLM
from transformers_emo.modeling_emo.pools.moving_pools import PoolMoves, followed_shares, moved, pool_moves
from transformers_emo.modeling_emo.pools.prompt_pool import PromptPool, cached_pools

DICT = NEW | {"return_dict_in_generate": True, "do_sample": False}
TINY = Path("model_cards/emo-tiny")


@pytest.fixture(scope="module")
def model():
    return EmoForCausalLM.from_pretrained(TOY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tiny():
    return EmoForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def document(domain):
    line = (TINY / "documents" / f"{domain}.jsonl").open(encoding="utf-8").readline()
    return AutoTokenizer.from_pretrained(TINY)(json.loads(line)["text"], return_tensors="pt").input_ids


def losses(model, ids, prompt, pool, moves=None):
    """The mean loss of the tokens behind a prompt, read one by one, and the cache."""
    cache, found = DynamicCache(config=model.config), []
    choice = PromptPool((pool,) * 4, torch.ones(1, prompt, dtype=torch.bool), moves=moves)
    with torch.no_grad():
        out = model(ids[:, :prompt], past_key_values=cache, use_cache=True, prompt_pool=choice)
        for place in range(prompt, ids.shape[1]):
            found.append(torch.nn.functional.cross_entropy(out.logits[:, -1], ids[:, place]))
            out = model(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
    return torch.stack(found).mean().item(), cached_pools(cache)


def test_a_token_counts_half_after_so_many_more():
    probs = torch.rand(2, 12, 5).softmax(-1)
    shares = torch.zeros(2, 5)
    at_once = followed_shares(shares, probs, every=4)
    for token in probs.split(1, dim=1):
        shares = followed_shares(shares, token, every=4)
    assert_same_numbers(shares, at_once)
    weights = 0.5 ** (torch.arange(11, -1, -1) / 4)
    expected = (weights[None, :, None] * probs).sum(1) * (1 - 0.5**0.25)
    assert_same_numbers(at_once, expected)


def test_padding_does_not_count():
    probs = torch.rand(1, 6, 5).softmax(-1)
    before = torch.rand(1, 5)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0]]).bool()
    found = followed_shares(before, probs, 3, mask)
    assert_same_numbers(found, followed_shares(before, probs[mask][None], 3))


def test_only_pools_with_too_much_outside_move_and_forbidden_experts_stay_out():
    outside = torch.tensor([[False, True, True]] * 3)
    shares = torch.tensor([[0.7, 0.3, 0.0], [0.4, 0.5, 0.1], [0.4, 0.5, 0.1]])
    allowed = torch.tensor([[True, True, True], [True, True, True], [True, False, True]])
    assert moved(outside, shares, 1, 0.4, allowed).tolist() == [
        [False, True, True],
        [True, False, True],
        [False, True, True],  # what it wants most is not allowed, and of the rest most is inside
    ]
    assert moved(outside[:1], shares[:1], 1, 0.0, allowed[:1]).tolist() == outside[:1].tolist()
    nothing_left = torch.tensor([[False, False, True]])
    assert moved(outside[:1], shares[:1], 1, 0.9, nothing_left).tolist() == [[True, True, False]]


def test_a_pool_is_that_of_the_router_of_late_and_the_text_within_it_follows(model):
    prompt = torch.tensor([PROMPTS[0]])
    out = model.generate(prompt, document_pool=8, move_pool_every=3, **DICT | {"max_new_tokens": 7})
    pools = cached_pools(out.past_key_values)
    # The same by hand: the first layer sees the same tokens whatever the pools are.
    ids = out.sequences[:, :-1]
    with torch.no_grad():
        logits = model(ids, document_pool=False, output_router_logits=True).router_logits[0]
    probs = logits[:, : model.config.layer_experts[0].num_routed].float().softmax(-1)
    shares = probs[: prompt.shape[1]].mean(0, keepdim=True)
    shares = followed_shares(shares, probs[None, prompt.shape[1] :], 3)
    assert pools.since[0] == 0  # six tokens behind the prompt: twice three
    assert torch.equal(
        ~pools.outside[0][0], torch.zeros(probs.shape[1]).index_fill(0, shares[0].topk(8).indices, 1).bool()
    )


@pytest.mark.parametrize("every", [1, 4])
def test_rows_of_a_batch_move_as_they_would_alone(model, every):
    inputs = batch()
    kwargs = DICT | {"document_pool": 6, "move_pool_every": every, "max_new_tokens": 9, "min_new_tokens": 9}
    together = model.generate(**inputs, **kwargs)
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(torch.tensor([prompt]), **kwargs)
        assert torch.equal(alone.sequences[0, len(prompt) :], together.sequences[row, -9:])
        for one, all_rows in zip(
            cached_pools(alone.past_key_values).outside,
            cached_pools(together.past_key_values).outside,
            strict=True,
        ):
            assert torch.equal(one[0], all_rows[row])


def test_pools_stay_unless_they_are_asked_to_move(model):
    prompt = torch.tensor([PROMPTS[0]])
    stays = model.generate(prompt, document_pool=6, **DICT)
    off = model.generate(prompt, document_pool=6, move_pool_every=0, **DICT)
    never = model.generate(prompt, document_pool=6, move_pool_every=1, move_pool_above=0.999, **DICT)
    for other in (off, never):
        assert torch.equal(stays.sequences, other.sequences)
        for one, two in zip(
            cached_pools(stays.past_key_values).outside,
            cached_pools(other.past_key_values).outside,
            strict=True,
        ):
            assert torch.equal(one, two)


def test_a_conversation_can_begin_to_move_and_stop_again(model):
    out = model.generate(torch.tensor([PROMPTS[0]]), document_pool=6, **DICT)
    before = [each.clone() for each in cached_pools(out.past_key_values).outside]
    more = torch.cat([out.sequences, torch.tensor([PROMPTS[1]])], dim=1)
    out = model.generate(more, past_key_values=out.past_key_values, move_pool_every=2, **DICT)
    pools = cached_pools(out.past_key_values)
    assert any(not torch.equal(*pair) for pair in zip(before, pools.outside, strict=True))
    assert all((~each).sum() == 6 for each in pools.outside)
    after = [each.clone() for each in pools.outside]
    model.generate(out.sequences, past_key_values=out.past_key_values, move_pool_every=0, **DICT)
    assert all(torch.equal(*pair) for pair in zip(after, pools.outside, strict=True))


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_they_move_with_beams_and_several_texts(model, how):
    torch.manual_seed(0)
    inputs = batch()
    out = model.generate(**inputs, document_pool=6, move_pool_every=2, **DICT | how)
    assert all((~each).sum(1).eq(6).all() for each in cached_pools(out.past_key_values).outside)


def test_they_keep_to_a_subset(model):
    subset = [[*range(0, 20), 31]] * 4
    out = model.generate(
        torch.tensor([PROMPTS[0]]), expert_subset=subset, document_pool=6, move_pool_every=2, **DICT
    )
    assert all(each[:, 20:].all() for each in cached_pools(out.past_key_values).outside)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"move_pool_every": 8}, "`document_pool`"),
        ({"move_pool_every": 8, "document_pool": False}, "`document_pool`"),
        ({"move_pool_every": -1, "document_pool": 8}, "move_pool_every` is -1"),
        ({"move_pool_every": 1.5, "document_pool": 8}, "move_pool_every` is 1.5"),
        ({"move_pool_every": 8, "move_pool_above": 1, "document_pool": 8}, "move_pool_above` is 1"),
        ({"move_pool_above": 0.3, "document_pool": 8}, "give both"),
        ({"move_pool_above": 0.3, "move_pool_every": 0, "document_pool": 8}, "give both"),
    ],
)
def test_what_makes_no_sense_is_refused(model, arguments, words):
    with pytest.raises(ValueError, match=words):
        model.generate(torch.tensor([PROMPTS[0]]), **arguments, **NEW)
    assert pool_moves(None, None) is None and pool_moves(0, None) is None
    plain, off = (
        model.generate(torch.tensor([PROMPTS[0]]), **NEW, **extra) for extra in ({}, {"move_pool_every": 0})
    )
    assert torch.equal(plain, off)


def test_after_a_change_of_topic_pools_that_move_lose_little(tiny):
    proofs, german = document("metamath")[:, :120], document("german")[:, :160]
    ids, prompt = torch.cat([proofs, german], dim=1), proofs.shape[1]
    stays, _ = losses(tiny, ids, prompt, 15)
    moves, pools = losses(tiny, ids, prompt, 15, PoolMoves(16))
    full, _ = losses(tiny, ids, prompt, 63)
    assert moves - full < 0.4 * (stays - full)
    assert stays - full > 1  # the pools of the prompt are no good for what follows
    assert all((~each).sum() == 15 for each in pools.outside)


def test_with_expert_memory_the_report_says_what_moving_costs(tiny):
    english, python = document("english")[:, :60], document("python")[:, :60]
    ids = torch.cat([english, python], dim=1)
    paged = EmoForCausalLM.from_pretrained(TINY, dtype=torch.float32, expert_memory="5MB")
    settings = {"document_pool": 15, "max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    plain = paged.generate(english, **settings)
    assert paged.expert_memory.report().pool_moves == 0
    assert torch.equal(plain, tiny.generate(english, **settings))
    paged.expert_memory.reset_counts()
    found = paged.generate(ids, move_pool_every=4, **settings)
    assert torch.equal(found, tiny.generate(ids, move_pool_every=4, **settings))
    report = paged.expert_memory.report()
    assert report.pool_moves > 0
    assert 0 < report.moves_bytes_read <= min(report.bytes_read, report.pool_moves * report.expert_bytes)
    assert f"{report.pool_moves} experts came into pools" in str(report)
