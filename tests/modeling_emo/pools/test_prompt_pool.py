"""Pools chosen from the prompt: the right experts, frozen, in every way of generating; one clear error."""

import copy
import logging
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from conftest import TOY
from hypothesis import given, settings
from hypothesis import strategies as st
from padded_prompts import NEW, PROMPTS, batch
from tolerances import assert_other_numbers, assert_same_numbers
from transformers import AutoTokenizer, DynamicCache, GenerationConfig, QuantizedCache, StaticCache, pipeline
from transformers_emo import EmoForCausalLM
from transformers_emo.modeling_emo.pools.prompt_pool import FrozenPools, cached_pools, pool_sizes
from version_needs import needs_fp8_cache

DICT = NEW | {"return_dict_in_generate": True, "output_logits": True}
VARIANTS = {
    "released": ({}, 5),
    "no shared": ({"num_shared_experts": 0}, 4),
    "other sizes per layer": ({"num_experts_per_layer": [12, 6, 9]}, 6),
    "a pool size per layer": ({}, [3, 8, 11]),
    "dense first": ({"num_experts_per_layer": [0, 12, 12], "dense_intermediate_size": 40}, [None, 4, 6]),
    "grouped queries": ({"num_key_value_heads": 2}, 5),
}


def fixed(model, dropped):
    """A context in which experts `dropped` (E,) bool of each layer have router logits of minus infinity."""
    bias = {
        id(layer.mlp.gate.weight): torch.zeros(len(out)).masked_fill(out, float("-inf"))
        for layer, out in zip(model.model.layers, dropped, strict=False)
        if out is not None
    }
    linear = torch.nn.functional.linear
    return mock.patch("torch.nn.functional.linear", lambda x, w, b=None: linear(x, w, bias.get(id(w), b)))


@torch.no_grad()
def naive_pools(model, prompt, sizes):
    """The pools of one prompt, layer by layer, each from a new run with the layers before restricted."""
    dropped = []
    for index, (layer, size) in enumerate(zip(model.config.layer_experts, sizes, strict=True)):
        if layer.is_dense:
            dropped.append(None)
            continue
        with fixed(model, dropped):
            routers = model(torch.tensor([prompt]), output_router_logits=True).router_logits
        logits = routers[index - dropped.count(None)][:, : layer.num_routed]
        sums = logits.softmax(-1).sum(0).tolist()
        best = sorted(range(layer.num_routed), key=lambda e: -sums[e])[:size]
        out = torch.ones(layer.num_experts, dtype=torch.bool)
        out[layer.num_routed :] = False
        out[best] = False
        dropped.append(out)
    return dropped


@torch.no_grad()
def naive_generate(model, tokens, dropped, steps=7):
    """Greedy tokens of one sequence and their logits: the whole sequence anew for every token, no cache."""
    tokens, logits = list(tokens), []
    with fixed(model, dropped):
        for _ in range(steps):
            logits.append(model(torch.tensor([tokens]), use_cache=False).logits[0, -1])
            tokens.append(int(logits[-1].argmax()))
    return tokens, torch.stack(logits)


@pytest.fixture(params=VARIANTS)
def variant(request, make_model):
    changes, pool = VARIANTS[request.param]
    return make_model(**changes), pool


def test_generation_is_a_forward_with_the_pools_of_each_prompt_fixed(variant):
    model, pool = variant
    out = model.generate(**batch(), document_pool=pool, **DICT)
    frozen = cached_pools(out.past_key_values)
    sizes = pool_sizes(model.config, pool)
    for row, prompt in enumerate(PROMPTS):
        dropped = naive_pools(model, prompt, sizes)
        for layer, outside_BR, expected in zip(
            model.config.layer_experts, frozen.outside, dropped, strict=True
        ):
            assert (outside_BR is None) == layer.is_dense
            if outside_BR is not None:
                assert torch.equal(outside_BR[row], expected[: layer.num_routed])
        tokens, logits = naive_generate(model, prompt, dropped)
        assert out.sequences[row, -len(tokens) :].tolist() == tokens
        assert_same_numbers(torch.stack(out.logits)[:, row], logits)
    plain = model.generate(**batch(), **DICT)
    assert_other_numbers(plain.logits[0], out.logits[0])  # the pools do matter here


def test_pools_are_those_of_training_with_the_prompt_as_one_document(make_model):
    model = make_model()
    prompt = torch.tensor([PROMPTS[0]])  # with an EOS inside
    out = model.generate(prompt, document_pool=5, **DICT)
    document = torch.zeros_like(prompt)
    with torch.no_grad():
        trained = model(prompt, document_pool=5, document_ids=document, use_cache=False).logits
    assert_same_numbers(out.logits[0], trained[:, -1])
    with torch.no_grad():  # the same with the lengths drawn in training
        model.train()
        sizes = torch.full((3, 1), 5)
        trained = model(prompt, document_pool_sizes=sizes, document_ids=document, use_cache=False).logits
    assert_same_numbers(out.logits[0], trained[:, -1])


@pytest.mark.parametrize("two_shared", [False, True])
@pytest.mark.parametrize(
    "way",
    [
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "max_cache_len": 64},
        {"cache_implementation": "sliding_window"},
        {"cache_implementation": "hybrid"},
        {"cache_implementation": "hybrid_chunked"},
        {"cache_implementation": "offloaded"},
        {"cache_implementation": "offloaded_static"},
        {"past_key_values": DynamicCache},
        {"past_key_values": StaticCache},
        {"prefill_chunk_size": 1},
        {"prefill_chunk_size": 3},
        {"prefill_chunk_size": 3, "cache_implementation": "static"},
    ],
    ids=str,
)
def test_every_cache_gives_the_same_tokens(make_model, monkeypatch, way, two_shared):
    if "offloaded" in way.get("cache_implementation", ""):
        # Layers are moved while others compute, in order: on a CPU that is done at once.
        monkeypatch.setattr(torch, "Stream", mock.MagicMock)
        monkeypatch.setattr(torch.cuda, "default_stream", mock.MagicMock())
    model = make_model(**{"num_shared_experts": 2} if two_shared else {})
    expected = model.generate(**batch(), document_pool=4, **DICT)
    if way.get("past_key_values") is StaticCache:
        way = {"past_key_values": StaticCache(config=model.config, max_cache_len=32)}
    elif "past_key_values" in way:
        way = {"past_key_values": DynamicCache()}
    out = model.generate(**batch(), document_pool=4, **DICT | way)
    assert torch.equal(out.sequences, expected.sequences)
    assert_same_numbers(torch.stack(out.logits), torch.stack(expected.logits))


def test_chunks_bound_what_goes_through_the_experts_at_once(make_model):
    model, seen = make_model(), []
    model.model.layers[1].mlp.experts.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    model.generate(**batch(), document_pool=4, prefill_chunk_size=3, **NEW)
    assert seen[:3] == [6, 6, 4] and set(seen[3:]) == {2}  # 8 tokens of two sequences, then one of each


def test_quantised_cache(make_model):
    needs_fp8_cache()
    model = make_model(hidden_size=64)
    settings = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    out = model.generate(**batch(), document_pool=4, **DICT | settings)
    expected = model.generate(**batch(), document_pool=4, **DICT)
    assert isinstance(out.past_key_values, QuantizedCache)
    assert torch.equal(
        cached_pools(out.past_key_values).outside[0], cached_pools(expected.past_key_values).outside[0]
    )
    similar = torch.nn.functional.cosine_similarity(
        torch.stack(out.logits), torch.stack(expected.logits), dim=-1
    )
    assert similar.mean() > 0.95


@pytest.mark.parametrize("changes", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_beams_keep_the_pools_of_their_prompt(make_model, changes):
    model = make_model()
    scores = NEW | {"return_dict_in_generate": True, "output_scores": True} | changes
    out = model.generate(**batch(), document_pool=4, **scores)
    anew = model.generate(**batch(), document_pool=4, use_cache=False, **scores)
    assert torch.equal(out.sequences, anew.sequences)
    assert_same_numbers(out.sequences_scores, anew.sequences_scores)
    alone = model.generate(torch.tensor([PROMPTS[1]]), document_pool=4, **scores)
    returned = changes.get("num_return_sequences", 1)
    assert_same_numbers(out.sequences_scores[returned:], alone.sequences_scores)


def replayed(model, sequence, prompt, dropped):
    """The log-probabilities of what was generated behind a prompt, in one run without a cache."""
    tokens = sequence.tolist()[-len(prompt) - 7 :]
    with torch.no_grad(), fixed(model, dropped):
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -8:-1]
    return logits, logits.log_softmax(-1).gather(1, torch.tensor(tokens[-7:])[:, None])[:, 0]


@pytest.mark.parametrize(
    "way",
    [
        {"num_beams": 3, "num_return_sequences": 3},
        {"num_beams": 4, "num_return_sequences": 2, "do_sample": True},
        {"num_beams": 3, "num_return_sequences": 2, "cache_implementation": "static"},
        {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.0, "use_cache": False},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "num_return_sequences": 2, "cache_implementation": "static"},
    ],
    ids=str,
)
def test_all_sequences_returned_are_scored_within_the_pools_of_their_prompt(make_model, way):
    model, returned = make_model(), way["num_return_sequences"]
    torch.manual_seed(0)
    out = model.generate(**batch(), document_pool=4, output_scores=True, **DICT | way)
    assert len(out.sequences) == 2 * returned
    for row, prompt in enumerate(PROMPTS):
        dropped = naive_pools(model, prompt, [4, 4, 4])
        for number in range(row * returned, (row + 1) * returned):
            logits, chosen = replayed(model, out.sequences[number], prompt, dropped)
            if "num_beams" not in way:
                got = torch.stack(out.logits)[:, number]
                assert_same_numbers(got, logits)
            else:
                length = 7 ** way.get("length_penalty", 1.0)
                score = out.sequences_scores[number]
                assert_same_numbers(score, chosen.sum() / length)


@pytest.mark.parametrize("use_cache", [True, False])
def test_prompts_may_be_embeddings(make_model, use_cache):
    model = make_model()
    words = batch()
    words["inputs_embeds"] = model.model.embed_tokens(words.pop("input_ids")).detach()
    out = model.generate(**words, document_pool=4, use_cache=use_cache, **DICT)
    expected = model.generate(**batch(), document_pool=4, **DICT)
    assert_same_numbers(torch.stack(out.logits), torch.stack(expected.logits))


def test_sampled_sequences_of_one_prompt_share_its_pools(make_model):
    model = make_model()
    out = model.generate(**batch(), document_pool=4, **DICT | {"do_sample": True, "num_return_sequences": 3})
    outside_BR = cached_pools(out.past_key_values).outside[1].view(2, 3, -1)
    assert (outside_BR == outside_BR[:, :1]).all() and not torch.equal(outside_BR[0], outside_BR[1])


@pytest.mark.parametrize("assistant", ["another EMO", "its own first layer", "prompt lookup"])
def test_assisted_generation_chooses_from_the_prompt_alone(make_model, assistant):
    model = make_model()
    prompt = torch.tensor([[5, 17, 60, 5, 17, 60, 5, 17]])
    expected = model.generate(prompt, document_pool=4, **DICT)
    with_help = {"prompt_lookup_num_tokens": 3}
    if assistant == "another EMO":
        with_help = {"assistant_model": make_model(1)}
    elif assistant == "its own first layer":
        with_help = {"assistant_early_exit": 1}
    out = model.generate(prompt, document_pool=4, **DICT | with_help)
    assert torch.equal(out.sequences, expected.sequences)
    for got, same in zip(
        cached_pools(out.past_key_values).outside, cached_pools(expected.past_key_values).outside, strict=True
    ):
        assert torch.equal(got, same)


def test_the_generation_config_may_ask_for_pools():
    model = EmoForCausalLM.from_pretrained(TOY)
    options = {**batch(), "max_new_tokens": 5, "do_sample": False}
    plain, pooled = model.generate(**options), model.generate(**options, document_pool=4)
    assert not plain.equal(pooled)
    given = GenerationConfig(document_pool=4, pad_token_id=0)
    assert model.generate(**options, generation_config=given).equal(pooled)
    model.generation_config.document_pool = 4
    assert model.generate(**options).equal(pooled)
    assert model.generate(**options, document_pool=False).equal(plain)


def test_the_pipeline_takes_a_pool():
    model = EmoForCausalLM.from_pretrained(TOY)
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"document_pool": 4, "max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    [got] = write("Theorem plus_comm : forall", **options)
    ids = tokenizer("Theorem plus_comm : forall", return_tensors="pt")
    options.pop("return_full_text")
    expected = model.generate(**ids, **options)[0, ids["input_ids"].shape[1] :]
    assert got["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_pipeline_made_with_a_pool_gives_every_text_of_a_batch_its_own():
    model = EmoForCausalLM.from_pretrained(TOY)
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    prompts = ["Theorem plus_comm : forall", "import os"]
    options = {"document_pool": 4, "max_new_tokens": 5, "do_sample": False}
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2, **options)
    for prompt, [got] in zip(prompts, write(prompts), strict=True):
        expected = model.generate(**tokenizer(prompt, return_tensors="pt"), **options)[0]
        assert got["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)


class TestConversation:
    """A cache that comes back, with the pools in it."""

    def test_goes_on_with_the_pools_of_its_first_prompt(self, make_model):
        model = make_model()
        prompt = PROMPTS[0]
        dropped = naive_pools(model, prompt, [4, 4, 4])
        first = model.generate(torch.tensor([prompt]), document_pool=4, **DICT)
        more = [*first.sequences[0].tolist(), 7, 20, 51]
        tokens, logits = naive_generate(model, more, dropped)
        for again in ({}, {"document_pool": 4}, {"prefill_chunk_size": 2}):
            cache = copy.deepcopy(first.past_key_values)
            out = model.generate(torch.tensor([more]), past_key_values=cache, **DICT | again)
            assert out.sequences[0].tolist() == tokens
            assert_same_numbers(torch.stack(out.logits)[:, 0], logits)
        with torch.no_grad():
            step = model(out.sequences[:, -1:], past_key_values=out.past_key_values).logits
        assert_same_numbers(step[0, -1], naive_generate(model, tokens, dropped, 1)[1][0])

    def test_of_sequences_picked_and_repeated(self, make_model):
        model = make_model()
        first = model.generate(**batch(), document_pool=4, **DICT)
        before = [outside.clone() for outside in cached_pools(first.past_key_values).outside]
        cache = first.past_key_values
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(2)
        for outside_BR, old_BR in zip(cached_pools(cache).outside, before, strict=True):
            assert torch.equal(outside_BR, old_BR[[1, 1]])
        sequences = torch.cat([first.sequences[[1, 1]], torch.tensor([[7], [20]])], dim=1)
        mask = torch.cat([batch()["attention_mask"][[1, 1]], torch.ones(2, 8, dtype=torch.long)], dim=1)
        out = model.generate(sequences, attention_mask=mask, past_key_values=cache, **DICT)
        dropped = naive_pools(model, PROMPTS[1], [4, 4, 4])
        for row in (0, 1):
            tokens, _ = naive_generate(model, sequences[row, 3:].tolist(), dropped)
            assert out.sequences[row, 3:].tolist() == tokens

    def test_a_cache_that_was_reset_takes_new_pools(self, make_model):
        model = make_model()
        cache = StaticCache(config=model.config, max_cache_len=32)
        model.generate(torch.tensor([PROMPTS[0]]), document_pool=4, past_key_values=cache, **NEW)
        cache.reset()
        assert cached_pools(cache) is None
        got = model.generate(torch.tensor([PROMPTS[1]]), document_pool=6, past_key_values=cache, **NEW)
        assert torch.equal(got, model.generate(torch.tensor([PROMPTS[1]]), document_pool=6, **NEW))
        assert cached_pools(cache).sizes == (6, 6, 6)

    def test_false_leaves_the_pools(self, make_model):
        model = make_model()
        prompt = torch.tensor([PROMPTS[0]])
        first = model.generate(prompt, document_pool=4, **DICT)
        out = model.generate(
            first.sequences, past_key_values=first.past_key_values, **DICT | {"document_pool": False}
        )
        cache = model.generate(prompt, document_pool=4, **DICT).past_key_values
        cache.layers.pop()
        expected = model.generate(first.sequences, past_key_values=cache, **DICT)
        assert torch.equal(out.sequences, expected.sequences)
        assert torch.equal(model.generate(prompt, document_pool=False, **NEW), model.generate(prompt, **NEW))

    def test_refuses_what_does_not_fit(self, make_model):
        model = make_model()
        prompt = torch.tensor([PROMPTS[0]])
        plain = model.generate(prompt, **DICT)
        with pytest.raises(ValueError, match="were read without document pools"):
            model.generate(plain.sequences, past_key_values=plain.past_key_values, document_pool=4, **NEW)
        pooled = model.generate(prompt, document_pool=4, **DICT)
        with pytest.raises(ValueError, match=r"\[4, 4, 4\].*asks for \[5, 5, 5\]"):
            model.generate(pooled.sequences, past_key_values=pooled.past_key_values, document_pool=5, **NEW)
        with pytest.raises(ValueError, match="other prompts or of another model"):
            model(torch.tensor([[3], [4]]), past_key_values=pooled.past_key_values)


def test_the_decode_step_compiles_into_one_graph(make_model):
    model = make_model()
    model.set_experts_implementation("batched_mm")
    prompt = torch.tensor(PROMPTS[:1] * 2)
    cache = StaticCache(config=model.config, max_cache_len=24)
    step = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    first = model.generate(prompt, document_pool=4, past_key_values=cache, **NEW | {"max_new_tokens": 1})
    token, tokens = first[:, -1], [first[:, -1]]
    with torch.no_grad():
        for _ in range(3):
            position = torch.full((2, 1), int(cache.get_seq_length()))
            token = (
                step(token[:, None], past_key_values=cache, position_ids=position).logits[:, -1].argmax(-1)
            )
            tokens.append(token)
    expected = model.generate(prompt, document_pool=4, **NEW | {"max_new_tokens": 4})
    assert torch.equal(torch.stack(tokens, 1), expected[:, prompt.shape[1] :])


def test_pools_are_chosen_among_the_experts_of_a_subset(make_model):
    model = make_model()
    subset = [[0, 1, 2, 3, 4, 5, 6, 11]] * 3
    out = model.generate(**batch(), document_pool=4, expert_subset=subset, **DICT)
    for outside_BR in cached_pools(out.past_key_values).outside:
        assert outside_BR[:, 7:].all() and (~outside_BR).sum(-1).tolist() == [4, 4]


def test_the_largest_pool_restricts_nothing(make_model):
    model = make_model()
    out = model.generate(**batch(), document_pool=11, **DICT)
    plain = model.generate(**batch(), **DICT)
    assert_same_numbers(torch.stack(out.logits), torch.stack(plain.logits))


def test_threads_have_pools_of_their_own(make_model):
    model = make_model()
    sizes = [None, 3, 5, 8]

    def generate(size):
        return model.generate(**batch(), document_pool=size, **NEW)

    expected = [generate(size) for size in sizes]
    with ThreadPoolExecutor(4) as threads:
        for got, alone in zip(threads.map(generate, sizes * 3), expected * 3, strict=True):
            assert torch.equal(got, alone)


def test_generating_in_training_mode_counts_no_losses(make_model):
    model = make_model(document_pool_min=3, document_pool_max=11)
    expected = model.generate(**batch(), document_pool=4, **NEW)
    assert torch.equal(model.train().generate(**batch(), document_pool=4, **NEW), expected)


def test_true_is_the_size_of_the_config(make_model):
    model = make_model(document_pool_eval=4)
    expected = model.generate(**batch(), document_pool=4, **NEW)
    assert torch.equal(model.generate(**batch(), document_pool=True, **NEW), expected)


def test_true_is_all_experts_of_a_subset_that_has_fewer_than_the_config_says(make_checkpoint, caplog):
    folder = make_checkpoint(document_pool_eval=7)
    model = EmoForCausalLM.from_pretrained(
        folder, expert_subset=[[0, 3, 4, 5, 11], [2, 3, 4, 11], [8, 9, 10, 11]]
    )
    assert model.config.document_pool_eval == 7
    with caplog.at_level(logging.WARNING):
        got = model.generate(**batch(), document_pool=True, **NEW)
    assert "`config.document_pool_eval` is 7, and no layer has more than 4 routed" in caplog.text
    assert torch.equal(got, model.generate(**batch(), document_pool=4, **NEW))
    assert torch.equal(got, model.generate(**batch(), **NEW))
    with pytest.raises(ValueError, match="`document_pool` is 7 in layer 0, expected an integer from"):
        model.generate(**batch(), document_pool=7, **NEW)


@settings(deadline=None)
@given(data=st.data(), size=st.integers(1, 5), repeats=st.integers(1, 3))
def test_pools_follow_their_sequences(data, size, repeats):
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=6))
    pools = FrozenPools([2, 0])
    pools.outside[0] = torch.arange(size)[:, None] == torch.arange(5)  # one row for each sequence
    assert pools.is_chosen
    pools.batch_repeat_interleave(repeats)
    picked = [sequence * repeats for sequence in indices]
    pools.batch_select_indices(torch.tensor(picked))
    pools.crop(-1)
    assert pools.outside[0].int().argmax(-1).tolist() == indices and pools.outside[1] is None
