"""Exports in vLLM's own Qwen2-MoE and DeepSeek-MoE, on a CPU: the same ids."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from engines.engine_models import TINY, greedy, small_model
from engines.exports import random_prompts
from transformers_emo import EmoForCausalLM
from transformers_emo.conversion import export_model

pytestmark = pytest.mark.engines
RUNS = Path(__file__).with_name("vllm_runs.py")
SHARED = {
    "grouped queries, tied embeddings": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "no shared expert": {"num_shared_experts": 0},
    "fewer experts than a token takes": {"num_experts": 3},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "normalised weights": {"num_shared_experts": 0, "norm_topk_prob": True},
    "dense layers first": {"num_experts_per_layer": [0, 16, 16], "dense_intermediate_size": 96},
}
LAYOUTS = {
    "qwen2-moe": SHARED
    | {"dense layers": {"num_experts_per_layer": [0, 16, 0], "dense_intermediate_size": 96}},
    "deepseek": SHARED
    | {"always-active experts": {"num_shared_experts": 0, "always_active_experts": [3, 7]}},
}


def ids_in_vllm(jobs, environment):
    """What comes out of jobs, in one process that cannot import this package; see `vllm_runs.py`."""
    done = subprocess.run(
        [sys.executable, RUNS, "--without-ours"],
        input=json.dumps(jobs),
        env=environment | {"VLLM_PLUGINS": ""},  # without our plugin
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [job.get("ids", job) for job in json.loads(done.stdout.strip().splitlines()[-1])]


def test_emo_tiny_answers_as_here(tmp_path, prompts, engine_environment):
    jobs, expected = [], []
    for subset in (None, "coq"):
        for layout in LAYOUTS:
            out = tmp_path / f"{subset}-{layout}"
            export_model(TINY, out, to=layout, expert_subset=subset, type="f32", progress=False)
            options = {"trust_remote_code": layout == "deepseek"}
            jobs.append({"model": str(out), "prompts": prompts, "options": options})
        model = EmoForCausalLM.from_pretrained(TINY, expert_subset=subset, dtype="float32")
        expected += [[greedy(model, prompt) for prompt in prompts]] * len(LAYOUTS)
    assert ids_in_vllm(jobs, engine_environment) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_variant_answers_as_here(tmp_path, engine_environment, layout):
    jobs, expected = [], {}
    for number, (name, changes) in enumerate(LAYOUTS[layout].items()):
        model = small_model(**changes)
        model.save_pretrained(tmp_path / f"model-{number}")
        out = tmp_path / f"out-{number}"
        export_model(tmp_path / f"model-{number}", out, to=layout, progress=False)
        texts = random_prompts(model.config.vocab_size)
        expected[name] = [greedy(model, ids) for ids in texts]
        options = {"skip_tokenizer_init": True, "max_model_len": 256}
        options |= {"trust_remote_code": layout == "deepseek"}
        jobs.append({"model": str(out), "prompts": texts, "options": options})
    assert dict(zip(expected, ids_in_vllm(jobs, engine_environment), strict=True)) == expected
