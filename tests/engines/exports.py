"""Exported models in an engine that has nothing of this package: the ids it gives."""

import json
import subprocess
from pathlib import Path

import torch
from engines.engine_models import TOKENS
from engines.environments import BUILD

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


def random_prompts(vocab_size: int) -> Ids:
    """Five prompts for a model without a tokenizer."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, vocab_size, (9,), generator=generator).tolist() for _ in range(5)]
