"""The main job, end to end: choose experts for a domain from one prompt, load only those, generate, measure.

    python examples/demo.py [--domain coq] [--other man_fr] [--experts 8]

Every row of the table is a process of its own, so that its bytes and its memory are its own too.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

MODEL = Path(__file__).parents[1] / "model_cards" / "toy-emo"
WINDOW = 256  # tokens; the context that the model was trained with


def documents(model: Path, domain: str, split: str) -> list[str]:
    lines = (model / "documents" / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [row["text"] for row in map(json.loads, lines) if row["split"] == split]
    # Past licence headers and titles, which are alike in many documents.
    return [text[text.find("\n", 1000) + 1 :] for text in texts if len(text) > 2000]


def kernel_count(file: str, name: str) -> int | None:
    """A counter that the kernel keeps of this process, where it does (Linux)."""
    path = Path("/proc/self", file)
    if not path.exists():
        return None
    return int(next(line.split()[1] for line in path.read_text().splitlines() if line.startswith(name)))


def encode(tokenizer, text: str, length: int):
    return tokenizer(text, return_tensors="pt", truncation=True, max_length=length)["input_ids"]


def perplexity(model, tokenizer, texts: list[str]) -> float:
    import torch

    total, count = 0.0, 0
    for text in texts:
        ids = encode(tokenizer, text, WINDOW)
        with torch.no_grad():
            total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return math.exp(total / count)


def measure(args: argparse.Namespace) -> dict:
    """Load the model with a subset (or whole), generate and evaluate; in a process of its own."""
    import torch
    import transformers_emo  # noqa: F401  (registers EMO)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    subset = {"expert_subset": args.subset} if args.subset else {}
    read, peak = kernel_count("io", "rchar"), kernel_count("status", "VmHWM")
    model = AutoModelForCausalLM.from_pretrained(args.model, **subset)
    result = {
        "experts": model.config.num_experts,
        "read": None if read is None else kernel_count("io", "rchar") - read,
        "memory": None if peak is None else 1024 * (kernel_count("status", "VmHWM") - peak),
    }
    for domain in (args.domain, args.other):
        result[domain] = perplexity(model, tokenizer, documents(args.model, domain, "test"))
    prompt = documents(args.model, args.domain, "test")[1]
    ids = encode(tokenizer, prompt, 48)
    torch.manual_seed(0)
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=48,
        do_sample=True,
        temperature=0.7,
        pad_token_id=tokenizer.eos_token_id,
    )
    result["prompt"] = tokenizer.decode(ids[0])
    result["text"] = tokenizer.decode(generated[0, ids.shape[1] :])
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--domain", default="coq", help="domain that the experts are chosen for")
    parser.add_argument("--other", default="man_fr", help="domain to compare with")
    parser.add_argument("--experts", type=int, default=8, help="experts to keep in each layer")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--subset", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args)))
        return

    from transformers import AutoModelForCausalLM
    from transformers.utils import logging
    from transformers_emo import select_experts

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(args.model)
    prompt = documents(args.model, args.domain, "calibration")[0]
    print(f"Choosing {args.experts} of {model.config.num_experts} experts for {args.domain} from one prompt.")
    with tempfile.TemporaryDirectory() as folder:
        subsets: dict[str, Path | None] = {"full model": None}
        for name, method in (("chosen subset", "global"), ("random subset", "random")):
            texts = [prompt] if method == "global" else None
            subset = select_experts(model, texts, args.experts, method=method, max_length=WINDOW)
            subsets[name] = Path(folder, f"{method}.json")
            subset.save(subsets[name])
        del model
        rows = {}
        for name, subset in subsets.items():
            print(f"Loading, generating and evaluating: {name} ...", flush=True)
            rows[name] = in_own_process(args, subset)

    chosen = rows["chosen subset"]
    print(
        f"\nPrompt:\n{chosen['prompt']}\n\nThe chosen {chosen['experts']} experts "
        f"continue:\n{chosen['text']}\n"
    )
    ppl = [f"ppl {domain}" for domain in (args.domain, args.other)]
    header = ["", "experts", "bytes read", "peak memory*", *ppl]
    table = [header]
    for name, row in rows.items():
        numbers = [f"{row[domain]:.1f}" for domain in (args.domain, args.other)]
        table.append([name, str(row["experts"]), megabytes(row["read"]), megabytes(row["memory"]), *numbers])
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    for line in table:
        print(
            "  ".join(
                [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
            )
        )
    print(
        "\nppl: perplexity on held-back documents, lower is better.  * of loading, above the interpreter's "
        "own"
    )


if __name__ == "__main__":
    main()
