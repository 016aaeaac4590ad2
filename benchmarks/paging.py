"""The whole model with room for some of its experts, against all in memory and accelerate's disk offload.

    python benchmarks/paging.py [--quick] [--layers 4] [--folder DIR] [--widened MODEL] [--slots 32]

Claim: with `expert_memory` for 32 experts a layer the whole model needs that memory and its backbone, reads
the experts that are missing and no other byte, and decodes as fast as with all in memory once the prompt's
document pool is there. With `disable_mmap=False` the first token comes long before the model could be read.

Bar: memory 1.05 times budget and backbone or less; with `document_pool=32` 0.9 of the tokens a second of all
in memory; bytes read 1.05 times those of the missing experts or less; unrestricted 4 times the tokens a
second of accelerate's offload; the first token of the mapped model, cold, in 0.3 of the time that loading
all of it takes.

Makes a synthetic checkpoint at EMO's true width (128 experts of width 1024, bfloat16). Every way runs in a
process of its own, in turns: greedy text after a prompt of 32 tokens, all routing and within document pools.
Random weights route at random, the worst case: 32 tokens take most experts of a layer. With `--widened
model_cards/emo-tiny` the weights are those of a model trained on text, padded to this width (`widened.py`):
it routes as trained models do, with 64 experts a layer, of which a token takes 4. Medians of the turns.
Memory is the peak of the process, less what it used before loading.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from loading import drop_from_cache, make_checkpoint
from processes import disk_bytes, in_own_process, kernel_count, peak_bytes
from widened import widen

PROMPT = 32
POOL = 32
TEXT = '''def parse_args(argv):
    """Parse the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", type=str)
    parser.add_argument("--count", type=int)
'''


def prompt_of(folder: str, words: int):
    """A prompt: text, if there is a tokenizer, or random words."""
    import torch
    from transformers import AutoTokenizer

    if Path(folder, "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return tokenizer(TEXT, return_tensors="pt").input_ids[:, :PROMPT]
    return torch.randint(2, words, (1, PROMPT), generator=torch.Generator().manual_seed(1))


def generate(folder: str, way: str, slots: int, pool: int, tokens: int, offload: str) -> dict:
    """Load and generate in this process; what it took."""
    import torch
    import transformers_emo  # noqa: F401
    from transformers.utils import logging
    from transformers_emo import EmoConfig, EmoForCausalLM

    logging.disable_progress_bar()
    torch.set_num_threads(2)
    config = EmoConfig.from_pretrained(folder)
    budget = slots * config.num_hidden_layers * 6 * config.hidden_size * config.intermediate_size
    kwargs: dict = {}
    if way == "paged":
        kwargs["expert_memory"] = budget
    elif way == "mapped":
        kwargs["disable_mmap"] = False
    elif way == "accelerate":
        places = {f"model.layers.{layer}": "disk" for layer in range(config.num_hidden_layers)}
        resident = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
        kwargs |= {"device_map": dict.fromkeys(resident, "cpu") | places}
        kwargs |= {"offload_folder": offload}
    before, read_before = peak_bytes(), disk_bytes()
    start = time.perf_counter()
    model = EmoForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **kwargs).eval()
    loading = time.perf_counter() - start
    choice = {"document_pool": pool} if pool else {}
    ids = prompt_of(folder, config.vocab_size)

    def run(count: int) -> float:
        begin = time.perf_counter()
        settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        model.generate(ids, attention_mask=torch.ones_like(ids), **settings, **choice)
        return time.perf_counter() - begin

    first = run(1)
    disk = disk_bytes() - read_before
    memory = model.expert_memory
    counted = kernel_count("io", "rchar")
    if memory is not None:
        memory.reset_counts()
    run(1 + tokens)
    counted = kernel_count("io", "rchar") - counted
    report = None if memory is None else memory.report()
    repeats = 1 if way == "accelerate" else 3
    token = statistics.median((run(1 + tokens) - run(1)) / tokens for _ in range(repeats))
    result = {
        "loading": loading,
        "first": loading + first,
        "token": token,
        "peak": peak_bytes() - before,
        "resident": sum(parameter.nbytes for parameter in model.parameters() if not parameter.is_meta),
        "disk": disk,
        "counted": counted,
    }
    if report is not None:
        result |= {
            "budget": report.budget,
            "always": report.always_used_bytes,
            "missing": report.misses * report.expert_bytes,
            "read": report.bytes_read,
            "hits": report.hit_rate,
            "a token": report.bytes_per_token,
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one layer, one turn of few tokens")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="the checkpoint; made here if it is not there")
    parser.add_argument(
        "--widened", type=Path, help="a small model that is widened in place of random weights"
    )
    parser.add_argument("--slots", type=int, default=32, help="experts a layer that there is room for")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        way, pool = args.part
        with tempfile.TemporaryDirectory() as offload:
            print(json.dumps(generate(str(args.folder), way, args.slots, int(pool), args.tokens, offload)))
        return
    if args.quick:
        args.layers, args.turns, args.tokens = 1, 1, 8
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if args.widened is None:
            make_checkpoint(folder, args.layers)
        else:
            widen(args.widened, folder)
        runs: dict[tuple[str, int, bool], list[dict]] = {}

        def measure(way: str, pool: int, cold: bool, tokens: int = args.tokens) -> None:
            if cold:
                drop_from_cache(folder)
            options = ["--folder", folder, "--slots", args.slots, "--tokens", tokens, "--part", way, pool]
            runs.setdefault((way, pool, cold), []).append(in_own_process(__file__, options))

        for turn in range(args.turns):
            for way in ("whole", "mapped", "paged"):
                measure(way, POOL, True)
            for pool in (POOL, 0):
                measure("whole", pool, False)
                measure("paged", pool, False)
            measure("mapped", POOL, False)
            if turn == 0:  # it takes long
                measure("accelerate", 0, False, tokens=4)
    report(runs, args)


def report(runs: dict[tuple[str, int, bool], list[dict]], args: argparse.Namespace) -> None:
    """Print what came of it."""

    def median(way: str, pool: int, cold: bool, key: str) -> float:
        return statistics.median(run[key] for run in runs[way, pool, cold])

    def rate(way: str, pool: int) -> float:
        return 1 / median(way, pool, False, "token")

    whole = median("whole", POOL, False, "resident")
    print(f"{whole / 1e9:.2f} GB, room for {args.slots} experts a layer, median of {args.turns}")
    paged = runs["paged", 0, False][0]
    allowed = paged["budget"] + paged["always"] + paged["resident"]
    peak = median("paged", 0, False, "peak")
    print(
        f"{peak / allowed:.3f}  times budget and backbone: peak memory with `expert_memory`  ("
        f"{peak / 1e6:.0f} MB / {allowed / 1e6:.0f} MB; to reach: 1.05)"
    )
    for way in ("paged", "mapped"):
        print(
            f"{rate(way, POOL) / rate('whole', POOL):.2f}  times the tokens a second of all in memory: "
            f"{way}, document_pool={POOL}, after the prompt  ("
            f"{rate(way, POOL):.1f} / {rate('whole', POOL):.1f}"
            f"{'; to reach: 0.9' if way == 'paged' else ''})"
        )
    print(
        f"{rate('paged', 0) / rate('whole', 0):.2f}  times the tokens a second of all in memory: paged, "
        f"every expert, files in the page cache  ({rate('paged', 0):.1f} / {rate('whole', 0):.1f}; "
        f"{median('paged', 0, False, 'hits'):.0%} found in memory, "
        f"{median('paged', 0, False, 'a token') / 1e6:.0f} MB read a token)"
    )
    print(
        f"{rate('paged', 0) / rate('accelerate', 0):.1f}  times the tokens a second of accelerate's disk "
        f"offload: every expert  ({rate('paged', 0):.1f} / {rate('accelerate', 0):.2f}; to reach: 4)"
    )
    for pool, name in ((0, "every expert"), (POOL, f"document_pool={POOL}")):
        missing = max(median("paged", pool, False, "missing"), 1.0)
        print(
            f"{median('paged', pool, False, 'counted') / missing:.3f}  times the bytes of the missing "
            f"experts: bytes that the process read, {name}  (to reach: 1.05)"
        )
    for way in ("mapped", "paged"):
        first, loading = median(way, POOL, True, "first"), median("whole", POOL, True, "loading")
        print(
            f"{first / loading:.2f}  times the time of loading the whole model, cold disk: first token, "
            f"{way}, document_pool={POOL}  ({first:.2f} s / {loading:.2f} s, "
            f"{median(way, POOL, True, 'disk') / 1e9:.2f} GB from the disk"
            f"{'; to reach: 0.3' if way == 'mapped' else ''})"
        )


if __name__ == "__main__":
    main()
