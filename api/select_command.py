"""The command `emo select`."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

_BY_LAYER = re.compile(r"(\d+):(\d+(?:,\d+)*)")
# What has no part in a choice at random, and what has a part in no other.
_OF_TEXT = (
    "text",
    "answer",
    "data",
    "dataset",
    "settle",
    "tokens",
    "weight_by",
    "max_length",
    "batch_size",
    "hidden_memory",
    "dtype",
    "device",
    "tokenizer",
)


def add_select(commands: Any) -> None:
    """Add the command to the others.

    Args:
        commands: what `argparse` gives for subcommands.

    Example:

    ```python
    >>> import argparse
    >>> from transformers_emo.select_command import add_select
    >>> parser = argparse.ArgumentParser(prog="emo")
    >>> add_select(parser.add_subparsers())
    >>> parser.parse_args(["select", "me/emo", "math.json", "--experts", "8", "16"]).experts
    [8, 16]

    ```
    """
    select = commands.add_parser(
        "select",
        help="choose the experts of a domain from text",
        description="Choose the experts of a domain from text, and write them as a JSON file that "
        "`from_pretrained(expert_subset=...)` takes. The model is read layer by layer.",
    )
    select.add_argument("model", help="folder or Hub repository")
    select.add_argument("out", help="JSON file to write; with several numbers of experts, {} is the number")

    texts = select.add_argument_group("calibration text, from one of these")
    texts.add_argument("--text", action="append", metavar="TEXT", help="a text; may be repeated")
    texts.add_argument("--data", metavar="FILE", help="JSONL file, an object in each line")
    texts.add_argument("--dataset", metavar="NAME", help="folder or Hub repository of a dataset, streamed")
    texts = select.add_argument_group("which text")
    texts.add_argument("--answer", action="append", metavar="TEXT", help="of each --text, put behind it")
    texts.add_argument("--dataset-config", metavar="NAME", help="configuration of the dataset, if it has any")
    texts.add_argument("--split", help="of the dataset (default train)")
    texts.add_argument(
        "--column", help="of texts, or of chats: lists of messages with role and content (default text)"
    )
    texts.add_argument("--answer-column", metavar="COLUMN", help="of answers, put behind the texts")
    texts.add_argument("--max-texts", type=int, metavar="N", help="take the first N texts (default all)")
    texts.add_argument(
        "--max-length", type=int, metavar="N", help="cut texts to N tokens (default the model's context)"
    )
    texts.add_argument("--tokens", help="that count: all (default), prompt or answer; all are read")
    texts.add_argument("--weight-by", metavar="WHAT", help="every token (default) or every text counts 1")
    texts.add_argument(
        "--settle",
        type=float,
        metavar="JACCARD",
        help="take 1, 2, 4, 8 ... texts until the choice is so alike twice in a row, above 0 to 1 (default "
        "take all)",
    )

    choice = select.add_argument_group("which experts")
    choice.add_argument(
        "--experts",
        type=int,
        nargs="+",
        default=[16],
        metavar="K",
        help="experts to keep in a layer, shared ones included (default 16); several numbers make several "
        "files in one run",
    )
    choice.add_argument(
        "--method", default="layerwise", help="layerwise (default), global, easy_ep, reap or random"
    )
    choice.add_argument(
        "--budget",
        default="uniform",
        help="uniform (default): K in every layer; mass: K in the mean, more where scores are spread "
        "(global, easy_ep and reap)",
    )
    choice.add_argument(
        "--exclude",
        action="append",
        metavar="LAYER:ID,ID",
        help="experts never to choose; may be repeated. Or a subset's JSON file or name",
    )
    choice.add_argument("--seed", type=int, metavar="N", help="of the random choice (default 0)")

    running = select.add_argument_group("how it runs")
    running.add_argument("--dtype", help="to run in, such as float32 (default that of the model)")
    running.add_argument("--device", help="such as cpu (default) or cuda")
    running.add_argument("--batch-size", type=int, metavar="N", help="texts in a batch (default 8)")
    running.add_argument(
        "--hidden-memory",
        metavar="SIZE",
        help="hidden states in memory, the rest on disk, such as 500MB (default 4GB)",
    )
    running.add_argument("--tokenizer", metavar="PATH", help="folder or Hub repository (default the model's)")
    running.add_argument("--revision", help="of the model's Hub repository (default main)")
    running.add_argument("--token", help="for the Hub (default that of `hf auth login`, or HF_TOKEN)")
    select.set_defaults(run=_select)


def _select(parsed: argparse.Namespace) -> None:
    from transformers_emo.subsets import select_experts
    from transformers_emo.subsets.numbering import size_range

    paths = _paths(parsed)
    _check(parsed)
    given: dict[str, Any] = {
        "column": parsed.column,
        "answer_column": parsed.answer_column,
        "max_texts": parsed.max_texts,
        "max_length": parsed.max_length,
        "tokens": parsed.tokens,
        "weight_by": parsed.weight_by,
        "stop_when_settled": parsed.settle,
        "seed": parsed.seed,
        "dtype": parsed.dtype,
        "device": parsed.device,
        "batch_size": parsed.batch_size,
        "hidden_memory": _hidden_memory(parsed.hidden_memory),
        "tokenizer": _tokenizer(parsed),
        "revision": parsed.revision,
        "token": parsed.token,
    }
    subsets = select_experts(
        parsed.model,
        parsed.text,
        parsed.experts,
        method=parsed.method,
        budget=parsed.budget,
        answers=parsed.answer,
        dataset=_dataset(parsed),
        exclude_experts=excluded_experts(parsed.exclude or []),
        **{name: value for name, value in given.items() if value is not None},
    )
    for path, subset in zip(paths, subsets, strict=True):
        subset.save(path)
        number = size_range(len(ids) for ids in subset.experts if ids is not None)
        origin = f"from {subset.num_tokens} tokens of {subset.num_texts} texts"
        print(f"{path}: {number} experts a layer, {'at random' if subset.num_tokens is None else origin}")


def _paths(parsed: argparse.Namespace) -> list[str]:
    """The files to write, once it is known that they can be: told before the model is run, not after."""
    if len(set(parsed.experts)) > 1 and "{}" not in parsed.out:
        raise ValueError(
            f"{parsed.out!r} is one file for {len(parsed.experts)} subsets: put {{}} in its name."
        )
    paths = [parsed.out.replace("{}", str(size)) for size in parsed.experts]
    for path in paths:
        folder = next(parent for parent in Path(path).absolute().parents if parent.exists())
        if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f"Cannot write {path!r}: name a JSON file in a folder that can be written to.")
    return paths


def _check(parsed: argparse.Namespace) -> None:
    """See that options go together; what is wrong with one alone, `select_experts` says."""
    given = {name for name, value in vars(parsed).items() if value is not None}
    if parsed.method == "random":
        useless = [name for name in _OF_TEXT if name in given]
        if useless:
            raise ValueError(f"{_option(useless[0])} has no part in a choice at random: leave it out.")
        return
    if "seed" in given:
        raise ValueError(f"--seed is of --method random: {parsed.method!r} leaves nothing to chance.")
    sources = [_option(name) for name in ("text", "data", "dataset") if name in given]
    if len(sources) != 1:
        found = " and ".join(sources) or "no text"
        raise ValueError(f"Give one of --text, --data and --dataset: there is {found}.")
    for name, needed in (
        ("answer", {"text"}),
        ("column", {"data", "dataset"}),
        ("answer_column", {"data", "dataset"}),
        ("dataset_config", {"dataset"}),
        ("split", {"dataset"}),
    ):
        if name in given and not needed & given:
            raise ValueError(
                f"{_option(name)} goes with {' or '.join(map(_option, sorted(needed)))}, not {sources[0]}."
            )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _hidden_memory(size: str | None) -> int | None:
    from transformers_emo.checkpoints.safetensors_writing import size_in_bytes

    return None if size is None else size_in_bytes(size, name="--hidden-memory")


def _tokenizer(parsed: argparse.Namespace) -> Any:
    from transformers_emo.subsets.choosing.calibration import tokenizer_of

    if parsed.tokenizer is None:
        return None
    return tokenizer_of(parsed.tokenizer, **({} if parsed.token is None else {"token": parsed.token}))


def _dataset(parsed: argparse.Namespace) -> Any:
    """The rows of the texts, or the file they are in."""
    if parsed.dataset is None:
        return parsed.data
    from transformers_emo.imports.optional_packages import import_optional

    return import_optional("datasets", "--dataset needs").load_dataset(
        parsed.dataset,
        parsed.dataset_config,
        split=parsed.split or "train",
        streaming=True,
        token=parsed.token,
    )


def excluded_experts(words: list[str]) -> dict[int, list[int]] | str | None:
    """The experts that `--exclude` names: ids by layer, or what names a subset; `None` for none.

    Args:
        words (`list[str]`): the values of the option.

    Raises:
        ValueError: if one is neither, or a subset is not alone.

    Example:

    ```python
    >>> from transformers_emo.select_command import excluded_experts
    >>> excluded_experts(["3:17,40", "3:2"])
    {3: [2, 17, 40]}

    ```
    """
    by_layer: dict[int, list[int]] = {}
    for word in words:
        match = _BY_LAYER.fullmatch(word)
        if match is None and len(words) > 1:
            raise ValueError(
                f"--exclude {word!r}: expected LAYER:ID,ID such as 3:17,40, or one subset alone."
            )
        if match is None:
            return word
        by_layer.setdefault(int(match[1]), []).extend(map(int, match[2].split(",")))
    return {layer: sorted(set(ids)) for layer, ids in by_layer.items()} or None
