"""The main job, end to end: choose experts for a domain from one prompt, load only those, generate, measure.

    python examples/demo.py [--domain scripture] [--other python] [--experts 16] [--out build/demo]

The full model, the chosen experts and random ones continue the same prompt side by side. Each is a process of
its own, so that its bytes and its memory are its own too. The curve, of this model and of the standard one
trained beside it, goes to `OUT/retention.png`.
"""

import argparse
import json
import subprocess
import sys
import textwrap
from itertools import zip_longest
from pathlib import Path

CARDS = Path(__file__).parents[1] / "model_cards"
WINDOW = 512  # tokens; the context that the models were trained with
PROMPT, NEW = 64, 96  # tokens to continue, and to continue with
SHARES = [0.5, 0.25, 0.125, 0.0625]
COLUMN, LINES = 38, 16


def kernel_count(file: str, name: str) -> int | None:
    """A counter that the kernel keeps of this process, where it does (Linux)."""
    path = Path("/proc/self", file)
    if not path.exists():
        return None
    return int(next(line.split()[1] for line in path.read_text().splitlines() if line.startswith(name)))


def measure(args: argparse.Namespace) -> dict:
    """Load the model with a subset (or whole), generate and evaluate; in a process of its own."""
    import torch
    import transformers_emo  # noqa: F401  (registers EMO)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging
    from transformers_emo.analysis import document_losses, encode_documents, read_domains

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    subset = {"expert_subset": args.subset} if args.subset else {}
    read, peak = kernel_count("io", "rchar"), kernel_count("status", "VmHWM")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32", **subset)
    result: dict = {
        "experts": model.config.num_experts,
        "read": None if read is None else kernel_count("io", "rchar") - read,
        "memory": None if peak is None else 1024 * (kernel_count("status", "VmHWM") - peak),
    }
    domains = read_domains(args.model / "documents", [args.domain, args.other])
    for domain in domains:
        losses = document_losses(model, encode_documents(tokenizer, domain.test, WINDOW))
        result[domain.name] = {"loss": losses.loss, "accuracy": losses.accuracy}
    ids = encode_documents(tokenizer, domains[0].test[:1], PROMPT)[0][None]
    torch.manual_seed(0)
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=True,
        temperature=0.6,
        pad_token_id=tokenizer.eos_token_id,
    )
    result["prompt"] = tokenizer.decode(ids[0])
    result["text"] = tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)
    return result


def in_own_process(args: argparse.Namespace, subset: Path | None) -> dict:
    options = ["--model", args.model, "--domain", args.domain, "--other", args.other, "--measure"]
    options += ["--subset", subset] if subset else []
    run = subprocess.run(
        [sys.executable, __file__, *map(str, options)], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(run.stdout.splitlines()[-1])


def megabytes(count: int | None) -> str:
    return "n/a" if count is None else f"{count / 1e6:.1f} MB"


def side_by_side(texts: dict[str, str]) -> str:
    """The beginnings of texts in columns, each under its name; blank lines left out."""
    columns = []
    for name, text in texts.items():
        lines = [part for line in text.splitlines() for part in textwrap.wrap(line, COLUMN)]
        columns.append([name, "-" * COLUMN, *lines[:LINES]])
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join(" | ".join(cell.ljust(COLUMN) for cell in row).rstrip() for row in rows)


def table(rows: dict[str, dict], domains: list[str]) -> str:
    lines = [["", "experts", "bytes read", "peak memory*", *(f"loss {domain}" for domain in domains)]]
    for name, row in rows.items():
        losses = [f"{row[domain]['loss']:.2f}" for domain in domains]
        lines.append([name, str(row["experts"]), megabytes(row["read"]), megabytes(row["memory"]), *losses])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=CARDS / "emo-tiny")
    parser.add_argument("--standard", type=Path, default=CARDS / "std-tiny", help="model to compare with")
    parser.add_argument("--domain", default="scripture", help="domain that the experts are chosen for")
    parser.add_argument("--other", default="python", help="domain to compare with")
    parser.add_argument("--experts", type=int, default=16, help="experts to keep in each layer")
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--subset", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args)))
        return

    from transformers.utils import logging
    from transformers_emo import EmoConfig, select_experts
    from transformers_emo.analysis import Domain, measure_retention, plot_retention, read_domains

    logging.disable_progress_bar()
    (domain,) = read_domains(args.model / "documents", [args.domain])
    prompt = domain.calibration[0]
    total = EmoConfig.from_pretrained(args.model).num_experts
    print(f"Choosing {args.experts} of {total} experts a layer for {args.domain}, from one document.")
    args.out.mkdir(parents=True, exist_ok=True)
    subsets: dict[str, Path | None] = {"full model": None}
    for name, method in (("chosen experts", "layerwise"), ("random experts", "random")):
        texts = [prompt] if method == "layerwise" else None
        subsets[name] = args.out / f"{args.domain}-{method}-{args.experts}.json"
        select_experts(args.model, texts, args.experts, method=method, max_length=WINDOW).save(subsets[name])
    rows = {}
    for name, subset in subsets.items():
        print(f"Loading, generating and evaluating: {name} ...", flush=True)
        rows[name] = in_own_process(args, subset)
    print(f"\nPrompt:\n{rows['full model']['prompt']}\n\nContinued by\n")
    print(side_by_side({f"{name} ({row['experts']})": row["text"] for name, row in rows.items()}))
    print(f"\n{table(rows, [args.domain, args.other])}")
    print("\nLoss on held-back documents, nats per token.  * of loading, above the interpreter's own\n")

    models = {folder.name: folder for folder in (args.model, args.standard)}
    journal = args.out / "measurements.jsonl"
    journal.unlink(missing_ok=True)
    retention = measure_retention(
        models,
        [Domain(args.domain, (prompt,), domain.test)],
        args.out,
        methods=["layerwise", "random"],
        shares=SHARES,
        num_calibration=1,
        window=WINDOW,
        dtype="float32",
    )
    plot_retention(retention, args.out / "retention.png")
    print(f"The loss as experts are removed, experts chosen from that one document: {args.out}/retention.png")


if __name__ == "__main__":
    main()
