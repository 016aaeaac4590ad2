"""Expert shards: how many files, and how many bytes too many, for experts grouped by 1, 2, 4 or 8.

    python benchmarks/expert_shards.py

Claim: cut by single experts, a checkpoint gives every subset without a byte too many.

Subsets are those that `select_experts` takes for each domain of the toy model, and random ones of a model as
large as the released one. Waste is the bytes of the files that a subset needs, over those of its tensors.
"""

import json
import random
from pathlib import Path

from transformers_emo import EmoConfig, select_experts
from transformers_emo.checkpoints import Checkpoint
from transformers_emo.conversion.expert_shards import BACKBONE, plan_expert_files

TOY = Path(__file__).parents[1] / "model_cards" / "toy-emo"


def expert_names(config: EmoConfig) -> list[str]:
    """The tensors of all experts."""
    return [
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer, experts in enumerate(config.layer_experts)
        for expert in range(experts.num_experts)
        for part in ("gate", "up", "down")
    ]


def waste(files: dict[str, list[str]], kept: list[list[int]], per_tensor: int, backbone: int) -> float:
    """Bytes of the files needed over bytes of the tensors wanted."""
    wanted = {f"model.layers.{i}.mlp.experts.{e}." for i, ids in enumerate(kept) for e in ids}
    needed = [
        names
        for file, names in files.items()
        if file == BACKBONE
        or any(name.rpartition(".experts.")[0] and _expert(name) in wanted for name in names)
    ]
    fetched = backbone + per_tensor * sum(map(len, needed))
    return fetched / (backbone + per_tensor * 3 * len(wanted))


def _expert(name: str) -> str:
    return ".".join(name.split(".")[:6]) + "."


def report(title: str, config: EmoConfig, subsets: list[list[list[int]]], backbone: int) -> None:
    """Print a line for each size of group."""
    for group in (1, 2, 4, 8):
        files = plan_expert_files(expert_names(config), config, group)
        per_tensor = 4 * config.hidden_size * config.intermediate_size
        ratios = [waste(files, kept, per_tensor, backbone) for kept in subsets]
        print(
            f"{sum(ratios) / len(ratios):.3f}  times the wanted bytes are fetched, "
            f"{group} experts a file: {len(files)} files, {title}"
        )


def main() -> None:
    """Measure on the toy model, and draw for one as large as the released one."""
    config = EmoConfig.from_pretrained(TOY)
    tensors = Checkpoint.from_folder(TOY).tensors
    backbone = sum(span.end - span.start for name, span in tensors.items() if ".experts." not in name)
    domains = sorted((TOY / "documents").rglob("*.jsonl"))
    subsets = []
    for path in domains:
        texts = [json.loads(line)["text"] for line in path.read_text().splitlines()[:4]]
        subsets.append(select_experts(str(TOY), texts, 4, progress=False).experts)
    report(f"toy-emo, 4 of 32, {len(domains)} domains, chosen", config, subsets, backbone)
    rng = random.Random(0)
    config = EmoConfig(num_experts=128, num_experts_per_tok=8, num_hidden_layers=16)
    attention_and_embeddings = 4 * (2 * 100278 * 2048 + 16 * (4 * 2048 * 2048 + 128 * 2048))
    draws = [[[*rng.sample(range(127), 15), 127] for _ in range(16)] for _ in range(5)]
    report("1b14b, 16 of 128, at random", config, draws, attention_and_embeddings)


if __name__ == "__main__":
    main()
