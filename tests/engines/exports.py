"""Exported models in an engine that has nothing of this package: the ids it gives."""

import json
import subprocess
from pathlib import Path

import torch
from engines.engine_models import TINY, TOKENS, greedy, small_model
from engines.environments import BUILD
from transformers_emo import EmoForCausalLM
from transformers_emo.conversion import export_model

Ids = list[list[int]]


def ids_in(engine: str, folder: Path, prompts: Ids, environment: dict[str, str]) -> Ids:
    """The most probable tokens after each prompt, by an engine in its own environment."""
    python = BUILD / engine / "bin" / "python"
    assert python.exists(), f"{engine} is not installed: run `make test-engines ENGINES={engine}`"
    done = subprocess.run(
        [python, Path(__file__).with_name("generate_ids.py"), engine, folder, str(TOKENS)],
        input=json.dumps(prompts),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def ids_of_emo_tiny(engine: str, subset: str | None, folder: Path, prompts: Ids, environment: dict) -> tuple:
    """What emo-tiny's export, or that of a subset, answers in an engine, and what it answers here."""
    export_model(TINY, folder / "m", expert_subset=subset, type="f32", progress=False)
    ours = EmoForCausalLM.from_pretrained(TINY, expert_subset=subset, dtype=torch.float32)
    found = ids_in(engine, folder / "m", prompts, environment)
    return found, [greedy(ours, prompt) for prompt in prompts]


def ids_of_small_model(engine: str, layout: str, changes: dict, folder: Path, environment: dict) -> tuple:
    """The same of a random model whose config has some changes."""
    model = small_model(**changes)
    model.save_pretrained(folder / "model")
    export_model(folder / "model", folder / "m", to=layout, progress=False)
    prompts = random_prompts(model.config.vocab_size)
    found = ids_in(engine, folder / "m", prompts, environment)
    return found, [greedy(model, prompt) for prompt in prompts]


def random_prompts(vocab_size: int) -> Ids:
    """Five prompts for a model without a tokenizer."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, vocab_size, (9,), generator=generator).tolist() for _ in range(5)]
