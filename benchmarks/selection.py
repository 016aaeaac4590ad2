"""Choosing experts from a folder against running the pruned model, and against the naive algorithm.

    python benchmarks/selection.py [--quick] [--layers 4] [--folder DIR]

Claim: choosing experts layer by layer costs no more than one pass of the model that they make, and memory for
one layer.

Chooses 16 of 128 experts layerwise over 4,096 tokens, from a synthetic checkpoint of EMO's true width (as in
loading.py), and runs the model of these experts over the same tokens, without a head; each in a fresh
process, with the same implementation of the experts. Ratios first:

- time and processor time of the choice over those of one forward pass of the pruned model, with reading it
  and without;
- peak memory of the choice, less what the process used before, against one layer's chosen experts, the
  backbone and the hidden states;
- bytes read from a cold disk over the bytes of the backbone's layers and the chosen experts.

Then, at 16 layers and a small width, the naive algorithm, which runs the first l layers of a model in memory
anew to choose layer l, over the choice from disk and in memory.

Processor time is what counts on a machine that has other work.
"""

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from loading import drop_from_cache, make_checkpoint
from processes import disk_bytes, in_own_process, peak_bytes, peak_megabytes, resident

KEPT, TEXTS, LENGTH = 16, 4, 1024
SMALL = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def tokens(vocab_size: int):
    import torch

    return torch.randint(2, vocab_size, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(0))


class Clock:
    """Seconds and processor seconds."""

    def __init__(self):
        self.start = time.perf_counter(), time.process_time()

    def read(self) -> dict:
        """What has gone by."""
        return {
            "wall": time.perf_counter() - self.start[0],
            "processor": time.process_time() - self.start[1],
        }


def choose(folder: str, subset: Path) -> dict:
    """Choose in this process; what it took."""
    from transformers_emo import EmoConfig, select_experts

    ids = tokens(EmoConfig.from_pretrained(folder).vocab_size)
    before, read_before, clock = peak_bytes(), disk_bytes(), Clock()
    chosen = select_experts(folder, input_ids=[ids], num_experts=KEPT, progress=False)
    took = clock.read()
    chosen.save(subset)
    return took | {"peak": peak_bytes() - before, "read": disk_bytes() - read_before}


def run_pruned(folder: str, subset: Path) -> dict:
    """Load the pruned model and run it; what each took."""
    import torch
    from transformers.utils import logging
    from transformers_emo import EmoModel

    logging.disable_progress_bar()
    clock = Clock()
    model = EmoModel.from_pretrained(folder, expert_subset=str(subset)).eval()
    loading = clock.read()
    ids = tokens(model.config.vocab_size)
    clock = Clock()
    with torch.no_grad():
        model(ids, use_cache=False)
    forward = clock.read()
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    layers = sum(p.nbytes for name, p in model.named_parameters() if "layers." in name)
    return {
        "loading": loading,
        "forward": forward,
        "experts": experts / model.config.num_hidden_layers,
        "layers": layers - experts,
        "backbone": sum(p.nbytes for p in model.parameters()) - experts,
        "hidden": TEXTS * LENGTH * model.config.hidden_size * model.dtype.itemsize,
    }


def against_naive(folder: str, _: Path) -> dict:
    """The naive algorithm, the choice in memory and from disk; what each took."""
    import torch
    from transformers.utils import logging
    from transformers_emo import EmoConfig, EmoModel, select_experts

    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = EmoModel(
        EmoConfig(**SMALL),
    ).eval()
    with torch.no_grad():  # so large that routers have preferences
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5 if "gate.weight" in name else 0.05)
    model.save_pretrained(folder)
    ids = tokens(model.config.vocab_size)
    result = {}
    kept: list = []
    num_layers, num_experts = model.config.num_hidden_layers, model.config.num_experts
    before, clock = resident(peak=False, forget=True), Clock()
    for index in range(num_layers):
        model.config.num_hidden_layers = index + 1
        with model.use_experts([*kept, range(num_experts)]), torch.no_grad():
            logits = model(ids, use_cache=False, output_router_logits=True).router_logits[index]
        score = logits[:, :-1].softmax(-1, dtype=torch.float32).mean(0, dtype=torch.float64)
        kept.append([*score.topk(KEPT - 1).indices.sort().values.tolist(), num_experts - 1])
    result["naive"] = clock.read()
    result["naive memory"] = resident(peak=True) - before
    for name, source in (("memory", model), ("disk", folder)):
        choose_from = partial(select_experts, source, input_ids=[ids], num_experts=KEPT, progress=False)
        clock = Clock()
        chosen = choose_from()
        result[name] = clock.read()
        result[f"{name} memory"] = peak_megabytes(choose_from)
        result[f"{name} equals naive"] = chosen.experts == kept
    return result


PARTS = {"choose": choose, "pruned": run_pruned, "naive": against_naive}


def measure(part: str, folder: Path, subset: Path, threads: int) -> dict:
    arguments = ["--part", part, "--folder", folder, "--subset", subset, "--threads", threads]
    return in_own_process(__file__, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one layer, one run")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--subset", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        import torch

        torch.set_num_threads(args.threads)
        print(json.dumps(PARTS[args.part](str(args.folder), args.subset)))
        return
    if args.quick:
        args.layers = args.runs = 1
    with tempfile.TemporaryDirectory() as temporary:
        folder, subset = args.folder or Path(temporary, "model"), Path(temporary, "subset.json")
        make_checkpoint(folder, args.layers)
        choices, pruned = [], []
        for _ in range(args.runs):
            drop_from_cache(folder)
            choices.append(measure("choose", folder, subset, args.threads))
            drop_from_cache(folder)
            pruned.append(measure("pruned", folder, subset, args.threads))
        naive = measure("naive", Path(temporary, "small"), subset, args.threads)

    sizes = pruned[0]
    print(f"{KEPT} of 128 experts over {TEXTS * LENGTH} tokens, cold disk, median of {args.runs}")
    for kind in ("wall", "processor"):
        chosen = statistics.median(run[kind] for run in choices)
        forward = statistics.median(run["forward"][kind] for run in pruned)
        loading = statistics.median(run["loading"][kind] for run in pruned)
        print(
            f"{chosen / (forward + loading):.3f}  times the {kind} time of loading and forward: choosing  "
            f"({chosen:.1f} s / {loading:.1f} + {forward:.1f} s)"
        )
        print(f"{chosen / forward:.3f}  times the {kind} time of forward: choosing")
    peak = max(run["peak"] for run in choices)
    parts = sizes["experts"] + sizes["hidden"]
    print(
        f"{peak / (parts + sizes['backbone']):.3f}  times one layer's chosen experts, hidden states and "
        f"backbone: peak memory of choosing  ({peak / 1e6:.0f} MB / {parts / 1e6:.0f} + "
        f"{sizes['backbone'] / 1e6:.0f} MB)"
    )
    wanted = sizes["layers"] + sizes["experts"] * (args.layers - 1)
    read = statistics.median(run["read"] for run in choices)
    print(
        f"{read / wanted:.3f}  times the bytes of layers without experts, and chosen experts of all but the "
        "last: bytes read (with rows of the embedding)"
    )
    for name in ("memory", "disk"):
        same = naive[f"{name} equals naive"]
        for kind in ("wall", "processor"):
            ratio = naive["naive"][kind] / naive[name][kind]
            print(
                f"{ratio:.2f}  times the {kind} time of choosing from {name}: naive, 16 layers  "
                f"(same choice: {same}; {naive['naive memory']:.0f} MB / {naive[f'{name} memory']:.0f} MB)"
            )


if __name__ == "__main__":
    main()
