"""Loading the whole model against reading its files, and a subset of the experts against the whole.

    python benchmarks/loading.py [--quick] [--layers 4] [--folder DIR] [--runs 3]

Claim: the whole model loads about as fast as its files can be read at all, a subset reads the bytes of its
experts alone, and neither needs more memory than the weights.

Bar: the whole model at 0.8 of the bandwidth of a plain read or more, with 1.25 times the weights of memory or
less.

Makes a synthetic checkpoint at EMO's true width (hidden size 2048, 128 experts of width 1024, bfloat16), in
shards cut by layer as released, then loads it in fresh processes, from a cold disk and from the page cache.
The plain read takes turns with the loads: the same files, by as many threads as Transformers loads with, each
into 16 MB that it uses again and again. Beside it stand a read into as much new memory as a model takes,
Transformers' own way to load EMO, and weights that stay pages of their files (`disable_mmap=False`), where
tokens take longer: `generation.py --mapped`. Memory is the peak of the process, less what it used before
loading.
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from processes import disk_bytes, in_own_process, peak_bytes

KEPT = 16
BLOCK, PIECE = 1 << 28, 1 << 24


def make_checkpoint(folder: Path, layers: int) -> None:
    import torch
    from safetensors.torch import save_file
    from tqdm import tqdm
    from transformers_emo import EmoConfig

    if (folder / "config.json").exists():
        return
    config = EmoConfig(num_hidden_layers=layers, dtype="bfloat16", architectures=["EmoForCausalLM"])
    hidden, width = config.hidden_size, config.intermediate_size

    def random(*shape: int) -> torch.Tensor:
        return (torch.rand(*shape, dtype=torch.float32) - 0.5).mul_(0.04).to(torch.bfloat16)

    weight_map = {}

    def write(name: str, tensors: dict) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    folder.mkdir(parents=True, exist_ok=True)
    for layer in tqdm(range(layers), desc="Writing the checkpoint", unit="layer"):
        prefix = f"model.layers.{layer}."
        block = {prefix + f"self_attn.{p}_proj.weight": random(hidden, hidden) for p in "qkvo"}
        for norm in ("pre_attention", "pre_feedforward"):
            block[prefix + f"{norm}_layernorm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        block[prefix + "mlp.gate.weight"] = random(config.num_experts, hidden)
        for expert in range(config.num_experts):
            for p, shape in {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}.items():
                block[prefix + f"mlp.experts.{expert}.{p}_proj.weight"] = random(*shape)
        write(f"model-{layer + 1:05d}-of-{layers + 1:05d}.safetensors", block)
    rest = {f"{name}.weight": random(config.vocab_size, hidden) for name in ("model.embed_tokens", "lm_head")}
    rest["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    write(f"model-{layers + 1:05d}-of-{layers + 1:05d}.safetensors", rest)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    config.save_pretrained(folder)


def load(folder: str, what: str) -> dict:
    """Load in this process; what it took."""
    import torch  # noqa: F401  (its memory belongs to the interpreter's own)
    import transformers_emo  # noqa: F401
    from transformers.utils import logging
    from transformers_emo.modeling_emo.modeling_emo import EmoForCausalLM  # its import is not measured
    from transformers_emo.modeling_emo.package_hooks import package

    logging.disable_progress_bar()
    config = json.loads(Path(folder, "config.json").read_text())
    # Evenly spread ids: the worst case for reading, no two experts are neighbours.
    ids = [*range(0, 128, 128 // (KEPT - 1))][: KEPT - 1] + [127]
    kwargs = {"expert_subset": [ids] * config["num_hidden_layers"]} if what == "subset" else {}
    if what == "mapped":
        kwargs["disable_mmap"] = False
    if what == "transformers":
        package.hooks = None
    before, read_before = peak_bytes(), disk_bytes()
    start = time.perf_counter()
    model = EmoForCausalLM.from_pretrained(folder, **kwargs)
    seconds = time.perf_counter() - start
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "seconds": seconds,
        "read": disk_bytes() - read_before,
        "peak": peak_bytes() - before,
        "bytes": model_bytes,
    }


def read_plainly(folder: str, what: str) -> dict:
    """Read the files of weights in this process and do nothing with the bytes; what it took."""
    from transformers.core_model_loading import GLOBAL_WORKERS

    files = sorted(Path(folder).glob("*.safetensors"))
    jobs = [(file, at) for file in files for at in range(0, file.stat().st_size, BLOCK)]
    buffers = threading.local()

    def read(job: tuple[Path, int]) -> bytearray | None:
        file, at = job
        length = min(BLOCK, file.stat().st_size - at)
        buffer = bytearray(length) if what == "new" else getattr(buffers, "mine", None)
        if buffer is None:
            buffer = buffers.mine = bytearray(PIECE)
        view, step = memoryview(buffer), PIECE
        with open(file, "rb", buffering=0) as opened:
            for done in range(0, length, step):
                piece = view[done:] if what == "new" else view
                opened.seek(at + done)
                opened.readinto(piece[: min(step, length - done)])
        return buffer if what == "new" else None

    before, read_before = peak_bytes(), disk_bytes()
    start = time.perf_counter()
    with ThreadPoolExecutor(GLOBAL_WORKERS) as pool:
        kept = list(pool.map(read, jobs))
    seconds = time.perf_counter() - start
    del kept
    return {
        "seconds": seconds,
        "read": disk_bytes() - read_before,
        "peak": peak_bytes() - before,
        "bytes": sum(file.stat().st_size for file in files),
    }


def available_bytes() -> int:
    """Memory that programs can have, by Linux's own estimate."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) * 1024


def drop_from_cache(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(folder: Path, what: str, cold: bool) -> dict:
    if cold:
        drop_from_cache(folder)
    return in_own_process(__file__, ["--folder", folder, "--part", what])


def report(runs: dict[tuple[str, bool], list[dict]]) -> None:
    """Print what came of it."""

    def median(what: str, cold: bool, key: str) -> float:
        return statistics.median(run[key] for run in runs[what, cold])

    def shown(what: str, cold: bool) -> str:
        seconds, peak = median(what, cold, "seconds"), median(what, cold, "peak")
        return f"{seconds:.2f} s, {median(what, cold, 'bytes') / seconds / 1e9:.2f} GB/s, {peak / 1e6:.0f} MB"

    def bandwidth(what: str, cold: bool) -> float:
        return median(what, cold, "bytes") / median(what, cold, "seconds")

    names = {True: "cold disk", False: "page cache"}
    for cold, name in names.items():
        for other in PEERS:
            if (other, cold) not in runs:
                continue
            ratio = bandwidth("full", cold) / bandwidth(other, cold)
            print(
                f"{ratio:.2f}  times the bandwidth of {PEERS[other]}: loading the whole model, {name}  "
                f"({shown('full', cold)} / {shown(other, cold)})"
            )
        ratio = bandwidth("mapped", cold) / bandwidth("plain", cold)
        print(
            f"{ratio:.2f}  times the bandwidth of a plain read: whole model with disable_mmap=False, {name}  "
            f"({shown('mapped', cold)} / {shown('plain', cold)})"
        )
    for what, name in (("full", "whole model"), ("mapped", "whole model, mapped"), ("subset", "subset")):
        peak = max(median(what, cold, "peak") for cold in names) / median(what, True, "bytes")
        print(f"{peak:.3f}  times the bytes of the weights: peak memory of loading, {name}")
    read = median("subset", True, "read") / median("subset", True, "bytes")
    print(f"{read:.4f}  times the bytes of the tensors kept: bytes read, subset, cold disk")
    for cold, name in names.items():
        ratio = median("subset", cold, "seconds") / median("full", cold, "seconds")
        print(
            f"{ratio:.3f}  times the time of the whole model: subset, {name}  ({shown('subset', cold)} / "
            f"{shown('full', cold)})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one layer, one run")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="the checkpoint; made here if it is not there")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(PARTS[args.part](str(args.folder), args.part)))
        return
    if args.quick:
        args.layers = args.runs = 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        make_checkpoint(folder, args.layers)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        runs: dict[tuple[str, bool], list[dict]] = {}
        for _ in range(args.runs):
            for what, cold in TURNS:
                if what != "transformers" or available_bytes() > 2.5 * size:  # it holds experts twice
                    runs.setdefault((what, cold), []).append(measure(folder, what, cold))
    kept = statistics.median(run["bytes"] for run in runs["subset", True]) / 1e9
    print(f"{size / 1e9:.2f} GB; {KEPT} of 128 experts, {kept:.2f} GB; median of {args.runs}")
    report(runs)


PARTS = {
    "full": load,
    "mapped": load,
    "subset": load,
    "transformers": load,
    "plain": read_plainly,
    "new": read_plainly,
}
PEERS = {
    "plain": "a plain read",
    "new": "a read into new memory",
    "transformers": "Transformers' own loading",
}
# After a cold run of a kind the files are in the page cache for the warm ones.
TURNS = (
    ("plain", True),
    ("full", True),
    ("mapped", True),
    ("plain", False),
    ("full", False),
    ("mapped", False),
    ("new", False),
    ("transformers", False),
    ("subset", True),
    ("subset", False),
)


if __name__ == "__main__":
    main()
