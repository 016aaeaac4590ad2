"""Logits of the last tokens only: what the last layer leaves out, and when it may not."""

import pytest
import torch
from tolerances import assert_same_numbers, clear_words

IDS = torch.randint(2, 96, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def rows():
    """Make the number of tokens that reach the experts of each layer be noted."""

    def watch(model) -> list[int]:
        seen: list[int] = []
        for layer in model.model.layers:  # no hook: whoever has one is shown all tokens
            forward = layer.mlp.forward

            def noted(hidden, *args, forward=forward, **kwargs):
                seen.append(hidden.shape[1])
                return forward(hidden, *args, **kwargs)

            layer.mlp.forward = noted
        return seen

    return watch


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_experts_per_layer": [12, 12, 0], "dense_intermediate_size": 40}],
    ids=["experts", "dense"],
)
@pytest.mark.parametrize("keep", [1, 4, 9, 20])
@torch.no_grad()
def test_logits_and_cache_are_those_of_all_tokens(make_model, rows, changes, keep):
    model = make_model(**changes)
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    expected = model(IDS, attention_mask=mask, use_cache=True)
    seen = rows(model)
    found = model(IDS, attention_mask=mask, use_cache=True, logits_to_keep=keep)
    assert seen == [9, 9, min(keep, 9)]
    assert_same_numbers(found.logits, expected.logits[:, -keep:])
    for ours, theirs in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert_same_numbers(ours.keys, theirs.keys)
        assert_same_numbers(ours.values, theirs.values)


def test_generate_leaves_them_out_and_says_the_same(make_model, rows):
    model = make_model()
    expected = clear_words(model, IDS, max_new_tokens=5, use_cache=False, output_hidden_states=True)
    seen = rows(model)
    assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False), expected)
    assert seen == [9, 9, 1] + [1] * 12


@pytest.mark.parametrize(
    "wanted",
    [
        {"output_hidden_states": True},
        {"output_router_logits": True},
        {"document_pool": 4},
        {"labels": IDS},
        {"logits_to_keep": torch.tensor([8])},
        {"logits_to_keep": 0},
    ],
    ids=lambda wanted: next(iter(wanted)),
)
@torch.no_grad()
def test_all_tokens_go_through_where_somebody_looks(make_model, rows, wanted):
    model = make_model()
    seen = rows(model)
    if "labels" in wanted:
        wanted = wanted | {"logits_to_keep": 9}
    out = model(IDS, **{"logits_to_keep": 2} | wanted)
    assert seen == [9, 9, 9]
    for states in out.hidden_states or ():
        assert states.shape[1] == 9
    for logits in out.router_logits or ():
        assert len(logits) == IDS.numel()


def test_all_tokens_go_through_for_gradients_and_a_config_that_asks(make_model, rows):
    model = make_model()
    seen = rows(model)
    model(IDS, logits_to_keep=1).logits.sum().backward()
    model.config.output_hidden_states = True
    with torch.no_grad():
        assert model(IDS, logits_to_keep=1).hidden_states[-1].shape[1] == 9
    assert seen == [9] * 6


@pytest.mark.parametrize("hooked", ["gate", "mlp", "layer", "model"])
def test_whoever_has_a_hook_is_shown_all_tokens(make_model, hooked):
    model = make_model()
    last = model.model.layers[-1]
    module = {"gate": last.mlp.gate, "mlp": last.mlp, "layer": last, "model": model.model}[hooked]
    shapes = []
    module.register_forward_hook(
        lambda _, args, output: shapes.append((output if hooked == "layer" else output[0]).shape)
    )
    model.generate(IDS, max_new_tokens=1, do_sample=False)
    assert shapes[0][:-1].numel() == IDS.numel()
