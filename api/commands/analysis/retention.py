"""The command `emo retention`."""

import json as json_files
import os
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from ..shared import OUTPUT, AsJson, CacheDir, Revision, Token, given, stdout_for_json, tell
from .retention_tasks import refuse_other_kind, score_on_tasks

_TEXTS, _TASKS, _CHOICE, _RUNNING = "Texts", "Tasks", "What is measured", "How it runs"


class NamedModel(NamedTuple):
    """A model, and what tables call it."""

    name: str
    path: str


def read_model(text: str) -> NamedModel:
    """Read `NAME=FOLDER`, or a folder or Hub repository alone, which is then called by its last part.

    Args:
        text (`str`): the word of the command.

    Returns:
        `NamedModel`: the name and the path.

    Raises:
        typer.BadParameter: if one of them is empty.

    Example:

    ```python
    >>> from transformers_emo.commands.analysis.retention import read_model
    >>> read_model("model_cards/emo-tiny").name
    'emo-tiny'

    ```
    """
    name, equals, path = text.partition("=")
    if not equals:
        name, path = os.path.basename(os.path.normpath(text)), text
    if not name or not path:
        raise typer.BadParameter(f"{text!r} is neither a path nor NAME=PATH: write it like emo=my/folder")
    return NamedModel(name, path)


def retention(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="Folder or Hub repository, or NAME=FOLDER."),
    ],
    out: Annotated[str, typer.Option(metavar="DIR", help="Where results go.", rich_help_panel=OUTPUT)],
    texts: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder with calibration/<domain>.jsonl and test/<domain>.jsonl, or with <domain>.jsonl and "
            "a `split` in each line. Each line is a document, its text as `text`.",
            show_default="needed without --tasks",
            rich_help_panel=_TEXTS,
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Compare the other models with this one.",
            show_default="the last of several",
            rich_help_panel=_CHOICE,
        ),
    ] = None,
    domains: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME...", help="Only these domains.", show_default="all", rich_help_panel=_TEXTS
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD...",
            help="Ways to choose experts: layerwise, global, easy_ep, random, reap.",
            show_default="all but reap",
            rich_help_panel=_CHOICE,
        ),
    ] = None,
    shares: Annotated[
        list[float] | None,
        typer.Option(
            metavar="SHARE...",
            help="Shares of the experts to keep, above 0 and at most 1.",
            show_default="1 to 0.03125, by halves",
            rich_help_panel=_CHOICE,
        ),
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(metavar="N", help="Draw calibration documents N times.", rich_help_panel=_TEXTS),
    ] = 1,
    calibration: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Calibration documents a domain.", rich_help_panel=_TEXTS),
    ] = 8,
    test: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Only the first N test documents a domain.",
            show_default="all",
            rich_help_panel=_TEXTS,
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=2,
            help="Cut documents to N tokens.",
            show_default="the models' context",
            rich_help_panel=_TEXTS,
        ),
    ] = None,
    batch_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens in a batch.", rich_help_panel=_RUNNING)
    ] = 2048,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME...",
            help="Tasks of lm-evaluation-harness, such as mmlu,gsm8k, instead of texts. Experts are chosen "
            "from each task's own prompts.",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    experts: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N...",
            help="Experts of each layer to keep.",
            show_default="all, then by halves to a sixteenth",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    include_path: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="A folder of YAML files with more tasks.", rich_help_panel=_TASKS),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Demonstrations in a prompt.",
            show_default="as the task says",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    prompts: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Choose experts from N prompts of a task.",
            show_default="8",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Score only the first N documents of a task, for a trial.",
            show_default="all",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Requests at a time.", show_default="8", rich_help_panel=_TASKS
        ),
    ] = None,
    card: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Put the scores into the metadata of this card, the README.md of the one model.",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Load models in it, such as bfloat16.", show_default="as saved", rich_help_panel=_RUNNING
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Such as cpu or cuda.", show_default="a GPU if there is one", rich_help_panel=_RUNNING
        ),
    ] = None,
    no_topics: Annotated[
        bool,
        typer.Option("--no-topics", help="Do not compare the domains' routing.", rich_help_panel=_CHOICE),
    ] = False,
    no_plots: Annotated[
        bool,
        typer.Option(
            "--no-plots", help="Draw no pictures. Then matplotlib is not needed.", rich_help_panel=OUTPUT
        ),
    ] = False,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    json: AsJson = False,
) -> None:
    """Measure how quality falls as experts are removed.

    Measures loss and next-token accuracy at shares of the experts, domain by domain, and writes tables and
    pictures. After an interruption, the same command goes on. With other options, it adds to what is there.
    With `--tasks` it measures scores on tasks instead, beside those of the paper.

    Example:

    ```python
    >>> from transformers_emo.cli import main
    >>> main(["retention", "model_cards/emo-tiny", "--texts", "no-such-folder", "--out", str(tmp_path)])
    1

    ```
    """
    named = [read_model(model) for model in models]
    paths, names = dict(named), [model.name for model in named]
    if len(paths) < len(names):
        raise ValueError(f"The models are called {names}: give each a name of its own, NAME=FOLDER.")
    of_texts = {
        "--texts": texts,
        "--baseline": baseline,
        "--domains": domains,
        "--shares": shares,
        "--test": test,
        "--window": window,
        "--no-topics": no_topics,
        "--calibration": calibration != 8,
        "--batch-tokens": batch_tokens != 2048,
    }
    of_tasks = {
        "experts": experts,
        "include_path": include_path,
        "num_fewshot": num_fewshot,
        "num_prompts": prompts,
        "limit": limit,
        "batch_size": batch_size,
    }
    refuse_other_kind(tasks, of_texts, of_tasks | {"card": card})
    if tasks is not None:
        score_on_tasks(
            paths,
            tasks,
            out,
            card=card,
            plots=not no_plots,
            json=json,
            methods=methods or ["layerwise"],
            seeds=range(seeds),
            dtype=dtype,
            device=device,
            **given(revision=revision, token=token, cache_dir=cache_dir, **of_tasks),
        )
        return
    assert texts is not None  # refused above
    from transformers_emo.analysis import measure_retention, read_domains, topic_cosine, write_report
    from transformers_emo.analysis.pictures.plots import require_matplotlib
    from transformers_emo.analysis.retention import METHODS, SHARES

    baseline = baseline or (names[-1] if len(names) > 1 else None)
    if baseline is not None and baseline not in paths:
        raise ValueError(f"The baseline {baseline!r} is none of the models {names}: give one of these names.")
    if not no_plots:
        require_matplotlib()
    measured_shares = shares or SHARES
    topics = {}

    def compare_topics(name: str, model: Any, documents: Any) -> None:
        topics[name] = topic_cosine(model, documents, batch_tokens=batch_tokens)

    with stdout_for_json(json):
        found = read_domains(texts, domains, max_test=test)
        measured = measure_retention(
            paths,
            found,
            out,
            methods=methods or METHODS,
            shares=measured_shares,
            seeds=range(seeds),
            num_calibration=calibration,
            window=window,
            batch_tokens=batch_tokens,
            dtype=dtype,
            device=device,
            visit=None if no_topics or len(found) < 2 else compare_topics,
            **given(revision=revision, token=token, cache_dir=cache_dir),
        )
        summary = write_report(
            measured, out, baseline=baseline, shares=measured_shares, topics=topics, plots=not no_plots
        )
    claims = json_files.loads(Path(out, "claims.json").read_text(encoding="utf-8"))
    tell(json, summary, out=out, claims=claims)
