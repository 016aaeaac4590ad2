"""What each part of training with document pools is good for: short runs of emo-tiny's recipe, one thing
changed in each.

    python examples/emo_tiny/ablations.py [OUT]    # after the corpus is built

Interrupted, it goes on where it was. Every run sees the same windows in the same order. `OUT/README.md` holds
the table, and `OUT/retention.csv` its numbers by domain.
"""

import argparse
import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers_emo.analysis import (
    Retention,
    claims,
    measure_retention,
    read_domains,
    topic_cosine,
    write_csv,
)
from transformers_emo.analysis.files import write_text
from transformers_emo.analysis.tables import table
from transformers_emo.training import EmoTrainer, Recipe, build_trainer, last_checkpoint

RECIPE = Path(__file__).parent / "emo-tiny.yaml"
SPAN = 64  # tokens of each document in windows that are mixed
SHARES = (0.25, 0.125)
METHODS = ("layerwise", "random")

Batch = dict[str, torch.Tensor]


class MixedWindows:
    """Cuts the windows of a batch into spans and deals them out anew, so that each holds unrelated documents.

    Args:
        collate (`Callable`): makes a batch of windows.
        pools (`str`): `"document"` for a pool a span, `"random"` for as many segments a window, cut at random
            places, or `"window"` for one pool a window.
    """

    def __init__(self, collate: Callable[[Any], Batch], pools: str):
        self.collate = collate
        self.pools = pools

    def __call__(self, windows: Any) -> Batch:
        """Rows (B, S) whose span j is that of row i + j before."""
        batch = self.collate(windows)
        rows, length = batch["input_ids"].shape
        place_S = torch.arange(length)
        span_S = place_S // SPAN
        from_BS = (torch.arange(rows)[:, None] + span_S) % rows
        batch = {name: value[from_BS, place_S] for name, value in batch.items()}
        batch["labels"][:, place_S % SPAN == 0] = -100  # nothing tells how an unrelated document goes on
        if self.pools == "document":
            batch["document_ids"] = batch["document_ids"] + length * span_S
        elif self.pools == "random":
            # From the batch, so that a run that is resumed draws what it would have drawn.
            seed = zlib.crc32(batch["input_ids"].numpy().tobytes())
            drawn_BS = torch.rand(rows, length - 1, generator=torch.Generator().manual_seed(seed))
            cuts_BC = drawn_BS.topk(int(span_S[-1])).indices + 1
            begins_BS = torch.zeros(rows, length, dtype=torch.long).scatter_(1, cuts_BC, 1)
            batch["document_ids"] = begins_BS.cumsum(1)
        else:
            batch["document_ids"] = torch.zeros_like(batch["document_ids"])
        return batch


class LocalBalance(EmoTrainer):
    """Balances every micro-batch by its own picks."""

    def compute_loss(self, *args, **kwargs):
        """See `EmoTrainer.compute_loss`."""
        self._step_counts = None
        return super().compute_loss(*args, **kwargs)


@dataclass(frozen=True)
class Variant:
    """One run.

    Args:
        what (`str`): what is changed, for the table.
        changes (`dict`): of the recipe.
        trainer (`type[EmoTrainer]`): that trains it.
        mixed (`str`, *optional*): `MixedWindows.pools`.
        annealed (`str`, *optional*): a run whose last tenth this one does again.
    """

    what: str
    changes: dict[str, Any] = field(default_factory=dict)
    trainer: type[EmoTrainer] = EmoTrainer
    mixed: str | None = None
    annealed: str | None = None


NO_POOLS = {"model.config.document_pool_min": 63}
ACROSS = {"model.config.attention_within_documents": False}
MICRO_BATCHES = {"training.per_device_train_batch_size": 1}
VARIANTS = {
    "standard": Variant("no pools: the standard mixture of experts", NO_POOLS),
    "emo": Variant("pools of 7 to 63 experts, as emo-tiny"),
    "fixed": Variant(
        "pools of 15 experts always",
        {"model.config.document_pool_min": 15, "model.config.document_pool_max": 15},
    ),
    "annealed": Variant("no pools, then emo-tiny's for the last tenth", annealed="standard"),
    "across": Variant("attention across documents", ACROSS),
    "local": Variant(
        "micro-batches of one window, each balanced by its own picks", MICRO_BATCHES, LocalBalance
    ),
    "mixed": Variant("windows of 8 unrelated documents, a pool for each", ACROSS, mixed="document"),
    "mixed-random": Variant(
        "the same windows, a pool for each of 8 segments cut at random", ACROSS, mixed="random"
    ),
    "mixed-window": Variant("the same windows, one pool for all of it", ACROSS, mixed="window"),
}


def run(name: str, out: Path, budget: dict[str, Any]) -> Path:
    """Train a variant, or what is left of it; the folder of the model."""
    variant, folder = VARIANTS[name], out / name
    said = folder / "budget.json"
    if said.exists() and json.loads(said.read_text()) != budget:
        raise ValueError(f"{folder} was trained with another budget, {said.read_text()}: name another OUT.")
    write_text(said, json.dumps(budget))
    if (folder / "model.safetensors").exists():
        return folder
    if variant.annealed is not None and last_checkpoint(folder) is None:
        start = f"checkpoint-{budget['training.max_steps'] - budget['training.save_steps']}"
        partial = folder / f"{start}.partial"
        shutil.copytree(run(variant.annealed, out, budget) / start, partial, dirs_exist_ok=True)
        partial.rename(folder / start)
    recipe = Recipe.read(RECIPE, budget | {"output_dir": str(folder)} | variant.changes)
    trainer = build_trainer(recipe, trainer_class=variant.trainer)
    if variant.mixed is not None:
        trainer.data_collator = MixedWindows(trainer.data_collator, variant.mixed)
    print(f"{name}: {variant.what}", flush=True)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    trainer.save_model()
    return folder


def report(retention: Retention, cosines: dict[str, float], budget: dict[str, Any]) -> str:
    """The table as markdown."""
    found = claims(retention, shares=SHARES)["models"]
    rows = []
    for name, variant in VARIANTS.items():
        if name in found:
            rises = [
                found[name]["methods"][method]["rise"][f"{share:g}"] for share in SHARES for method in METHODS
            ]
            cells = [f"{r['value']:+.3f} ± {(r['high'] - r['low']) / 2:.3f}" for r in rises]
            rows.append(
                [name, variant.what, f"{found[name]['full_loss']:.3f}", *cells, f"{cosines[name]:.2f}"]
            )
    chosen = [f"{100 * share:g} %, {method}" for share in SHARES for method in METHODS]
    head = ["run", "changed", "all experts", *chosen, "topic cosine"]
    tokens = budget["training.max_steps"] * budget["training.windows_per_step"] * 512
    return "\n".join(
        [
            "# Ablations",
            "",
            f"Made by `examples/emo_tiny/ablations.py`: {tokens:,} tokens each, one seed. Test loss in nats "
            "per token, mean over the domains, all experts; its rise with experts chosen layer by layer or "
            "at random, ± half of what holds 95 % of the bootstrap over documents; the mean cosine "
            "between domains of the experts used.",
            "",
            *table(head, rows),
            "",
        ]
    )


def main() -> None:
    """Train all, measure all, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", nargs="?", type=Path, default=Path("out/ablations"))
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS), help="these runs")
    parser.add_argument("--train-only", action="store_true", help="measure later")
    parser.add_argument("--steps", type=int, default=600, help="of each run; ten at least")
    parser.add_argument(
        "--windows", type=int, default=16, help="windows a step; one from each mixed document"
    )
    parser.add_argument("--texts", type=Path, default=Path("corpus"), help="documents to measure on")
    parser.add_argument("--test", type=int, default=16, help="test documents a domain")
    args = parser.parse_args()
    budget = {
        "training.max_steps": args.steps,
        "training.warmup_steps": args.steps // 20,
        "training.save_steps": args.steps // 10,
        "training.windows_per_step": args.windows,
        "training.per_device_train_batch_size": args.windows,
        "training.disable_tqdm": True,
    }
    folders = {name: run(name, args.out, budget) for name in args.only}
    if args.train_only:
        return
    cosines = {}
    retention = measure_retention(
        folders,
        read_domains(args.texts, max_test=args.test),
        args.out,
        methods=METHODS,
        shares=SHARES,
        visit=lambda name, model, documents: cosines.update({name: topic_cosine(model, documents).mean}),
    )
    write_csv(retention, args.out / "retention.csv")
    text = report(retention, cosines, budget)
    write_text(args.out / "README.md", text)
    print(text)


if __name__ == "__main__":
    main()
