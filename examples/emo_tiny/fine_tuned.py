"""What a short fine-tune gives back to a subset of experts, of emo-tiny and of std-tiny.

    python examples/emo_tiny/fine_tuned.py emo-tiny=model_cards/emo-tiny std-tiny=model_cards/std-tiny \\
        --out out/fine-tuned    # after the corpus is built; interrupted, it goes on where it was

For each model, domain and share experts are chosen layer by layer, loaded, measured, trained for a few steps
on the domain's training documents and measured again. `OUT/README.md` holds the table.
"""

import argparse
import hashlib
import tempfile
from pathlib import Path

from transformers import AutoTokenizer
from transformers_emo import EmoForCausalLM, select_experts
from transformers_emo.analysis import (
    Domain,
    Journal,
    Measurement,
    Retention,
    document_losses,
    encode_documents,
    num_experts_at,
    read_domains,
)
from transformers_emo.analysis.documents import draw
from transformers_emo.analysis.files import write_text
from transformers_emo.analysis.tables import table
from transformers_emo.training import Recipe, build_trainer

WINDOW = 512
CALIBRATION = 8  # documents, as many as `emo retention` takes
DOMAINS = ["python", "metamath", "scripture", "french", "c", "russian", "sql", "dictionary"]
SHARES = [1.0, 0.25, 0.125, 0.0625]
STATES = ("before", "after")


def digest(path: Path) -> str:
    """Tells files apart."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def measure(
    name: str, model: Path, domain: Domain, share: float, args: argparse.Namespace
) -> list[Measurement]:
    """Before and after the fine-tune."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = EmoForCausalLM.from_pretrained(model, dtype="float32")
    num_experts = num_experts_at(network.config, share)
    subset = None
    if share < 1:
        calibration = encode_documents(
            tokenizer, draw(domain.calibration, CALIBRATION, 0, domain.name), WINDOW
        )
        subset = select_experts(
            network, input_ids=calibration, num_experts=num_experts, progress=False
        ).to_dict()
    test = encode_documents(tokenizer, domain.test, WINDOW)
    with tempfile.TemporaryDirectory() as folder:
        files = str(args.texts / "train" / f"{domain.name}.jsonl")
        recipe = Recipe.from_dict(
            {
                "recipe": "fine-tune",
                "output_dir": folder,
                "model": {
                    "path": str(model),
                    "expert_subset": subset,
                    "options": {"dtype": "float32", "experts_implementation": "emo_sorted"},
                },
                "data": {"load": {"path": "json", "data_files": files, "split": "train"}, "window": WINDOW},
                "training": {
                    "max_steps": args.steps,
                    "windows_per_step": args.windows,
                    "learning_rate": args.learning_rate,
                    "save_strategy": "no",
                    "logging_strategy": "no",
                    "disable_tqdm": True,
                    "use_cpu": True,
                },
            }
        )
        trainer = build_trainer(recipe)
        found = []
        for state in STATES:
            if state == "after":
                trainer.train()
            losses = document_losses(trainer.model, test)
            found.append(
                Measurement(
                    model=f"{name} {state}",
                    domain=domain.name,
                    method="full" if share >= 1 else "layerwise",
                    share=share,
                    num_experts=num_experts,
                    seed=None if share >= 1 else 0,
                    loss=losses.loss_N.tolist(),
                    correct=losses.correct_N.tolist(),
                    tokens=losses.tokens_N.tolist(),
                )
            )
    return found


def report(retention: Retention, names: list[str], args: argparse.Namespace) -> str:
    """The table as markdown."""
    rows = []
    for name in names:
        for state in STATES:
            losses = [retention.loss(f"{name} {state}", "layerwise", share) for share in SHARES]
            rows.append([name, state, *("–" if loss is None else f"{loss:.3f}" for loss in losses)])
    tokens = args.steps * args.windows * WINDOW
    return "\n".join(
        [
            "# Subsets after a short fine-tune",
            "",
            "Made by `examples/emo_tiny/fine_tuned.py`: test loss in nats per token, mean over the domains "
            f"{', '.join(retention.domains)}, before and after {args.steps} steps on {tokens:,} tokens of "
            f"the domain (learning rate {args.learning_rate:g}, one seed). Experts were chosen layer by "
            "layer, for each domain.",
            "",
            *table(["model", "fine-tune", *(f"{100 * share:g} %" for share in SHARES)], rows),
            "",
        ]
    )


def main() -> None:
    """Measure what is missing, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="NAME=FOLDER")
    parser.add_argument("--out", type=Path, default=Path("out/fine-tuned"))
    parser.add_argument("--texts", type=Path, default=Path("corpus"))
    parser.add_argument("--domains", nargs="+", default=DOMAINS)
    parser.add_argument("--test", type=int, default=24, help="test documents a domain")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--windows", type=int, default=8, help="windows of 512 tokens a step")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    args = parser.parse_args()
    models = dict(model.split("=", 1) for model in args.models)
    journal = Journal(args.out / Journal.NAME)
    journal.require(
        {"steps": args.steps, "windows": args.windows, "learning rate": args.learning_rate, "test": args.test}
    )
    splits = ("train", "calibration", "test")
    journal.require(
        {f"weights of {name}": digest(Path(model) / "model.safetensors") for name, model in models.items()}
        | {
            f"texts of {name}": [digest(args.texts / split / f"{name}.jsonl") for split in splits]
            for name in args.domains
        }
    )
    domains = read_domains(args.texts, args.domains, max_test=args.test)
    for name, model in models.items():
        for domain in domains:
            for share in SHARES:
                key = (
                    f"{name} after",
                    domain.name,
                    *(("full", 1.0, None) if share >= 1 else ("layerwise", share, 0)),
                )
                if key in journal.measurements:
                    continue
                for measurement in measure(name, Path(model), domain, share, args):
                    journal.add(measurement)
                    print(
                        f"{measurement.model}, {domain.name}, {share:g}: {measurement.mean_loss:.3f}",
                        flush=True,
                    )
    text = report(Retention(journal.measurements.values()), list(models), args)
    write_text(args.out / "README.md", text)
    print(text)


if __name__ == "__main__":
    main()
