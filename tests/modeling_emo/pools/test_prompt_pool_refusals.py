"""What cannot have pools chosen from its prompt: one clear error, and nothing left behind."""

import pytest
import torch
from padded_prompts import NEW, PROMPTS, batch
from transformers import GenerationConfig


@pytest.mark.parametrize(
    ("changes", "pool", "message"),
    [
        ({}, 2, "is 2 in layer 0, expected an integer from 3.*to 11"),
        ({}, 12, "is 12 in layer 0"),
        ({}, "8", "is '8' in layer 0"),
        ({}, 4.0, "is 4.0 in layer 0"),
        ({}, [4, 4], "has 2 sizes, expected one for each of 3 layers"),
        (
            {"num_experts_per_layer": [12, 6, 9]},
            [4, 6, 4],
            "is 6 in layer 1, expected an integer from 3.*to 5",
        ),
        ({}, True, "needs `config.document_pool_eval`"),
        ({"num_shared_experts": 0, "always_active_experts": [3]}, 4, "always-active experts, which layer 0"),
    ],
)
def test_impossible_sizes_are_refused(make_model, changes, pool, message):
    model = make_model(**changes)
    with pytest.raises(ValueError, match=message):
        model.generate(**batch(), document_pool=pool, **NEW)
    assert model.generate(**batch(), **NEW).shape == (2, 15)  # and nothing is left behind


@pytest.mark.parametrize("where", ["call", "config of the call", "config of the model"])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"cache_implementation": "paged"}, "Continuous batching"),
        ({"guidance_scale": 1.5}, "`guidance_scale=1.5` reads a second prompt"),
        ({"token_healing": True}, "`token_healing` rewrites the prompt"),
    ],
    ids=["paged", "guidance", "healing"],
)
def test_settings_that_read_another_prompt_are_refused(make_model, setting, message, where):
    model, options = make_model(), {"document_pool": 4, **batch()}
    if where == "call":
        options |= NEW | setting
    elif where == "config of the call":
        options["generation_config"] = GenerationConfig(**NEW, **setting)
    else:
        model.generation_config.update(**setting)
    with pytest.raises(ValueError, match=message):
        model.generate(**options)


def test_continuous_batching_never_leaves_out_pools_that_are_asked_for(make_model):
    model = make_model()
    model.generation_config.document_pool = 4
    for call in (model.generate_batch, lambda prompts: model.init_continuous_batching()):
        with pytest.raises(ValueError, match="Continuous batching.*`generation_config.document_pool = None`"):
            call(PROMPTS)
    model.generation_config.document_pool = None
    model.init_continuous_batching()


def test_guidance_without_pools_is_left_alone(make_model):
    model = make_model()
    expected = model.generate(**batch(), guidance_scale=1.5, **NEW)
    model.generation_config.document_pool = 4
    assert torch.equal(model.generate(**batch(), document_pool=False, guidance_scale=1.5, **NEW), expected)
    plain = model.generate(**batch(), **NEW)
    assert torch.equal(model.generate(**batch(), guidance_scale=1.0, **NEW), plain)
