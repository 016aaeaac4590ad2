"""What the tests of all engines share."""

import os
from importlib.util import find_spec

import pytest
from engines.engine_models import PROMPTS, TINY, greedy
from transformers import AutoTokenizer
from transformers_emo import EmoForCausalLM, select_experts

# The tests of an engine are there only where its package is: `make test-engines` makes such places.
PACKAGES = {"vllm": "transformers_emo_vllm"}
collect_ignore_glob = [f"test_{engine}*.py" for engine, name in PACKAGES.items() if find_spec(name) is None]


@pytest.fixture(scope="session")
def tiny() -> EmoForCausalLM:
    """emo-tiny in float32."""
    return EmoForCausalLM.from_pretrained(TINY, dtype="float32")


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """The prompts, as ids of emo-tiny's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    return [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


@pytest.fixture(scope="session")
def engine_environment() -> dict[str, str]:
    """The variables of a process that runs an engine: nothing from outside, few threads."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


@pytest.fixture(scope="session")
def coq_answer() -> str:
    """What the subset of `docs/tutorials/engines.md` says after its prompt, by this package."""
    data = str(TINY / "documents" / "coq.jsonl")
    subset = select_experts(TINY, dataset=data, num_experts=16, max_texts=8, progress=False)
    model = EmoForCausalLM.from_pretrained(TINY, expert_subset=subset, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    return tokenizer.decode(greedy(model, tokenizer("Lemma plus_comm :")["input_ids"], 24))
