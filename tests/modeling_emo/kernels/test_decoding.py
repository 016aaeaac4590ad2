"""A token of each sequence through a layer in two calls: the same numbers, and only where nobody looks."""

import pytest
import torch
from tolerances import assert_same_numbers, network_terms
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers_emo.modeling_emo.kernels.decoding import DecodedLayer
from transformers_emo.modeling_emo.kernels.native_library import find_kernels
from transformers_emo.modeling_emo.package_hooks import package

pytestmark = pytest.mark.skipif(find_kernels() is None, reason="no compiled kernels")
PROMPT = 6


@pytest.fixture
def decoded(monkeypatch):
    """The numbers of sequences of each layer that compiled code decodes."""
    seen, rest = [], DecodedLayer.rest
    monkeypatch.setattr(
        DecodedLayer, "rest", lambda self, query, *args: seen.append(len(query)) or rest(self, query, *args)
    )
    return seen


@pytest.fixture
def attended_by_pytorch(monkeypatch):
    """How often PyTorch computes the attention of a decoded layer."""
    seen, rest = [], DecodedLayer.rest

    def count(self, *args):
        *given, attend = args
        return rest(self, *given, lambda: seen.append(1) or attend())

    monkeypatch.setattr(DecodedLayer, "rest", count)
    return seen


def make_inputs(model, batch: int, padded: bool = False):
    """A prompt, its mask (or `None`) and three tokens more of each sequence."""
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(2, model.config.vocab_size, (batch, PROMPT + 3), generator=generator)
    mask = torch.ones_like(ids) if padded else None
    if padded:
        mask[0, :2] = 0
    return ids, mask


def decode(model, ids, mask=None, cache=None, **kwargs):
    """Logits of the last three tokens, one forward each."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    logits = []
    with torch.no_grad():
        for end in range(PROMPT, ids.shape[1] + 1):
            part = ids[:, :PROMPT] if end == PROMPT else ids[:, end - 1 : end]
            cut = None if mask is None else mask[:, :end]
            output = model(part, attention_mask=cut, past_key_values=cache, use_cache=True, **kwargs)
            logits.append(output.logits[:, -1:])
    return torch.cat(logits[1:], dim=1)


def part_by_part(monkeypatch, model, *args, **kwargs):
    """As `decode`, each part of a layer called on its own."""
    with monkeypatch.context() as patch:
        patch.setattr(type(model.model.layers[0]), "_decode", lambda *_: None)
        return decode(model, *args, **kwargs)


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_key_value_heads": 1},
        {"attention_bias": True},
        {"num_shared_experts": 0, "norm_topk_prob": True},
        {"num_shared_experts": 2},
        {"hidden_size": 40},  # heads of 10 numbers: no whole vectors
    ],
)
def test_the_numbers_are_those_of_the_parts(make_model, monkeypatch, decoded, config, padded, batch):
    model = make_model(num_hidden_layers=2, num_experts=8, num_experts_per_tok=3, **config)
    if config.get("attention_bias"):
        for layer in model.model.layers:
            nn.init.normal_(layer.self_attn.q_proj.bias), nn.init.normal_(layer.self_attn.o_proj.bias)
    ids, mask = make_inputs(model, batch, padded)
    found = decode(model, ids, mask)
    assert decoded == [batch] * 6
    expected = part_by_part(monkeypatch, model, ids, mask)
    assert_same_numbers(found, expected, terms=network_terms(model.config, ids.shape[1]))


def test_in_bfloat16_each_step_is_rounded_as_by_the_parts(make_model, monkeypatch, decoded):
    model = make_model(num_hidden_layers=1, num_experts=4, num_experts_per_tok=4).bfloat16()
    ids, mask = make_inputs(model, 3, padded=True)
    found, expected = decode(model, ids, mask), part_by_part(monkeypatch, model, ids, mask)
    assert decoded == [3] * 3
    assert_same_numbers(found, expected, terms=network_terms(model.config, ids.shape[1]))


def test_masked_experts_are_not_taken(make_model, monkeypatch, decoded):
    model = make_model(num_hidden_layers=2, num_experts=8, num_experts_per_tok=3)
    ids, _ = make_inputs(model, 2)
    with model.use_experts([[0, 3, 5, 7]] * 2):
        found = decode(model, ids)
        assert decoded == [2] * 6
        expected = part_by_part(monkeypatch, model, ids)
    assert_same_numbers(found, expected, terms=network_terms(model.config, ids.shape[1]))
    assert not torch.allclose(found, decode(model, ids))


def test_a_static_cache_is_read_where_it_lies(make_model, monkeypatch, decoded, attended_by_pytorch):
    model = make_model(num_hidden_layers=2)
    ids, _ = make_inputs(model, 2)
    found = decode(model, ids, cache=StaticCache(config=model.config, max_cache_len=12))
    assert not attended_by_pytorch
    expected = part_by_part(monkeypatch, model, ids)
    assert_same_numbers(found, expected, terms=network_terms(model.config, ids.shape[1]))


def test_a_mask_of_numbers_is_for_pytorch(make_model, monkeypatch, attended_by_pytorch):
    model = make_model(num_hidden_layers=2)
    ids, _ = make_inputs(model, 2)
    outputs = []
    for way in (decode, lambda *args: part_by_part(monkeypatch, *args)):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :PROMPT], past_key_values=cache, use_cache=True)
        mask = torch.zeros(2, 1, 1, PROMPT + 1)
        mask[0, ..., :2] = float("-inf")
        with monkeypatch.context() as patch, torch.no_grad():
            if way is not decode:
                patch.setattr(type(model.model.layers[0]), "_decode", lambda *_: None)
            outputs.append(
                model(ids[:, PROMPT : PROMPT + 1], attention_mask=mask, past_key_values=cache).logits
            )
    assert attended_by_pytorch == [1, 1]
    assert_same_numbers(*outputs, terms=network_terms(model.config, PROMPT + 1))


def test_numbers_that_are_none_come_out(make_model, decoded):
    model = make_model(num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight.fill_(float("nan"))
    assert decode(model, make_inputs(model, 1)[0]).isnan().all()
    assert decoded


class TestPartsRun:
    """Each part of a layer is called on its own where somebody has to do with it."""

    @pytest.fixture
    def model(self, make_model):
        return make_model(num_hidden_layers=2)

    @pytest.mark.parametrize(
        "part",
        ["self_attn", "self_attn.k_proj", "mlp", "mlp.gate", "mlp.experts", "pre_feedforward_layernorm"],
    )
    def test_under_a_hook(self, model, decoded, part):
        seen = []
        module = model.model.layers[1].get_submodule(part)
        hook = module.register_forward_hook(lambda *_: seen.append(1))
        decode(model, make_inputs(model, 1)[0])
        assert len(seen) == 4
        assert len(decoded) == 3  # the other layer
        hook.remove()
        decode(model, make_inputs(model, 1)[0])
        assert len(decoded) == 9

    def test_for_what_a_tool_puts_in_their_place(self, model, decoded):
        class Doubled(nn.Linear):
            def forward(self, input):
                return 2 * super().forward(input)

        attention = model.model.layers[0].self_attn
        plain = decode(model, make_inputs(model, 1)[0])
        other = Doubled(attention.v_proj.in_features, attention.v_proj.out_features, bias=False)
        other.weight, attention.v_proj = attention.v_proj.weight, other
        del decoded[:]
        assert not torch.allclose(decode(model, make_inputs(model, 1)[0]), plain)
        assert len(decoded) == 3

    def test_for_a_forward_of_their_own(self, model, decoded, monkeypatch):
        block = model.model.layers[0].mlp
        monkeypatch.setattr(
            type(block), "forward", lambda self, hidden, *args: (torch.zeros_like(hidden), None)
        )
        decode(model, make_inputs(model, 1)[0])
        assert not decoded

    def test_for_other_experts(self, model, decoded, monkeypatch):
        eager = ALL_EXPERTS_FUNCTIONS["emo_sorted"]
        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, "emo", eager)
        decode(model, make_inputs(model, 1)[0])
        assert not decoded

    def test_for_other_attention(self, model, decoded):
        model.set_attn_implementation("eager")
        decode(model, make_inputs(model, 1)[0])
        assert not decoded

    def test_without_compiled_code(self, model, decoded, monkeypatch):
        monkeypatch.setattr(package, "hooks", None)
        decode(model, make_inputs(model, 1)[0])
        assert not decoded

    def test_for_gradients_training_and_other_dtypes(self, model, decoded):
        ids = make_inputs(model, 1)[0]
        assert model(ids[:, :1]).logits.requires_grad
        decode(model.train(), ids)
        decode(model.eval().double(), ids)
        assert not decoded

    def test_for_router_logits(self, model, decoded):
        output = decode(model, make_inputs(model, 1)[0], output_router_logits=True)
        assert output.shape[1] == 3
        assert not decoded

    def test_for_many_sequences(self, model, decoded):
        decode(model, make_inputs(model, 40)[0])
        assert not decoded

    def test_with_a_pool(self, model, decoded):
        ids = make_inputs(model, 1)[0]
        model.generate(ids, max_new_tokens=3, document_pool=3)
        assert not decoded
