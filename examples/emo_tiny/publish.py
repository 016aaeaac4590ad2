"""What is pushed to the Hub of emo-tiny and std-tiny: weights in bf16, loss curves, ready subsets, documents,
results, card.

    python examples/emo_tiny/publish.py weights [--runs out] [--texts corpus] [--cards model_cards]
    python examples/emo_tiny/publish.py cards [--results out/results] ...
    python examples/emo_tiny/publish.py text [--cards model_cards]

The first makes the folders `emo-tiny` and `std-tiny` from finished runs. The second is for after the
measuring, which reads the weights as they are pushed: it copies the results and writes the cards, whose
numbers are read from them. `make emo-tiny` runs everything in order. The third writes the cards from the
results that lie beside them: `make report` has made new ones.
"""

import argparse
import csv
import json
import shutil
from pathlib import Path

from transformers import AutoTokenizer
from transformers_emo import EmoForCausalLM, select_experts
from transformers_emo.analysis import (
    Retention,
    claims,
    claims_text,
    draw,
    encode_documents,
    markdown,
    plot_training,
    read_domains,
    read_training_log,
    write_training_csv,
)
from transformers_emo.analysis.files import write_text
from transformers_emo.training import Recipe

MODELS = {"emo-tiny": "EMO", "std-tiny": "standard mixture of experts"}
BASELINE = "std-tiny"
TEMPLATE = Path(__file__).parent / "card.md"
RECIPE = Path(__file__).parent / "emo-tiny.yaml"
# Documents that may be passed on where these go along: copyright and licence as their packages have them.
LICENCES = ("BSD-3-Clause", "CC0-1.0", "PostgreSQL", "public domain", "MPL-2.0", "CECILL-B")
DOCUMENTS = {"calibration": 8, "test": 8}
KEPT = 16  # experts of the ready subsets
CHARACTERS = 6000  # of a document; a window of the model is about a third of it
RESULTS = [  # of the measuring, to the card's folder `results`
    *(f"retention/{name}" for name in ("measurements.jsonl", "retention.csv", "retention.md", "claims.json")),
    *(f"retention/{name}.png" for name in ("retention", "retention_domains", "topics")),
    *("ablations/README.md", "ablations/retention.csv", "prompts/README.md"),
    *("fine-tuned/README.md", "fine-tuned/measurements.jsonl"),
]
LEARNED = {  # numbers of `emo report`, and what the card calls them
    "topic cosine": "cosine between the mean routing of two domains",
    "domain beyond token": "what the domain tells of the expert when the token is known",
    "token beyond domain": "what the token tells of the expert when the domain is known",
    "held-out coverage, 1/8 of the experts, own domain": "picks of new documents covered by an eighth of the "
    "experts, chosen for the domain",
    "held-out coverage, 1/8 of the experts, other domains": "the same, chosen for another domain",
    "pool stability, 64 tokens": "experts in both over in either, of a document's first 64 tokens and "
    "its rest",
    "clusters: agreement with domain": "agreement of clusters of tokens with domains",
    "clusters: agreement with part of speech": "agreement of clusters with parts of speech",
}
FROM_CONFIG = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"),
    *("num_experts", "num_experts_per_tok"),
)


def publish_weights(runs: Path, texts: Path, cards: Path) -> None:
    """Write both models' folders, all but the card."""
    logs = {name: read_training_log(runs / name) for name in MODELS}
    for name in MODELS:
        folder = cards / name
        model = EmoForCausalLM.from_pretrained(runs / name, dtype="bfloat16")
        model.config.use_cache = True  # training had no use for it
        model.save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(runs / name / file, folder / file)
        write_training_csv(logs[name], folder / "training.csv")
        plot_training(logs, folder / "training.png")
    write_documents(texts, cards / "emo-tiny" / "documents")
    write_subsets(texts, cards / "emo-tiny")


def write_subsets(texts: Path, folder: Path) -> None:
    """A library of ready choices: `from_pretrained(..., expert_subset="python")` finds them by name."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for domain in read_domains(texts):
        calibration = draw(domain.calibration, DOCUMENTS["calibration"], 0, domain.name)
        ids = encode_documents(tokenizer, calibration, Recipe.read(RECIPE).data.window)
        subset = select_experts(folder, input_ids=ids, num_experts=KEPT, dtype="float32", progress=False)
        (folder / "subsets").mkdir(exist_ok=True)
        subset.save(folder / "subsets" / f"{domain.name}.json")


def write_documents(texts: Path, out: Path) -> None:
    """The first held-back documents of each domain that may be passed on, with their sources and licences."""
    for file in sorted((texts / "test").glob("*.jsonl")):
        rows = []
        for split, number in DOCUMENTS.items():
            lines = (texts / split / file.name).read_text(encoding="utf-8").splitlines()
            free = [row for row in map(json.loads, lines) if row["licence"] in LICENCES]
            rows += [row | {"text": row["text"][:CHARACTERS], "split": split} for row in free[:number]]
        if {row["split"] for row in rows} == set(DOCUMENTS):
            for package in {row["source"].split("/")[0] for row in rows}:
                licence = (texts / "licences" / f"{package}.txt").read_text(encoding="utf-8")
                write_text(out / "licences" / f"{package}.txt", licence)
            write_text(out / file.name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def publish_cards(results: Path, texts: Path, cards: Path) -> None:
    """Copy the results and write the cards."""
    for name in ("README.md", "manifest.json"):
        target = cards / "emo-tiny" / "results" / "corpus" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(texts / name, target)
    for name in RESULTS:
        target = cards / "emo-tiny" / "results" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(results / name, target)
    picture = cards / BASELINE / "results" / "retention"
    picture.mkdir(parents=True, exist_ok=True)
    for name in ("retention", "retention_domains", "topics"):
        shutil.copyfile(results / "retention" / f"{name}.png", picture / f"{name}.png")
    write_cards(cards)


def write_cards(cards: Path) -> None:
    """Write both cards from the results beside them."""
    for name in MODELS:
        write_text(cards / name / "README.md", card(name, cards))


def learned(report: Path) -> str:
    """The table of what the experts learned, from the numbers of `emo report`."""
    with (report / "numbers.csv").open(encoding="utf-8") as file:
        found = {(row["model"], row["name"]): row for row in csv.DictReader(file) if not row["layer"]}
    lines = [f"| | {' | '.join(MODELS)} | by chance |", "|---|---|---|---|"]
    for name, said in LEARNED.items():
        rows = [found[model, name] for model in MODELS]
        cells = []
        for row in rows:
            value, low, high = (shown(row[field], row["unit"]) for field in ("value", "low", "high"))
            cells.append(f"{value} [{low}, {high}]{' %' if row['unit'] == '%' else ''}")
        chances = sorted({shown(row["chance"], row["unit"]) for row in rows})
        percent = " %" if rows[0]["unit"] == "%" else ""
        lines.append(f"| {said} | {' | '.join(cells)} | {' to '.join(chances)}{percent} |")
    return "\n".join(lines)


def reported(documents: Path) -> str:
    """How many documents `emo report` read."""
    domains = read_domains(documents)
    number = sum(len(domain.calibration) + len(domain.test) for domain in domains)
    return f"{number} documents of {len(domains)} domains"


def shown(value: str, unit: str) -> str:
    """A number as the card shows it."""
    percent = unit == "%"
    return f"{round(100 * float(value), 1) + 0.0:.1f}" if percent else f"{float(value):.2f}"


def card(name: str, cards: Path) -> str:
    """A model's card, its numbers read from its config, its recipe and the results beside emo-tiny."""
    folder, results = cards / name, cards / "emo-tiny" / "results"
    retention = Retention.read(results / "retention")
    kind = MODELS[name]
    config = json.loads((folder / "config.json").read_text())
    recipe = Recipe.read(RECIPE)
    model = EmoForCausalLM.from_pretrained(folder)
    cosines = json.loads((results / "retention" / "claims.json").read_text())["topic_cosine"]
    steps, windows = recipe.training["max_steps"], recipe.training["windows_per_step"]
    means, accuracies = markdown(retention).split("\n\n## Next-token accuracy\n\n")
    values = {
        "name": name,
        "kind": kind,
        "other": next(other for other in MODELS if other != name),
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}",
        "megabytes": f"{(folder / 'model.safetensors').stat().st_size / 1e6:.1f}",
        "pools": (
            f"pools of {config['document_pool_min']} to {config['document_pool_max']} routed experts, drawn "
            "for every document and layer"
            if config["document_pool_min"] < config["num_experts"] - config["num_shared_experts"]
            else "no pools (a document may use every expert)"
        ),
        "routed": config["num_experts"] - config["num_shared_experts"],
        "steps": f"{steps:,}",
        "tokens": f"{steps * windows * recipe.data.window / 1e6:.1f}",
        "windows": windows,
        "window": recipe.data.window,
        "warmup": recipe.training["warmup_steps"],
        "retention": means.split("\n", 2)[2],
        "accuracy": accuracies.split("\n\n## ")[0],
        "domains": ", ".join(retention.domains),
        "learned": learned(results / "report"),
        "reported": reported(cards / "emo-tiny" / "documents"),
        "claims": claims_text(claims(retention, baseline=BASELINE)),
        "cosine": cosines[name]["mean"],
        "other_cosine": next(c["mean"] for other, c in cosines.items() if other in MODELS and other != name),
        **{key: config[key] for key in FROM_CONFIG},
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
    """Do one of the steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=["weights", "cards", "text"])
    parser.add_argument("--runs", type=Path, default=Path("out"))
    parser.add_argument("--texts", type=Path, default=Path("corpus"))
    parser.add_argument("--results", type=Path, default=Path("out/results"))
    parser.add_argument("--cards", type=Path, default=Path("model_cards"))
    args = parser.parse_args()
    if args.step == "weights":
        publish_weights(args.runs, args.texts, args.cards)
    elif args.step == "text":
        write_cards(args.cards)
    else:
        publish_cards(args.results, args.texts, args.cards)


if __name__ == "__main__":
    main()
