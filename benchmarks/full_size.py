"""All 27 GB of the released size on a machine with less memory: a budget for experts, and mapped files.

    python benchmarks/full_size.py --folder DIR [--budget 6GB] [--pool 15] [--turns 3]

Claim: with 6 GB for experts, the whole model decodes within a prompt's document pool as fast as a resident
subset of as many experts; with mapped files it is ready in seconds.

Bar: 0.85 of the tokens a second of the resident 16-expert subset.

Makes a synthetic checkpoint in DIR, unless there is one: 16 layers of 128 experts at EMO's true width, in
bfloat16 (27.1 GB of disk). Every way is a process of its own, in turns: greedy text after a prompt of 32
tokens. Random weights route at random. The median of the turns is shown.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from loading import drop_from_cache, make_checkpoint
from processes import disk_bytes, in_own_process, peak_bytes

LAYERS, PROMPT = 16, 32
SUBSET = [[*range(0, 120, 8), 127]] * LAYERS


def load(folder: str, way: str, budget: str):
    """The model: whole under a budget, whole and mapped, or a resident subset."""
    import torch
    from transformers.utils import logging
    from transformers_emo import EmoForCausalLM

    logging.disable_progress_bar()
    torch.set_num_threads(2)
    kwargs: dict = {
        "budget": {"expert_memory": budget},
        "mapped": {"disable_mmap": False},
        "subset": {"expert_subset": SUBSET},
    }[way]
    return EmoForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **kwargs).eval()


def generate(folder: str, way: str, budget: str, pool: str, tokens: str) -> dict[str, float]:
    """Seconds to load and to the first token, tokens a second after it, peak memory and bytes read."""
    import torch

    before, read, start = peak_bytes(), disk_bytes(), time.perf_counter()
    model = load(folder, way, budget)
    found: dict[str, float] = {"ready": time.perf_counter() - start}
    ids = torch.arange(2, 2 + PROMPT)[None]
    kwargs = {"document_pool": int(pool)} if int(pool) else {}

    def text(new: int) -> float:
        begin = time.perf_counter()
        model.generate(ids, do_sample=False, min_new_tokens=new, max_new_tokens=new, **kwargs)
        return time.perf_counter() - begin

    found["first"] = text(1) + found["ready"]
    rates = []
    for _ in range(3):
        one = text(1)
        rates.append(int(tokens) / (text(1 + int(tokens)) - one))
    found["rate"] = statistics.median(rates)
    return found | {"peak": peak_bytes() - before, "read": disk_bytes() - read}


def main() -> None:
    """Measure the ways in turns, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="the checkpoint; made if it is not there")
    parser.add_argument("--budget", default="6GB")
    parser.add_argument("--pool", type=int, default=15, help="routed experts in the prompt's pools")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(generate(str(args.folder), *args.part)))
        return
    make_checkpoint(args.folder, LAYERS)
    ways = {
        "16 experts, resident": ("subset", 0),
        f"whole, {args.budget} for experts, document_pool={args.pool}": ("budget", args.pool),
        f"whole, {args.budget} for experts, all routing": ("budget", 0),
        f"whole, mapped, document_pool={args.pool}": ("mapped", args.pool),
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(args.turns):
        for name, (way, pool) in ways.items():
            drop_from_cache(args.folder)
            words = ["--folder", args.folder, "--part", way, args.budget, pool, args.tokens]
            runs[name].append(in_own_process(__file__, words))
    first = None
    for name, taken in runs.items():
        median = {key: statistics.median(run[key] for run in taken) for key in taken[0]}
        first = first or median["rate"]
        print(
            f"{median['rate'] / first:.2f}  of the tokens a second of the first: {name}  "
            f"({median['rate']:.1f} a second; ready in {median['ready']:.1f} s, first token after "
            f"{median['first']:.1f} s; {median['peak'] / 1e9:.1f} GB of memory, "
            f"{median['read'] / 1e9:.1f} GB read)",
            flush=True,
        )


if __name__ == "__main__":
    main()
