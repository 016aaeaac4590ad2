"""Exports in MLX, on a CPU: the same ids."""

import pytest
import torch
from engines.engine_models import TINY, greedy, small_model
from engines.exports import ids_in, random_prompts
from transformers_emo import EmoForCausalLM
from transformers_emo.conversion import export_model

pytestmark = pytest.mark.engines
VARIANTS = {
    "grouped queries, tied embeddings": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "no shared expert": {"num_shared_experts": 0},
    "fewer experts than a token takes": {"num_experts": 3},
    "dense layers first": {"num_experts_per_layer": [0, 16, 16], "dense_intermediate_size": 96},
}


@pytest.mark.parametrize("subset", [None, "coq"], ids=["full", "16 experts"])
def test_emo_tiny_answers_as_here(tmp_path, tiny, prompts, engine_environment, subset):
    export_model(TINY, tmp_path / "m", expert_subset=subset, type="f32", progress=False)
    ours = tiny
    if subset is not None:
        ours = EmoForCausalLM.from_pretrained(TINY, expert_subset=subset, dtype=torch.float32)
    expected = [greedy(ours, prompt) for prompt in prompts]
    assert ids_in("mlx", tmp_path / "m", prompts, engine_environment) == expected


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_answers_as_here(tmp_path, engine_environment, changes):
    model = small_model(**changes)
    model.save_pretrained(tmp_path / "model")
    export_model(
        tmp_path / "model",
        tmp_path / "m",
        to="deepseek" if "num_experts_per_layer" in changes else "qwen2-moe",
        progress=False,
    )
    prompts = random_prompts(model.config.vocab_size)
    expected = [greedy(model, prompt) for prompt in prompts]
    assert ids_in("mlx", tmp_path / "m", prompts, engine_environment) == expected


def test_a_scaled_rope_is_refused_by_mlx_and_not_ignored(tmp_path, engine_environment):
    model = small_model(rope_scaling={"rope_type": "linear", "factor": 2.0})
    model.save_pretrained(tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "m", progress=False)
    with pytest.raises(AssertionError, match="rope_scaling must contain"):
        ids_in("mlx", tmp_path / "m", [[5, 6]], engine_environment)
