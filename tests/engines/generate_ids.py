"""Greedy ids of a model in an engine, run by that engine's Python, which has nothing of this package.

`generate_ids.py ENGINE FOLDER TOKENS` reads prompts as JSON from standard input, lists of ids, and writes the
ids that follow each of them.
"""

import json
import sys
from pathlib import Path


def in_transformers(folder, prompts, tokens):
    """Plain Transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    assert "transformers_emo" not in sys.modules
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.generation_config.eos_token_id = None
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, pad_token_id=1
        )
        yield output[0, len(prompt) :].tolist()


def in_mlx(folder, prompts, tokens):
    """MLX, on the processor."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(Path(folder))
    for prompt in prompts:
        yield [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=tokens)]


if __name__ == "__main__":
    engine, folder, tokens = sys.argv[1:]
    run = {"transformers": in_transformers, "mlx": in_mlx}[engine]
    print(json.dumps(list(run(folder, json.load(sys.stdin), int(tokens)))))
