"""Exports in plain Transformers, without this package: the same ids."""

import pytest
from engines.exports import ids_of_emo_tiny, ids_of_small_model

pytestmark = pytest.mark.engines
VARIANTS = {
    "grouped queries, tied embeddings": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "no shared expert": {"num_shared_experts": 0},
    "fewer experts than a token takes": {"num_experts": 3},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "normalised weights": {"num_shared_experts": 0, "norm_topk_prob": True},
    "dense layers": {"num_experts_per_layer": [0, 16, 0], "dense_intermediate_size": 96},
}


@pytest.mark.parametrize("subset", [None, "coq"], ids=["full", "16 experts"])
def test_emo_tiny_answers_as_here(tmp_path, prompts, engine_environment, subset):
    found, expected = ids_of_emo_tiny("transformers", subset, tmp_path, prompts, engine_environment)
    assert found == expected


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_answers_as_here(tmp_path, engine_environment, changes):
    found, expected = ids_of_small_model("transformers", "qwen2-moe", changes, tmp_path, engine_environment)
    assert found == expected
