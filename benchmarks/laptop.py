"""What a laptop needs for a part of EMO: disk, memory and tokens a second, for the released size.

    python benchmarks/laptop.py [--quick] [--folder DIR] [--experts 16 32] [--bits 16 8 4]

Claim: 16 experts of the released model in 4 bits take less than 2 GB, and write more tokens a second than in
bfloat16.

The layers of the released model are alike. So a model of 4 layers at its true width is measured, once whole
and once with its last two layers off. The difference is what two layers take, and what is left is taken once
a model: embeddings, head and the loop of `generate`. From this 16 layers are computed. Weights are random,
with one sequence of 64 tokens to begin with, greedy. Each way is a process of its own.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from loading import make_checkpoint
from processes import in_own_process
from quantised import quiet, weight_bytes

LAYERS, HALF, RELEASED = 4, 2, 16
PROMPT = 64


def experts(number: int) -> list[list[int]]:
    """Experts that lie all over the layer, and the shared one, which is the last; the same in every layer."""
    return [[*(place * 127 // (number - 1) for place in range(number - 1)), 127]] * LAYERS


def milliseconds_a_token(model, tokens: int) -> float:
    """Of `generate`, after the prompt."""
    import torch

    ids = torch.arange(2, 2 + PROMPT)[None]

    def generate(new: int) -> float:
        start = time.perf_counter()
        model.generate(ids, do_sample=False, min_new_tokens=new, max_new_tokens=new)
        return time.perf_counter() - start

    return 1e3 * (generate(1 + tokens) - generate(1)) / tokens


def measure(folder: str, number: str, bits: str, tokens: str, runs: str) -> dict[str, list[float]]:
    """Milliseconds a token and bytes of all weights: of all layers, and of the first half, in turns."""
    import torch
    from transformers_emo import EmoForCausalLM, PackedConfig

    quiet()
    model = EmoForCausalLM.from_pretrained(
        folder,
        expert_subset=experts(int(number)),
        dtype=torch.bfloat16,
        quantization_config=None if bits == "16" else PackedConfig(bits=int(bits)),
    ).eval()
    layers, times, sizes = model.model.layers, {LAYERS: [], HALF: []}, {}
    for _ in range(int(runs) + 1):
        for depth, taken in times.items():
            model.model.layers, model.config.num_hidden_layers = layers[:depth], depth
            taken.append(milliseconds_a_token(model, int(tokens)))
            sizes[depth] = weight_bytes(model)
    return {
        "milliseconds": [statistics.median(taken[1:]) for taken in times.values()],
        "bytes": list(sizes.values()),
    }


def at_full_depth(whole: float, half: float) -> float:
    """What the released model takes, if the layers are alike.

    ```python
    >>> at_full_depth(9.0, 5.0)  # two a layer, and one besides
    33.0

    ```
    """
    return half + (whole - half) / (LAYERS - HALF) * (RELEASED - HALF)


def main() -> None:
    """Measure every way, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="16 experts in bfloat16, few tokens")
    parser.add_argument(
        "--folder", type=Path, help="the checkpoint of 4 layers; made here if it is not there"
    )
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--bits", type=int, nargs="+", choices=(16, 8, 4), default=[16, 8, 4])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(measure(*args.part)))
        return
    if args.quick:
        args.experts, args.bits, args.tokens, args.runs = [16], [16], 2, 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary, "full")
        make_checkpoint(folder, LAYERS)
        print("| experts | bits | GB on disk and in memory | tokens a second | of 4 layers, measured |")
        print("|---|---|---|---|---|")
        for number in args.experts:
            for bits in args.bits:
                found = in_own_process(__file__, ["--part", folder, number, bits, args.tokens, args.runs])
                size = at_full_depth(*found["bytes"]) / 1e9
                rate = 1e3 / at_full_depth(*found["milliseconds"])
                measured = f"{found['bytes'][0] / 1e9:.2f} GB, {found['milliseconds'][0]:.1f} ms a token"
                print(f"| {number} | {bits} | {size:.1f} | {rate:.0f} | {measured} |", flush=True)


if __name__ == "__main__":
    main()
