"""A forward through any kind of cache is the forward without, by both names of a cache.

Run on every supported version of Transformers: a cache that is not read gives wrong text and no error.
"""

import copy
import pickle
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from padded_prompts import NEW
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.generation import GenerationMixin
from transformers_emo import EmoForCausalLM, EmoForSequenceClassification, EmoForTokenClassification
from transformers_emo.modeling_emo.pools.prompt_pool import FrozenPools
from transformers_emo.modeling_emo.transformers_differences import CACHE, kept_positions
from version_needs import needs_fp8_cache

IDS = torch.tensor([[5, 17, 40, 8, 22, 9, 60, 13], [33, 2, 71, 12, 90, 44, 3, 50]])
PROMPT = 5
SUBSET = [[0, 2, 3, 5, 7, 11], [1, 2, 4, 6, 8, 11], [0, 3, 4, 9, 10, 11]]
NAMES = ["past_key_values", "cache"]
CACHES = {
    "dynamic": lambda config: DynamicCache(),
    "dynamic, of the config": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=32),
    "offloaded": lambda config: DynamicCache(config=config, offloading=True),
    "offloaded static": lambda config: StaticCache(config=config, max_cache_len=32, offloading=True),
    "quantised": lambda config: QuantizedCache(backend="fp8", config=config),
}
CHOICES = ["full", "subset", "mask", "pools"]


@pytest.fixture(autouse=True)
def moved_at_once(monkeypatch):
    """Offloaded layers are moved while others compute, in order: on a CPU that is done at once."""
    monkeypatch.setattr(torch, "Stream", mock.MagicMock)
    monkeypatch.setattr(torch.cuda, "default_stream", mock.MagicMock())


@pytest.fixture(params=CACHES)
def kind(request):
    if request.param == "quantised":
        needs_fp8_cache()
    return request.param


@pytest.fixture(params=CHOICES)
def choice(request):
    return request.param


@pytest.fixture
def chosen(make_model, make_checkpoint, choice):
    """The model, a context in which it runs, and what `generate` gets."""
    size = {"hidden_size": 64}  # a multiple of what is quantised together
    if choice == "subset":
        model = EmoForCausalLM.from_pretrained(make_checkpoint(**size), expert_subset=SUBSET).eval()
        return model, nullcontext(), {}
    model = make_model(**size)
    if choice == "mask":
        return model, model.use_experts(SUBSET), {}
    return model, nullcontext(), {"document_pool": 5} if choice == "pools" else {}


def check(found, expected, kind: str) -> None:
    """The same logits, as far as a cache of 8 bits can give them."""
    if kind != "quantised":
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    else:
        assert torch.nn.functional.cosine_similarity(found, expected, dim=-1).mean() > 0.95


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_token_by_token_is_all_at_once(chosen, kind, choice, name):
    model, context, settings = chosen
    cache = CACHES[kind](model.config)
    with context:
        if choice == "pools":  # chosen from the prompt by `generate`, and held by any forward after it
            document = torch.zeros_like(IDS[:, :PROMPT])
            expected = model(IDS[:, :PROMPT], document_pool=5, document_ids=document, use_cache=False).logits[
                :, -1:
            ]
            first = model.generate(
                IDS[:, :PROMPT],
                **NEW | settings | {name: cache, "max_new_tokens": 1},
                output_logits=True,
                return_dict_in_generate=True,
            )
            found = first.logits[0][:, None]
            assert isinstance(cache.layers[-1], FrozenPools)
        else:
            expected = model(IDS, use_cache=False).logits
            outputs = [model(IDS[:, :PROMPT], **{name: cache})]
            outputs += [model(IDS[:, i : i + 1], **{name: cache}) for i in range(PROMPT, IDS.shape[1])]
            assert all(output.cache is output.past_key_values is cache for output in outputs)
            found = torch.cat([output.logits for output in outputs], dim=1)
    check(found, expected, kind)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_generation_needs_no_cache(chosen, kind, name):
    model, context, settings = chosen
    settings = NEW | settings | {"return_dict_in_generate": True, "output_logits": True}
    with context:
        expected = model.generate(IDS, use_cache=False, **settings)
        cache = CACHES[kind](model.config)
        found = model.generate(IDS, **{name: cache}, **settings)
    assert found.cache is found.past_key_values is cache
    check(torch.stack(found.logits[:2]), torch.stack(expected.logits[:2]), kind)
    if kind != "quantised":
        assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.parametrize("head", [EmoForSequenceClassification, EmoForTokenClassification])
@pytest.mark.parametrize("name", NAMES)
def test_heads_take_and_give_a_cache_by_both_names(make_model, head, name):
    model = head(make_model().config).eval()
    cache = DynamicCache()
    with torch.no_grad():
        output = model(IDS, use_cache=True, **{name: cache})
    if head is EmoForSequenceClassification:  # the other gives no cache back
        assert output.cache is output.past_key_values is cache
    assert cache.get_seq_length() == IDS.shape[1]


def test_outputs_have_both_names_as_keys_too_and_keep_them_when_copied(make_model):
    model = make_model()
    head = EmoForSequenceClassification(model.config).eval()
    with torch.no_grad():
        outputs = [
            model(IDS),
            model.model(IDS),
            head(IDS, use_cache=True),
            model.generate(IDS, return_dict_in_generate=True, **NEW),
            model.generate(IDS, return_dict_in_generate=True, num_beams=2, **NEW),
        ]
    for output in outputs:
        for same in (output, copy.copy(output), pickle.loads(pickle.dumps(output))):
            cache = same.cache
            assert isinstance(cache, DynamicCache)
            for name in NAMES:
                assert getattr(same, name) is same[name] is same.get(name) is cache and name in same
            assert isinstance(same, type(output)) and len(same.to_tuple()) == len(output.keys())
            assert same.get("no such name", 7) == 7 and "no such name" not in same


def test_two_different_caches_are_refused(make_model):
    model, both = make_model(), {name: DynamicCache() for name in NAMES}
    head = EmoForSequenceClassification(model.config)
    for call in (model, model.model, head, model.generate, model.prepare_inputs_for_generation):
        with pytest.raises(ValueError, match="two names of one argument, and got two different caches"):
            call(IDS, **both)
    cache = DynamicCache()
    with torch.no_grad():
        assert model(IDS, past_key_values=cache, cache=cache).cache is cache
        assert model(IDS, past_key_values=None, cache=cache).logits.shape[1] == IDS.shape[1]
    assert cache.get_seq_length() == 2 * IDS.shape[1]


def test_a_cache_by_another_name_is_refused_and_not_lost(make_model, monkeypatch):
    """As if Transformers changed the name once more."""
    prepare = GenerationMixin.prepare_inputs_for_generation

    def renamed(self, *args, **kwargs):
        inputs = prepare(self, *args, **kwargs)
        return inputs | {"keys_and_values": inputs.pop(CACHE)}

    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", renamed)
    with pytest.raises(TypeError, match="`keys_and_values`, expected `cache` or `past_key_values`"):
        make_model().generate(IDS, **NEW)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpointed_layer_leaves_a_cache_out(make_model, name):
    """It runs twice: the second time it would find what the first put there."""
    model = make_model().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    hidden = model.model.embed_tokens(IDS).detach().requires_grad_()
    positions = model.model.rotary_emb(hidden, torch.arange(IDS.shape[1])[None])
    cache = DynamicCache()
    model.model.layers[0](hidden, position_embeddings=positions, **{name: cache}).sum().backward()
    assert cache.get_seq_length() == 0 and hidden.grad.isfinite().all()


def test_logits_of_positions_of_each_sequence(make_model):
    hidden = torch.randn(2, 8, 3)
    places = torch.tensor([[1, 4], [0, 7]])
    for sequence, kept in enumerate(kept_positions(hidden, places)):
        assert torch.equal(kept, hidden[sequence, places[sequence]])
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, 1] = mask[1, 2:4] = True
    assert torch.equal(kept_positions(hidden, mask), hidden[mask])
    assert torch.equal(kept_positions(hidden, torch.tensor([3, 5])), hidden[:, [3, 5]])
    assert kept_positions(hidden, 0) is hidden


def test_frozen_pools_know_what_is_asked_of_a_layer_of_a_cache():
    """They lie in a cache as one of its layers. What attention alone asks of a layer is not asked of them."""
    from transformers.cache_utils import CacheLayerMixin

    of_attention = {
        "update",
        "lazy_initialization",
        "get_mask_sizes",
        "get_seq_length",
        "get_max_cache_shape",
    }
    asked = {name for name in dir(CacheLayerMixin) if not name.startswith("_")}
    assert asked - of_attention <= set(dir(FrozenPools))
