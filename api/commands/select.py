"""The command `emo select`."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from .selecting import collected
from .shared import HUB, AsJson, CacheDir, Token, excluded_experts, given, stdout_for_json, tell

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
_SOURCE, _TEXTS = "Calibration text, from one of these", "Which text"
_CHOICE, _RUNNING = "Which experts", "How it runs"


def select(
    model: Annotated[str, typer.Argument(help="Folder or Hub repository.")],
    out: Annotated[
        str, typer.Argument(help="JSON file to write. With several numbers of experts, {} is the number.")
    ],
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="A text. May be repeated.", rich_help_panel=_SOURCE),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="JSONL file, an object in each line.", rich_help_panel=_SOURCE),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Folder or Hub repository of a dataset, streamed.", rich_help_panel=_SOURCE
        ),
    ] = None,
    usage: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="In place of text: the usage that a vLLM server with our plugin wrote.",
            rich_help_panel=_SOURCE,
        ),
    ] = None,
    merge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR...",
            help="In place of text: folders that --statistics filled.",
            rich_help_panel=_SOURCE,
        ),
    ] = None,
    statistics: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Collect the scores in this folder, part by part. After an interruption, the same command "
            "goes on. For global, easy_ep and reap.",
            rich_help_panel=_RUNNING,
        ),
    ] = None,
    part: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Texts in a part of --statistics. For each part every layer is read once.",
            show_default="256",
            rich_help_panel=_RUNNING,
        ),
    ] = None,
    process: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Do the I-th of N shares of the parts of --statistics, in one folder or one for each.",
            show_default="1/1",
            rich_help_panel=_RUNNING,
        ),
    ] = None,
    answer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="The answer to each --text, put behind it. May be repeated.",
            rich_help_panel=_TEXTS,
        ),
    ] = None,
    dataset_config: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Configuration of the dataset, if it has any.", rich_help_panel=_TEXTS
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of the dataset.", show_default="train", rich_help_panel=_TEXTS)
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(
            help="Column of texts, or of chats: lists of messages with role and content.",
            show_default="text",
            rich_help_panel=_TEXTS,
        ),
    ] = None,
    answer_column: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN", help="Column of answers, put behind the texts.", rich_help_panel=_TEXTS
        ),
    ] = None,
    max_texts: Annotated[
        int | None,
        typer.Option(metavar="N", help="Take the first N texts.", show_default="all", rich_help_panel=_TEXTS),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Cut texts to N tokens.",
            show_default="the model's context",
            rich_help_panel=_TEXTS,
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Tokens that count: all, prompt or answer. All are read.",
            show_default="all",
            rich_help_panel=_TEXTS,
        ),
    ] = None,
    weight_by: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT",
            help="What counts as 1: every token, or every text.",
            show_default="token",
            rich_help_panel=_TEXTS,
        ),
    ] = None,
    settle: Annotated[
        float | None,
        typer.Option(
            metavar="JACCARD",
            help="Take 1, 2, 4, 8 ... texts, until the choice was at least this alike (Jaccard, above 0 to "
            "1) twice in a row.",
            show_default="take all texts",
            rich_help_panel=_TEXTS,
        ),
    ] = None,
    experts: Annotated[
        list[int],
        typer.Option(
            metavar="K...",
            help="Experts to keep in a layer, shared ones included. Several numbers make several files in "
            "one run.",
            rich_help_panel=_CHOICE,
        ),
    ] = [16],  # noqa: B006 (Typer takes a copy)
    method: Annotated[
        str, typer.Option(help="layerwise, global, easy_ep, reap or random.", rich_help_panel=_CHOICE)
    ] = "layerwise",
    budget: Annotated[
        str,
        typer.Option(
            help="uniform: K in every layer. mass: K in the mean, more where scores are spread (global, "
            "easy_ep and reap).",
            rich_help_panel=_CHOICE,
        ),
    ] = "uniform",
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYER:ID,ID",
            help="Experts never to choose. May be repeated. Or a subset's JSON file or name.",
            rich_help_panel=_CHOICE,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Seed of a choice at random.", show_default="0", rich_help_panel=_CHOICE
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Run in it, such as float32.", show_default="that of the model", rich_help_panel=_RUNNING
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Such as cpu or cuda.", show_default="cpu", rich_help_panel=_RUNNING),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(metavar="N", help="Texts in a batch.", show_default="8", rich_help_panel=_RUNNING),
    ] = None,
    hidden_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Hidden states to keep in memory, such as 500MB. The rest goes to disk.",
            show_default="4GB",
            rich_help_panel=_RUNNING,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Folder or Hub repository.",
            show_default="the model's",
            rich_help_panel=_RUNNING,
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(
            help="Branch, tag or commit in the model's Hub repository.",
            show_default="main",
            rich_help_panel=HUB,
        ),
    ] = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    json: AsJson = False,
) -> None:
    """Choose the experts of a domain from text.

    They are written as a JSON file, which `from_pretrained(expert_subset=...)` takes. The model is read layer
    by layer. With --statistics the scores of much text are collected in parts, by one process or by many, and
    --merge adds up folders of them.

    Example:

    ```python
    >>> from transformers_emo.cli import main
    >>> out = str(tmp_path / "code.json")
    >>> main(["select", "model_cards/emo-tiny", out, "--text", "import os", "--experts", "8"])
    /.../code.json: 8 experts a layer, from 4 tokens of 1 texts
    0

    ```
    """
    from transformers_emo.subsets import select_experts
    from transformers_emo.subsets.numbering import size_range

    paths = _paths(out, experts)
    _check(
        method,
        given(
            text=text,
            answer=answer,
            data=data,
            dataset=dataset,
            dataset_config=dataset_config,
            split=split,
            column=column,
            answer_column=answer_column,
            settle=settle,
            tokens=tokens,
            weight_by=weight_by,
            max_length=max_length,
            batch_size=batch_size,
            hidden_memory=hidden_memory,
            dtype=dtype,
            device=device,
            tokenizer=tokenizer,
            seed=seed,
            usage=usage,
            statistics=statistics,
            merge=merge,
            part=part,
            process=process,
            exclude=exclude or None,
        ),
    )
    lines, facts = [], []
    with stdout_for_json(json):
        if statistics is not None or merge:
            text_settings = given(
                column=column,
                answer_column=answer_column,
                max_texts=max_texts,
                max_length=max_length,
                tokens=tokens,
                weight_by=weight_by,
                batch_size=batch_size,
                tokenizer=_tokenizer(tokenizer, token, cache_dir),
            )
            rows = data if dataset is None else _dataset(dataset, dataset_config, split, token)
            subsets = collected(
                model,
                merge or [],
                statistics,
                {"texts": text, "answers": answer, "dataset": rows} | text_settings,
                experts,
                method=method,
                budget=budget,
                part=part,
                process=process,
                exclude=excluded_experts(exclude or []),
                hub=given(revision=revision, token=token, cache_dir=cache_dir),
                run=given(dtype=dtype, device=device, hidden_memory=_hidden_memory(hidden_memory)),
            )
            if isinstance(subsets, str):
                tell(json, subsets, subsets=[], statistics=statistics)
                return
        else:
            subsets = select_experts(
                model,
                text,
                experts,
                method=method,
                budget=budget,
                answers=answer,
                dataset=data if dataset is None else _dataset(dataset, dataset_config, split, token),
                exclude_experts=excluded_experts(exclude or []),
                **given(
                    column=column,
                    answer_column=answer_column,
                    max_texts=max_texts,
                    max_length=max_length,
                    tokens=tokens,
                    weight_by=weight_by,
                    stop_when_settled=settle,
                    seed=seed,
                    usage=usage,
                    dtype=dtype,
                    device=device,
                    batch_size=batch_size,
                    hidden_memory=_hidden_memory(hidden_memory),
                    tokenizer=_tokenizer(tokenizer, token, cache_dir),
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                ),
            )
        for path, subset in zip(paths, subsets, strict=True):
            subset.save(path)
            number = size_range(len(ids) for ids in subset.experts if ids is not None)
            origin = f"from {subset.num_tokens} tokens of "
            origin += "requests" if subset.num_texts is None else f"{subset.num_texts} texts"
            lines.append(
                f"{path}: {number} experts a layer, {'at random' if subset.num_tokens is None else origin}"
            )
            about = {name: value for name, value in subset.to_dict().items() if name != "scores"}
            facts.append({"file": path} | about)
    tell(json, "\n".join(lines), subsets=facts)


def _paths(out: str, experts: list[int]) -> list[str]:
    """The files to write, once it is known that they can be: told before the model is run, not after."""
    if len(set(experts)) > 1 and "{}" not in out:
        raise ValueError(f"{out!r} is one file for {len(experts)} subsets: put {{}} in its name.")
    paths = [out.replace("{}", str(size)) for size in experts]
    for path in paths:
        folder = next(parent for parent in Path(path).absolute().parents if parent.exists())
        if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f"Cannot write {path!r}: name a JSON file in a folder that can be written to.")
    return paths


def _check(method: str, options: Collection[str]) -> None:
    """See that options go together. What is wrong with one alone, `select_experts` says."""
    for name in ("part", "process"):
        if name in options and "statistics" not in options:
            raise ValueError(
                f"{_option(name)} goes with --statistics: give it, or leave {_option(name)} out."
            )
    if "merge" in options:
        useless = [name for name in (*_OF_TEXT, "seed", "usage", "statistics", "exclude") if name in options]
        if useless or method != "layerwise":
            raise ValueError(
                f"{_option(useless[0]) if useless else '--method'} has no part in a choice by --merge: the "
                "folders say it. Leave it out."
            )
        return
    if "statistics" in options and (useless := [name for name in ("settle", "usage") if name in options]):
        raise ValueError(f"{_option(useless[0])} has no part in a choice by --statistics: leave it out.")
    if "usage" in options:
        useless = [name for name in (*_OF_TEXT, "seed") if name in options]
        if useless or method != "layerwise":
            raise ValueError(
                f"{_option(useless[0]) if useless else '--method'} has no part in a choice by --usage: leave "
                "it out."
            )
        return
    if method == "random":
        useless = [name for name in _OF_TEXT if name in options]
        if useless:
            raise ValueError(f"{_option(useless[0])} has no part in a choice at random: leave it out.")
        return
    if "seed" in options:
        raise ValueError(f"--seed is of --method random: {method!r} leaves nothing to chance. Leave it out.")
    sources = [_option(name) for name in ("text", "data", "dataset") if name in options]
    if len(sources) != 1:
        found = " and ".join(sources) or "no text"
        raise ValueError(f"Give one of --text, --data and --dataset, or --usage: there is {found}.")
    for name, needed in (
        ("answer", {"text"}),
        ("column", {"data", "dataset"}),
        ("answer_column", {"data", "dataset"}),
        ("dataset_config", {"dataset"}),
        ("split", {"dataset"}),
    ):
        if name in options and needed.isdisjoint(options):
            raise ValueError(
                f"{_option(name)} goes with {' or '.join(map(_option, sorted(needed)))}, not {sources[0]}: "
                "leave it out."
            )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _hidden_memory(size: str | None) -> int | None:
    from transformers_emo.checkpoints.writing.safetensors_writing import size_in_bytes

    return None if size is None else size_in_bytes(size, name="--hidden-memory")


def _tokenizer(path: str | None, token: str | None, cache_dir: str | None) -> Any:
    from transformers_emo.subsets.choosing.calibration import tokenizer_of

    return None if path is None else tokenizer_of(path, **given(token=token, cache_dir=cache_dir))


def _dataset(name: str, config: str | None, split: str | None, token: str | None) -> Any:
    """The rows of a dataset, read as they are needed."""
    from transformers_emo.imports.optional_packages import import_optional

    datasets = import_optional("datasets", "--dataset needs")
    return datasets.load_dataset(name, config, split=split or "train", streaming=True, token=token)
