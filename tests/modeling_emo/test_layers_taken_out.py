"""Fewer layers than the model was made with, for a while or for good: right, or refused."""

import pytest
import torch
from tolerances import assert_same_numbers, network_terms
from torch import nn
from transformers_emo import EmoConfig, EmoForCausalLM

UNEQUAL = {"num_experts_per_layer": [12, 5, 0, 9], "dense_intermediate_size": 40}
KINDS = [
    {},
    UNEQUAL,
    {"num_shared_experts_per_layer": [1, 2, 1, 0]},
    {"always_active_experts_per_layer": [[1], [2, 3], [0], []], "num_shared_experts": 0},
]
IDS = torch.arange(5, 13)[None]


@pytest.fixture(params=KINDS, ids=["equal", "unequal", "shared", "always"])
def model(request, make_model):
    return make_model(num_hidden_layers=4, **request.param)


def first_layers(model: EmoForCausalLM, count: int) -> EmoForCausalLM:
    """A model of its own with the first layers alone."""
    config = EmoConfig.from_dict(model.config.to_dict(), num_hidden_layers=count)
    small = EmoForCausalLM(config).eval()
    small.load_state_dict(model.state_dict(), strict=False)
    return small


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_early_exit_drafts_and_the_text_is_that_of_the_model(model, layers):
    before = model.config.to_dict()
    options = {"max_new_tokens": 6, "do_sample": False}
    plain = model.generate(IDS, **options)
    assert torch.equal(model.generate(IDS, assistant_early_exit=layers, **options), plain)
    assert model.config.to_dict() == before
    assert torch.equal(model.generate(IDS, **options), plain)


def test_early_exit_of_a_subset_and_under_a_mask(make_model, tmp_path):
    subset = [[0, 1, 2, 3, 11], [0, 1, 4, 5, 6, 7, 11], [3, 4, 5, 11]]
    make_model().save_pretrained(tmp_path)
    loaded = EmoForCausalLM.from_pretrained(tmp_path, expert_subset=subset).eval()
    options = {"max_new_tokens": 4, "do_sample": False}
    for model in (loaded, EmoForCausalLM.from_pretrained(tmp_path).eval()):
        with model.use_experts(subset):
            plain = model.generate(IDS, **options)
            assert torch.equal(model.generate(IDS, assistant_early_exit=2, **options), plain)
    assert loaded.config.retained_experts == subset
    pools = {"document_pool": 4, **options}
    expected = loaded.generate(IDS, **pools)
    assert torch.equal(loaded.generate(IDS, assistant_early_exit=1, **pools), expected)


@pytest.mark.parametrize("set_config", [True, False])
def test_the_last_layers_may_be_taken_out(model, set_config):
    expected = first_layers(model, 2)
    model.model.layers = model.model.layers[:2]
    if set_config:
        model.config.num_hidden_layers = 2
    with torch.no_grad():
        for options in ({}, {"logits_to_keep": 1}):
            options = options | {"output_hidden_states": True, "output_router_logits": set_config}
            found, wanted = model(IDS, **options), expected(IDS, **options)
            terms = network_terms(expected.config, IDS.numel())
            assert_same_numbers(found.logits, wanted.logits, terms=terms)
            assert len(found.hidden_states) == 3
            for one, other in zip(found.hidden_states, wanted.hidden_states, strict=True):
                assert_same_numbers(one, other, terms=terms)
            if set_config:
                assert len(found.router_logits) == len(wanted.router_logits)
    if not set_config:
        with pytest.raises(ValueError, match="has 2 layers"):
            model(IDS, output_router_logits=True)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_hidden_states_and_the_first_layers_agree(model, layers):
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
        last = first_layers(model, layers).model(IDS, output_hidden_states=True)
    terms = network_terms(model.config, IDS.numel())
    for one, other in zip(states[:layers], last.hidden_states[:layers], strict=True):
        assert_same_numbers(one, other, terms=terms)
    # The last of a model is behind its norm.
    assert_same_numbers(model.model.norm(states[layers]), last.last_hidden_state, terms=terms)


def test_what_is_left_is_saved_and_trained(model, tmp_path):
    model.model.layers = model.model.layers[:2]
    with pytest.raises(ValueError, match=r"has 2 layers, .* about 4 layers: set .*num_hidden_layers = 2"):
        model.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    model.config.num_hidden_layers = 2
    model.save_pretrained(tmp_path)
    again = EmoForCausalLM.from_pretrained(tmp_path).eval()
    assert len(again.model.layers) == 2
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    model.train()
    model(IDS, labels=IDS, output_router_logits=True).loss.backward()


def test_pools_want_a_config_that_knows(make_model):
    model = make_model(document_pool_min=4, document_pool_max=8).train()
    model.model.layers = model.model.layers[:2]
    with pytest.raises(ValueError, match="has 2 layers"):
        model(IDS, labels=IDS)
    model.config.num_hidden_layers = 2
    assert len(model(IDS, labels=IDS).expert_counts) == 2


def test_layers_from_the_middle_are_not_taken_for_the_first(make_model, tmp_path):
    subset = [[0, 1, 2, 3, 11], [0, 1, 4, 5, 11], [3, 4, 5, 6, 11]]
    make_model().save_pretrained(tmp_path)
    model = EmoForCausalLM.from_pretrained(tmp_path, expert_subset=subset).eval()
    model.model.layers = nn.ModuleList([model.model.layers[0], model.model.layers[2]])
    model.config.num_hidden_layers = 2
    for use in (lambda: model.save_pretrained(tmp_path / "cut"), model.use_experts(subset[:2]).__enter__):
        with pytest.raises(ValueError, match=r"has the layers \[0, 2\]"):
            use()
    model.config.retained_experts = [subset[0], subset[2]]
    for index, layer in enumerate(model.model.layers):
        layer.number = layer.self_attn.layer_idx = index
    model.save_pretrained(tmp_path / "cut")
    again = EmoForCausalLM.from_pretrained(tmp_path / "cut").eval()
    assert again.config.retained_experts == [subset[0], subset[2]]
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_layers_that_never_were_have_no_experts():
    config = EmoConfig(num_hidden_layers=2, num_experts_per_layer=[4, 8])
    config.num_hidden_layers = 1
    assert config.num_experts_per_layer == [4]
    config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="`num_experts_per_layer` has 2 entries, expected .* 3 layers"):
        _ = config.layer_experts
    config.num_experts_per_layer = [4, 8, 8]
    assert len(config.layer_experts) == 3 and "_further_layers" not in config.to_dict()
