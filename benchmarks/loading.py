"""Loading a subset of the experts against loading the whole model: bytes read, peak memory, time.

    python benchmarks/loading.py [--layers 4] [--folder DIR]

Makes a synthetic checkpoint at EMO's true width (hidden size 2048, 128 experts of width 1024, bfloat16), in
shards cut by layer as released, then loads it in fresh processes. Ratios first:

- bytes read from disk by a cold subset load (the kernel's own count) over the bytes of the tensors kept;
- peak memory of the process, less what it used before loading, over the bytes of the loaded model;
- time of the subset load over time of the full load, both cold and both warm.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KEPT = 16


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


def load(folder: str, subset: bool) -> dict:
    """Load in this process; what it took."""
    import torch  # noqa: F401  (its memory belongs to the interpreter's own)
    import transformers_emo  # noqa: F401
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = json.loads(Path(folder, "config.json").read_text())
    # Evenly spread ids: the worst case for reading, no two experts are neighbours.
    ids = [*range(0, 128, 128 // (KEPT - 1))][: KEPT - 1] + [127]
    kwargs = {"expert_subset": [ids] * config["num_hidden_layers"]} if subset else {}
    before, read_before = peak_bytes(), disk_bytes()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    seconds = time.perf_counter() - start
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "seconds": seconds,
        "read": disk_bytes() - read_before,
        "peak": peak_bytes() - before,
        "model": model_bytes,
    }


def peak_bytes() -> int:
    """Largest resident size so far. Not `ru_maxrss`, which a child process inherits from its parent."""
    return kernel_count("status", "VmHWM") * 1024


def disk_bytes() -> int:
    """Bytes that the kernel has fetched from storage for this process."""
    return kernel_count("io", "read_bytes")


def kernel_count(file: str, name: str) -> int:
    lines = Path("/proc/self", file).read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name)))


def drop_from_cache(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(folder: Path, subset: bool, cold: bool) -> dict:
    if cold:
        drop_from_cache(folder)
    command = [sys.executable, __file__, "--folder", str(folder), "--load", "subset" if subset else "full"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--load", choices=("subset", "full"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        print(json.dumps(load(str(args.folder), args.load == "subset")))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        make_checkpoint(folder, args.layers)
        runs: dict[tuple, list[dict]] = {}
        for _ in range(args.runs):
            for subset, cold in ((False, True), (False, False), (True, True), (True, False)):
                runs.setdefault((subset, cold), []).append(measure(folder, subset, cold))

    def median(subset: bool, cold: bool, key: str) -> float:
        return statistics.median(run[key] for run in runs[subset, cold])

    model, full = median(True, True, "model"), median(False, True, "model")
    print(
        f"{KEPT} of 128 experts, {args.layers} layers: {model / 1e9:.2f} of {full / 1e9:.2f} GB, median of "
        f"{args.runs}"
    )
    print(f"bytes read, cold subset / tensors kept: {median(True, True, 'read') / model:.4f}")
    for subset, size in ((True, model), (False, full)):
        name = "subset" if subset else "full"
        print(
            f"peak memory / model, {name}:           "
            f"{max(median(subset, c, 'peak') for c in (0, 1)) / size:.3f}"
        )
    for cold in (True, False):
        name = "cold" if cold else "warm"
        a, b = median(True, cold, "seconds"), median(False, cold, "seconds")
        print(f"time, subset / full, {name}:            {a / b:.3f}  ({a:.2f} s / {b:.2f} s)")


if __name__ == "__main__":
    main()
