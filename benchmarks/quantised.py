"""Experts in 8 and 4 bits: loss, speed and memory beside bfloat16 and float32.

    python benchmarks/quantised.py [--quick] [--layers 4] [--folder DIR]

Claim: a subset of the experts also runs in 8 and in 4 bits, at nearly the same loss and in less memory.

First perplexity: emo-tiny with its 16 experts for Python, over its documents of that domain. Then speed and
memory: 16 of 128 experts of the synthetic checkpoint of `benchmarks/loading.py` (EMO's true width), where all
but the experts is bfloat16; a token after 32, and a prompt. Each is loaded in a process of its own; ratios
are to bfloat16 with the experts of this package. Memory is that of the experts' weights, and the peak of the
process beyond what it used before loading.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

from loading import KEPT, make_checkpoint
from processes import in_own_process, peak_bytes

TINY = Path(__file__).parents[1] / "model_cards" / "emo-tiny"
DOMAIN, PREFIX = "python", 32
# Name to dtype, bits of the experts and their implementation.
WAYS: dict[str, tuple[str, int | None, str | None]] = {
    "bfloat16": ("bfloat16", None, None),
    "bfloat16, eager": ("bfloat16", None, "eager"),
    "8 bits": ("bfloat16", 8, None),
    "4 bits": ("bfloat16", 4, None),
    "float32": ("float32", None, None),
}


def load(folder: Path, subset, way: str):
    import torch
    from transformers_emo import EmoForCausalLM

    dtype, bits, implementation = WAYS[way]
    kwargs = {}
    if bits is not None:
        from transformers_emo.modeling_emo.kernels.quantised_experts import quantised_experts

        kwargs["quantization_config"] = quantised_experts(bits)
    return EmoForCausalLM.from_pretrained(
        folder,
        expert_subset=subset,
        dtype=getattr(torch, dtype),
        experts_implementation=implementation,
        **kwargs,
    ).eval()


def expert_bytes(model) -> int:
    """Bytes of the experts' weights, quantised or not."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    total = 0
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            data = parameter.data
            parts = (
                [getattr(data, part) for part in data.__tensor_flatten__()[0]]
                if is_traceable_wrapper_subclass(data)
                else [data]
            )
            total += sum(part.nbytes for part in parts)
    return total


def losses(way: str, documents: int) -> dict:
    """Mean loss of a token of emo-tiny's held-back documents."""
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, tokenizer = load(TINY, DOMAIN, way), AutoTokenizer.from_pretrained(TINY)
    lines = (TINY / "documents" / f"{DOMAIN}.jsonl").read_text().splitlines()
    texts = [entry["text"] for entry in map(json.loads, lines) if entry["split"] == "test"][:documents]
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=512).input_ids
        with torch.no_grad():
            loss = model(ids, labels=ids).loss.item()
        total, count = total + loss * (ids.shape[1] - 1), count + ids.shape[1] - 1
    return {"loss": total / count, "tokens": count, "experts": expert_bytes(model)}


def speed(way: str, folder: Path, tokens: int, prompt: int, runs: int) -> dict:
    """Load a subset at true width and run it; what it took."""
    import torch
    from transformers import DynamicCache
    from transformers.utils import logging

    logging.disable_progress_bar()
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    subset = [[*range(0, 8 * (KEPT - 1), 8), 127]] * layers
    before = peak_bytes()
    start = time.perf_counter()
    model = load(folder, subset, way)
    loading = time.perf_counter() - start
    ids = torch.randint(2, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    decoding, reading = [], []
    with torch.no_grad():
        for _ in range(runs + 1):
            start = time.perf_counter()
            model(ids, use_cache=False, logits_to_keep=1)
            reading.append(time.perf_counter() - start)
            cache = DynamicCache(config=model.config)
            model(ids[:, :PREFIX], past_key_values=cache, logits_to_keep=1)
            start = time.perf_counter()
            for position in range(tokens):
                model(ids[:, position : position + 1], past_key_values=cache)
            decoding.append((time.perf_counter() - start) / tokens)
    return {
        "loading": loading,
        "decoding": statistics.median(decoding[1:]),
        "prompt": statistics.median(reading[1:]),
        "peak": peak_bytes() - before,
        "experts": expert_bytes(model),
    }


def measure(part: str, way: str, args: argparse.Namespace, folder: Path) -> dict:
    settings = [f"--{name}={getattr(args, name)}" for name in ("documents", "tokens", "prompt", "runs")]
    return in_own_process(__file__, ["--part", part, way, "--folder", folder, *settings])


def main() -> None:
    """Measure every way, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one layer, one run, two documents")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="the checkpoint; made here if it is not there")
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        part, way = args.part
        if part == "losses":
            print(json.dumps(losses(way, args.documents)))
        else:
            print(json.dumps(speed(way, args.folder, args.tokens, args.prompt, args.runs)))
        return
    if args.quick:
        args.layers = args.runs = 1
        args.documents, args.tokens, args.prompt = 2, 4, 64
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        print(f"emo-tiny, 16 experts for {DOMAIN}", flush=True)
        best = measure("losses", "float32", args, folder)
        for way in WAYS:
            its = measure("losses", way, args, folder)
            print(
                f"{math.exp(its['loss'] - best['loss']):.4f}  times the perplexity in float32: {way}  "
                f"({math.exp(its['loss']):.3f}, loss {its['loss']:.4f} over {its['tokens']} tokens; experts "
                f"{its['experts'] / 1e6:.2f} MB)",
                flush=True,
            )
        make_checkpoint(folder, args.layers)
        print(f"{KEPT} of 128 experts at true width, a token after {PREFIX}, a prompt of {args.prompt}")
        plain: dict = {}
        for way in WAYS:  # the first is what the others are compared with
            its = measure("speed", way, args, folder)
            plain = plain or its
            memory = f"experts {its['experts'] / 1e6:.0f} MB, peak {its['peak'] / 1e6:.0f} MB"
            for kind, name in (("decoding", "a token"), ("prompt", "a prompt")):
                print(
                    f"{its[kind] / plain[kind]:.2f}  times the time in bfloat16: {name}, {way}  "
                    f"({1e3 * its[kind]:.1f} ms; {memory}, loaded in {its['loading']:.1f} s)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
