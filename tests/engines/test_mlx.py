"""Exports in MLX, on a CPU: the same ids."""

import pytest
from engines.engine_models import small_model
from engines.environments import BUILD
from engines.exports import ids_in, ids_of_emo_tiny, ids_of_small_model
from engines.manual import run_commands
from transformers_emo.conversion import export_model

pytestmark = pytest.mark.engines
VARIANTS = {
    "grouped queries, tied embeddings": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "no shared expert": {"num_shared_experts": 0},
    "fewer experts than a token takes": {"num_experts": 3},
    "dense layers first": {"num_experts_per_layer": [0, 16, 16], "dense_intermediate_size": 96},
}


@pytest.mark.parametrize("subset", [None, "coq"], ids=["full", "16 experts"])
def test_emo_tiny_answers_as_here(tmp_path, prompts, engine_environment, subset):
    found, expected = ids_of_emo_tiny("mlx", subset, tmp_path, prompts, engine_environment)
    assert found == expected


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_answers_as_here(tmp_path, engine_environment, changes):
    layout = "deepseek" if "num_experts_per_layer" in changes else "qwen2-moe"
    found, expected = ids_of_small_model("mlx", layout, changes, tmp_path, engine_environment)
    assert found == expected


def test_a_scaled_rope_is_refused_by_mlx_and_not_ignored(tmp_path, engine_environment):
    model = small_model(rope_scaling={"rope_type": "linear", "factor": 2.0})
    model.save_pretrained(tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "m", progress=False)
    with pytest.raises(AssertionError, match="rope_scaling must contain"):
        ids_in("mlx", tmp_path / "m", [[5, 6]], engine_environment)


def test_the_commands_of_the_manual_run(tmp_path, monkeypatch, engine_environment, coq_answer):
    monkeypatch.chdir(tmp_path)
    printed = run_commands("MLX", tmp_path, BUILD / "mlx" / "bin", engine_environment)
    assert coq_answer.strip() in printed
