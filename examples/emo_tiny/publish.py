"""What is pushed to the Hub of emo-tiny and std-tiny: weights in bf16, loss curves, documents, results, card.

    python examples/emo_tiny/publish.py weights [--runs out] [--texts corpus] [--cards model_cards]
    python examples/emo_tiny/publish.py cards [--results out/results] ...

The first makes the folders `emo-tiny` and `std-tiny` from finished runs. The second is for after the
measuring, which reads the weights as they are pushed: it copies the results and writes the cards, whose numbers
are read from them. `make emo-tiny` runs everything in order.
"""

import argparse
import json
import shutil
from pathlib import Path

from transformers_emo import EmoForCausalLM
from transformers_emo.analysis import (
    Retention,
    claims,
    claims_text,
    markdown,
    plot_training,
    read_training_log,
    write_training_csv,
)
from transformers_emo.analysis.files import write_text
from transformers_emo.training import Recipe

MODELS = {"emo-tiny": "EMO", "std-tiny": "standard mixture of experts"}
BASELINE = "std-tiny"
TEMPLATE = Path(__file__).parent / "card.md"
RECIPE = Path(__file__).parent / "emo-tiny.yaml"
# Documents whose licence allows passing them on alone, without the package they come from.
LICENCES = ("BSD-3-Clause", "CC0-1.0", "PostgreSQL", "public domain", "MPL-2.0", "CECILL-B")
DOCUMENTS = {"calibration": 8, "test": 8}
CHARACTERS = 6000  # of a document; a window of the model is about a third of it
RESULTS = {  # in the card's folder: where they were measured
    "retention.csv": "retention/retention.csv",
    "retention.md": "retention/retention.md",
    "retention.png": "retention/retention.png",
    "retention_domains.png": "retention/retention_domains.png",
    "topics.png": "retention/topics.png",
    "claims.json": "retention/claims.json",
    "ablations.md": "ablations/README.md",
    "ablations.csv": "ablations/retention.csv",
    "fine_tuned.md": "fine-tuned/README.md",
    "prompts.md": "prompts/README.md",
}


def publish_weights(runs: Path, texts: Path, cards: Path) -> None:
    """Write both models' folders, all but the card."""
    logs = {name: read_training_log(runs / name) for name in MODELS}
    for name in MODELS:
        folder = cards / name
        model = EmoForCausalLM.from_pretrained(runs / name, dtype="bfloat16")
        model.save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(runs / name / file, folder / file)
        write_training_csv(logs[name], folder / "training.csv")
        plot_training(logs, folder / "training.png")
    write_documents(texts, cards / "emo-tiny" / "documents")


def write_documents(texts: Path, out: Path) -> None:
    """The first held-back documents of each domain that may be passed on, with their sources and licences."""
    for file in sorted((texts / "test").glob("*.jsonl")):
        rows = []
        for split, number in DOCUMENTS.items():
            lines = (texts / split / file.name).read_text(encoding="utf-8").splitlines()
            free = [row for row in map(json.loads, lines) if row["licence"] in LICENCES]
            rows += [row | {"text": row["text"][:CHARACTERS], "split": split} for row in free[:number]]
        if {row["split"] for row in rows} == set(DOCUMENTS):
            write_text(out / file.name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def publish_cards(results: Path, cards: Path) -> None:
    """Copy the results and write the cards."""
    retention = Retention.read(results / "retention")
    found = claims(retention, baseline=BASELINE)
    for name, kind in MODELS.items():
        folder = cards / name
        if name != BASELINE:
            for target, source in RESULTS.items():
                shutil.copyfile(results / source, folder / target)
        write_text(folder / "README.md", card(name, kind, folder, results, retention, found))


def card(name: str, kind: str, folder: Path, results: Path, retention: Retention, found: dict) -> str:
    """A model's card, its numbers read from its config, recipe and results."""
    config = json.loads((folder / "config.json").read_text())
    recipe = Recipe.read(RECIPE)
    model = EmoForCausalLM.from_pretrained(folder)
    cosines = json.loads((results / "retention" / "claims.json").read_text())["topic_cosine"]
    steps, windows = recipe.training["max_steps"], recipe.training["windows_per_step"]
    mean_table = markdown(retention).split("\n\n## Next-token")[0].split("\n", 2)[2]
    values = {
        "name": name,
        "kind": kind,
        "other": next(other for other in MODELS if other != name),
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}",
        "megabytes": f"{(folder / 'model.safetensors').stat().st_size / 1e6:.1f}",
        "pools": (
            f"pools of {config['document_pool_min']} to {config['document_pool_max']} routed experts, drawn for "
            "every document and layer"
            if config["document_pool_min"] < config["num_experts"] - config["num_shared_experts"]
            else "no pools (a document may use every expert)"
        ),
        "routed": config["num_experts"] - config["num_shared_experts"],
        "steps": f"{steps:,}",
        "tokens": f"{steps * windows * recipe.data.window / 1e6:.1f}",
        "windows": windows,
        "window": recipe.data.window,
        "warmup": recipe.training["warmup_steps"],
        "retention": mean_table,
        "claims": claims_text(found),
        "cosine": cosines[name]["mean"],
        "other_cosine": next(c["mean"] for other, c in cosines.items() if other in MODELS and other != name),
        **{
            key: config[key]
            for key in ("hidden_size", "num_hidden_layers", "num_experts", "num_experts_per_tok")
        },
        **{key: config[key] for key in ("num_attention_heads", "intermediate_size", "vocab_size")},
    }
    sections = {
        part: (results / part / "README.md").read_text(encoding="utf-8").split("\n", 2)[2].strip()
        for part in ("ablations", "fine-tuned", "prompts")
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for key, value in (values | sections).items():
        text = text.replace(f"<<{key}>>", f"{value:.2f}" if isinstance(value, float) else str(value))
    return text


def main() -> None:
    """Do one of the two steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=["weights", "cards"])
    parser.add_argument("--runs", type=Path, default=Path("out"))
    parser.add_argument("--texts", type=Path, default=Path("corpus"))
    parser.add_argument("--results", type=Path, default=Path("out/results"))
    parser.add_argument("--cards", type=Path, default=Path("model_cards"))
    args = parser.parse_args()
    if args.step == "weights":
        publish_weights(args.runs, args.texts, args.cards)
    else:
        publish_cards(args.results, args.cards)


if __name__ == "__main__":
    main()
