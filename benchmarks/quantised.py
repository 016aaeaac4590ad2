"""Models in 8 and 4 bits beside bfloat16: perplexity, speed, memory and loading.

    python benchmarks/quantised.py [--quick] [--layers 4] [--folder DIR]

Claim: a model in 4 bits takes well under half of the memory and time of bfloat16, at nearly the same loss.

Bars: perplexity 1.001 with 8 bits and 1.01 with 4, of float32's; a token 0.65 and 0.45 of the time in
bfloat16, eight sequences 0.5, a prompt of 512 1.1; memory of a loaded subset 0.4; loading it from a folder
0.4; while it is quantised no more than 1.1 of it and the largest tensor of a layer.

First perplexity: emo-tiny, all of it and its 16 experts for Python, over its held-back documents (of that
domain), with activations in float32, in bfloat16, and in bfloat16 as inference multiplies them: rounded to 8
bits where the processor multiplies bytes. Then the synthetic checkpoint of `benchmarks/loading.py` (EMO's
true width), of which 16 of 128 experts are taken out in bfloat16 and in few bits. Each folder is loaded in a
process of its own, with its files in the page cache. Memory is that of all weights, embeddings, norms and
routers too, and the peak of the process beyond what it used before loading.
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
# Name to the arguments of `PackedConfig`.
WAYS: dict[str, dict | None] = {
    "bfloat16": None,
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4},
    "4 bits, symmetric": {"bits": 4, "symmetric": True},
    "4 bits, groups of 128": {"bits": 4, "group_size": 128},
}


def packing(way: str):
    from transformers_emo import PackedConfig

    arguments = WAYS[way]
    return None if arguments is None else PackedConfig(**arguments)


def weight_bytes(model) -> int:
    """Bytes of all weights: the parts of those in few bits."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    total = 0
    for parameter in model.parameters():
        is_packed = is_traceable_wrapper_subclass(parameter)
        names = parameter.__tensor_flatten__()[0] if is_packed else ()
        parts = [getattr(parameter, name) for name in names] if is_packed else [parameter]
        total += sum(part.nbytes for part in parts)
    return total


def quiet() -> None:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(2)


ACTIVATIONS = ("float32", "bfloat16", "rounded")


def losses(way: str, subset: str, documents: int, activations: str = "float32") -> dict:
    """Mean loss of a token of emo-tiny's held-back documents, each cut to what the model reads at once."""
    import torch
    from transformers import AutoTokenizer
    from transformers_emo import EmoForCausalLM

    quiet()
    kwargs: dict = {} if subset == "all" else {"expert_subset": subset}
    if way != "float32":
        kwargs["quantization_config"] = packing(way)
    dtype = torch.bfloat16 if way == "bfloat16" or activations != "float32" else torch.float32
    model = EmoForCausalLM.from_pretrained(TINY, dtype=dtype, **kwargs).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    total, count = 0.0, 0
    for file in sorted((TINY / "documents").glob("*.jsonl" if subset == "all" else f"{subset}.jsonl")):
        entries = map(json.loads, file.read_text().splitlines())
        for text in [entry["text"] for entry in entries if entry["split"] == "test"][:documents]:
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=512).input_ids
            if ids.shape[1] < 2:
                continue
            with torch.set_grad_enabled(activations == "bfloat16"):  # without, they may be rounded
                loss = model(ids, labels=ids).loss.item()
            total, count = total + loss * (ids.shape[1] - 1), count + ids.shape[1] - 1
    return {"loss": total / count, "tokens": count, "bytes": weight_bytes(model)}


def kept(folder: Path) -> list[list[int]]:
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    return [[*range(0, 8 * (KEPT - 1), 8), 127]] * layers


def quantising(way: str, folder: Path) -> dict:
    """Load the subset from the full checkpoint, quantising it on the way."""
    import torch
    from transformers_emo import EmoForCausalLM

    quiet()
    config = packing(way)
    before, start = peak_bytes(), time.perf_counter()
    model = EmoForCausalLM.from_pretrained(
        folder, expert_subset=kept(folder), dtype=torch.bfloat16, quantization_config=config
    )
    seconds = time.perf_counter() - start
    largest = max(p.numel() for name, p in model.named_parameters() if ".layers." in name) * 2
    return {
        "loading": seconds,
        "peak": peak_bytes() - before,
        "bytes": weight_bytes(model),
        "largest": largest,
    }


def speed(folder: Path, tokens: int, prompt: int, runs: int) -> dict:
    """Load a folder and run it; what it took."""
    import torch
    from transformers import DynamicCache
    from transformers_emo import EmoForCausalLM

    quiet()
    before, start = peak_bytes(), time.perf_counter()
    model = EmoForCausalLM.from_pretrained(folder)
    loading = time.perf_counter() - start
    peak = peak_bytes() - before
    ids = torch.randint(2, model.config.vocab_size, (8, prompt), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {"one": [], "eight": [], "prompt": []}
    with torch.no_grad():
        for _ in range(runs + 1):
            start = time.perf_counter()
            model(ids[:1], use_cache=False, logits_to_keep=1)
            times["prompt"].append(time.perf_counter() - start)
            for name, rows in (("one", 1), ("eight", 8)):
                cache = DynamicCache(config=model.config)
                model(ids[:rows, :PREFIX], past_key_values=cache, logits_to_keep=1)
                for position in range(tokens):
                    start = time.perf_counter()
                    model(ids[:rows, position : position + 1], past_key_values=cache)
                    times[name].append(time.perf_counter() - start)
    warm = {"one": tokens, "eight": tokens, "prompt": 1}
    result = {name: statistics.median(taken[warm[name] :]) for name, taken in times.items()}
    return result | {"loading": loading, "peak": peak, "bytes": weight_bytes(model)}


def loaded(folder: Path) -> dict:
    """Load a folder; how long it took."""
    from transformers_emo import EmoForCausalLM

    quiet()
    start = time.perf_counter()
    model = EmoForCausalLM.from_pretrained(folder)
    return {"loading": time.perf_counter() - start, "bytes": weight_bytes(model)}


def extract(way: str, folder: Path, out: Path) -> dict:
    from transformers_emo import extract_subset

    quiet()
    start = time.perf_counter()
    extract_subset(folder, kept(folder), out, quantization_config=packing(way), progress=False)
    return {"seconds": time.perf_counter() - start}


def on_their_own(part: str, *arguments: object) -> dict:
    return in_own_process(__file__, ["--part", part, *arguments])


def show(ratio: float, text: str, digits: int = 2) -> None:
    print(f"{ratio:.{digits}f}  {text}", flush=True)


def main() -> None:
    """Measure every way, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one layer, one run, two documents")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="the checkpoint; made here if it is not there")
    parser.add_argument("--documents", type=int, default=1000, help="of each domain at most")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="bfloat16 is always one")
    parser.add_argument("--only", choices=["losses", "speed"], help="one half of it")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        part, *rest = args.part
        parts = {
            "losses": lambda way, subset, documents, kind: losses(way, subset, int(documents), kind),
            "quantising": lambda way, folder: quantising(way, Path(folder)),
            "extract": lambda way, folder, out: extract(way, Path(folder), Path(out)),
            "speed": lambda folder, *numbers: speed(Path(folder), *map(int, numbers)),
            "loaded": lambda folder: loaded(Path(folder)),
        }
        print(json.dumps(parts[part](*rest)))
        return
    if args.quick:
        args.layers = args.runs = 1
        args.documents, args.tokens, args.prompt = 2, 4, 64
    if args.only != "speed":
        measure_losses(args.documents)
    if args.only != "losses":
        with tempfile.TemporaryDirectory() as temporary:
            measure_speed(args, args.folder or Path(temporary, "full"), Path(temporary))


def measure_losses(documents: int) -> None:
    for subset in ("all", DOMAIN):
        print(f"emo-tiny, {'all experts' if subset == 'all' else f'16 experts for {subset}'}", flush=True)
        best = on_their_own("losses", "float32", subset, documents, "float32")
        for way in WAYS:
            if way == "4 bits, groups of 128":
                continue  # emo-tiny's experts are 64 wide
            for kind in ACTIVATIONS[1:2] if way == "bfloat16" else ACTIVATIONS:
                its = on_their_own("losses", way, subset, documents, kind)
                show(
                    math.exp(its["loss"] - best["loss"]),
                    f"times the perplexity in float32: {way}, activations "
                    f"{'rounded' if kind == 'rounded' else f'in {kind}'}  ({math.exp(its['loss']):.3f} over "
                    f"{its['tokens']} tokens; {its['bytes'] / 1e6:.2f} MB)",
                    4,
                )


def measure_speed(args: argparse.Namespace, folder: Path, out: Path) -> None:
    make_checkpoint(folder, args.layers)
    print(f"{KEPT} of 128 experts at true width, {args.layers} layers; loading from their own folder")
    plain: dict = {}
    # The first is what the others are compared with.
    for number, way in enumerate(way for way in WAYS if way in {"bfloat16", *args.ways}):
        part = out / f"part-{number}"
        on_their_own("extract", way, folder, part)
        its = on_their_own("speed", part, args.tokens, args.prompt, args.runs)
        times = [on_their_own("loaded", part)["loading"] for _ in range(args.runs)]
        its["loading"] = statistics.median(times)
        plain = plain or its
        for kind, name in (
            ("one", "a token, one sequence"),
            ("eight", "a token, eight sequences"),
            ("prompt", f"a prompt of {args.prompt}"),
            ("loading", "loading"),
        ):
            show(
                its[kind] / plain[kind],
                f"times the time in bfloat16: {name}, {way}  ({1e3 * its[kind]:.1f} ms)",
            )
        show(
            its["bytes"] / plain["bytes"],
            f"times the memory of bfloat16: all weights, {way}  ({its['bytes'] / 1e6:.0f} MB; peak of "
            f"loading {its['peak'] / 1e6:.0f} MB)",
        )
        for file in part.iterdir():
            file.unlink()
        if WAYS[way] is not None:
            its = on_their_own("quantising", way, folder)
            show(
                (its["peak"] - its["largest"]) / its["bytes"],
                f"times the model: peak while it is quantised beyond a layer's largest tensor, {way}  "
                f"({its['peak'] / 1e6:.0f} MB, {its['largest'] / 1e6:.0f} MB, {its['bytes'] / 1e6:.0f} MB; "
                f"{its['loading']:.1f} s)",
            )


if __name__ == "__main__":
    main()
