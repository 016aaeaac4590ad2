"""Does a corpus choose good experts? The loss of held-out documents with experts chosen in several ways.

    python examples/ask_a_corpus/measure.py model_cards/emo-tiny model_cards/std-tiny --out out/ask

Of each test document the first tokens are the question, and the next ones are what is measured. The corpus is
the calibration documents of all domains, as plain files. `OUT/README.md` holds the table.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from ask import choose
from search import Passage, find_passages
from tqdm.auto import tqdm
from transformers import AutoTokenizer
from transformers_emo import EmoForCausalLM, select_experts
from transformers_emo.analysis import Domain, document_losses, encode_documents, read_domains
from transformers_emo.analysis.files import write_text
from transformers_emo.analysis.tables import table

ROOT = Path(__file__).parents[2]
WAYS = (
    *("all experts", "its domain", "passages and question", "question alone", "passages, unless in doubt"),
    *("wrong passages", "random"),
)


def write_corpus(domains: list[Domain], folder: Path) -> None:
    """Write the calibration documents as files, a folder for each domain."""
    for domain in domains:
        (folder / domain.name).mkdir(parents=True)
        for number, text in enumerate(domain.calibration):
            (folder / domain.name / f"{number}.txt").write_text(text, encoding="utf-8")


def losses(
    path: Path, domains: list[Domain], corpus: Path, num_experts: int, *, question: int, following: int
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """The loss of each test document in each way, the share of right passages, and doubts, (N,) each."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = EmoForCausalLM.from_pretrained(path, dtype="float32")

    def chosen(texts: list[str], **how):
        return select_experts(model, texts, num_experts, tokenizer=tokenizer, progress=False, **how)

    of_domain = {domain.name: chosen(list(domain.calibration)) for domain in domains}
    asked: list[tuple[str, object, str, list[Passage]]] = []
    for domain in domains:
        for ids in encode_documents(tokenizer, domain.test, question + following):
            if len(ids) == question + following:
                text = tokenizer.decode(ids[:question])
                asked.append((domain.name, ids, text, find_passages(corpus, text)))
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    right, doubts = [], []
    for number, (name, ids, text, passages) in enumerate(tqdm(asked, desc=path.name)):
        right.append(np.mean([one.file.parent.name == name for one in passages]) if passages else np.nan)
        # What was found for a question of another domain.
        others = [one for one in asked if one[0] != name and one[3]]
        wrong = others[(number * 7) % len(others)][3]
        by_passages = choose(model, tokenizer, text, passages, num_experts, library=of_domain)
        by_question = choose(model, tokenizer, text, [], num_experts).subset
        doubts.append(by_passages.note is not None)
        subsets = {
            "all experts": None,
            "its domain": of_domain[name],
            "passages and question": by_passages.subset,
            "question alone": by_question,
            "passages, unless in doubt": by_question if by_passages.note else by_passages.subset,
            "wrong passages": chosen([*(one.text for one in wrong), text]),
            "random": chosen([text], method="random", seed=number),
        }
        for way, subset in subsets.items():
            found[way].append(document_losses(model, [ids], expert_subset=subset, after=question).loss)
    return {way: np.array(values) for way, values in found.items()}, np.array(right), np.array(doubts)


def main() -> None:
    """Measure, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--texts", type=Path, default=ROOT / "model_cards" / "emo-tiny" / "documents")
    parser.add_argument("--out", type=Path, default=Path("out/ask"))
    parser.add_argument("--domains", nargs="+", help="only these")
    parser.add_argument("--test", type=int, default=8, help="test documents a domain")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--question", type=int, default=32, help="tokens of a question")
    parser.add_argument("--following", type=int, default=128, help="tokens after it that are measured")
    args = parser.parse_args()
    domains = read_domains(args.texts, args.domains, max_test=args.test)
    rows, said = [], []
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        write_corpus(domains, corpus)
        measured = {
            path.name: losses(
                path, domains, corpus, args.experts, question=args.question, following=args.following
            )
            for path in args.models
        }
    for way in WAYS:
        cells = []
        for found, *_ in measured.values():
            rise = found[way] - found["all experts"]
            error = rise.std(ddof=1) / np.sqrt(len(rise))
            cells.append(
                f"{found[way].mean():.3f}" if way == "all experts" else f"{rise.mean():+.3f} ± {error:.3f}"
            )
        rows.append([way, *cells])
    for name, (found, right, doubts) in measured.items():
        rise = found["passages and question"] - found["question alone"]
        groups = {"all four": right == 1, "one to three": (right > 0) & (right < 1), "none": right == 0}
        parts = [
            f"{which} of the right domain {rise[where].mean():+.3f} ({where.sum()} documents, with a "
            f"doubt in {doubts[where].sum()})"
            for which, where in groups.items()
            if where.any()
        ]
        wrong = found["wrong passages"] - found["question alone"]
        said.append(
            f"- {name}: passages change the loss against the question alone by, with "
            f"{'; with '.join(parts)}. Passages of a wrong domain: {wrong.mean():+.3f}."
        )
    number = len(next(iter(measured.values()))[1])
    text = "\n".join(
        [
            "# Experts that a corpus chooses",
            "",
            f"Loss of {args.following} tokens after a question of {args.question}, in nats a token, mean "
            f"over {number} test documents of {len(domains)} domains, and its rise with {args.experts} "
            "experts. ± is the standard error of the rise over documents. The model reads the question in "
            "every case, and the passages in none: only the choice of experts differs.",
            "",
            *table(["experts chosen by", *measured], rows),
            "",
            *said,
            "",
        ]
    )
    write_text(args.out / "README.md", text)
    print(text)


if __name__ == "__main__":
    main()
