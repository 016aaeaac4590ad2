"""Ask a raw folder of text: search finds passages, and the passages and the question choose the experts.

    python examples/ask_a_corpus/ask.py FOLDER "your question"

The folder is searched as it is, word by word (https://arxiv.org/abs/2605.05242 argues for that). The experts
are chosen from what was found, for this question alone; the answer is written with these experts only.
`--by library` takes the nearest subset of the model's library in their place, which can be loaded alone.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search import Passage, find_passages
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers_emo import EmoForCausalLM, ExpertSubset, select_experts, subset_overlap

ROOT = Path(__file__).parents[2]
BY = ("passages", "question", "library")


@dataclass(frozen=True)
class Choice:
    """The experts for a question.

    Args:
        subset (`ExpertSubset`): the experts.
        nearest (`str`, *optional*): the nearest subset of the library.
        note (`str`, *optional*): a doubt about the passages, in a sentence.
    """

    subset: ExpertSubset
    nearest: str | None = None
    note: str | None = None


def choose(
    model: EmoForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    passages: list[Passage],
    num_experts: int,
    *,
    by: str = "passages",
    library: dict[str, ExpertSubset] | None = None,
) -> Choice:
    """Choose the experts for a question.

    Args:
        model (`EmoForCausalLM`): the model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        question (`str`): what is asked.
        passages (`list[Passage]`): what was found; nothing found is the question alone.
        num_experts (`int`): experts to keep in each layer.
        by (`str`, defaults to `"passages"`): `"passages"` (and the question), `"question"` alone, or
            `"library"`: the subset of the library that is nearest to the choice by passages.
        library (`dict[str, ExpertSubset]`, *optional*): subsets by name.

    Raises:
        ValueError: for another `by`, or if there is no library to take from.
    """
    if by not in BY:
        raise ValueError(f"`by` is {by!r}, expected one of {BY}.")
    texts = [passage.text for passage in passages]

    def chosen(some: list[str]) -> ExpertSubset:
        return select_experts(model, some, num_experts, tokenizer=tokenizer, progress=False)

    known = {name: subset.top(num_experts) for name, subset in (library or {}).items()}

    def nearest_to(subset: ExpertSubset) -> str | None:
        def alike(name: str) -> float:
            return subset_overlap({"one": subset, "other": known[name]}).jaccard_NN[0][1]

        return max(known, key=alike, default=None)

    of_question = chosen([question])
    of_both = chosen([*texts, question]) if texts and by != "question" else of_question
    nearest = nearest_to(of_both)
    note = None
    if texts and known:
        there, here = nearest_to(chosen(texts)), nearest_to(of_question)
        if there != here:
            note = (
                f"The passages are nearest to {there!r} and the question to {here!r}: if the passages are of "
                "another subject, they choose the wrong experts. Try `--by question`, or other words."
            )
    if by != "library":
        return Choice(of_both, nearest, note)
    if nearest is None:
        raise ValueError("The model has no library of subsets: choose by passages or by the question.")
    return Choice(known[nearest], nearest, note)


def read_library(model: Path, num_experts: int) -> dict[str, ExpertSubset]:
    """The subsets beside a model that hold the scores of all experts, or just so many experts."""
    found = {path.stem: ExpertSubset.load(path) for path in sorted((model / "subsets").glob("*.json"))}
    fitting: dict[str, Any] = {}
    for name, subset in found.items():
        if subset.scores is not None or all(len(ids) == num_experts for ids in subset.experts):
            fitting[name] = subset
    return fitting


def main() -> None:
    """Search, choose, answer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("question")
    parser.add_argument("--model", type=Path, default=ROOT / "model_cards" / "emo-tiny")
    parser.add_argument("--experts", type=int, default=16, help="experts of each layer to keep")
    parser.add_argument("--by", choices=BY, default="passages")
    parser.add_argument("--passages", type=int, default=4, help="how many to find")
    parser.add_argument("--tokens", type=int, default=40, help="the most tokens of an answer")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = EmoForCausalLM.from_pretrained(args.model)
    passages = find_passages(args.folder, args.question, number=args.passages)
    for passage in passages:
        print(f"{passage.file} ({passage.score:.1f}): {passage.text[:70]!r}")
    if not passages:
        print(f"Nothing in {args.folder} has a word of the question: the question alone chooses the experts.")
    library = read_library(args.model, args.experts)
    choice = choose(model, tokenizer, args.question, passages, args.experts, by=args.by, library=library)
    print(f"{args.experts} of {model.config.num_experts} experts a layer, nearest subset: {choice.nearest}")
    if choice.note:
        print(choice.note)
    ids = tokenizer(
        "\n\n".join([*(one.text for one in passages), args.question]), return_tensors="pt"
    ).input_ids
    room = model.config.max_position_embeddings - args.tokens
    answer = model.generate(
        ids[:, -room:], expert_subset=choice.subset, max_new_tokens=args.tokens, do_sample=False
    )
    print(tokenizer.decode(answer[0, min(room, ids.shape[1]) :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
