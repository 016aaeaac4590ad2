"""The command `emo report`."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..shared import OUTPUT, AsJson, CacheDir, Revision, Token, given, stdout_for_json, tell
from .retention import NamedModel, read_model
from .routing import (
    RUNNING,
    Column,
    DatasetSplit,
    Device,
    DomainColumn,
    Dtype,
    Languages,
    MaxTexts,
    Texts,
    Window,
    read_languages,
    text_source,
)

_SHOWN = "What is shown"


def report(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL", help="Folder or Hub repository, or NAME=FOLDER. Several are compared."
        ),
    ],
    texts: Texts,
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="FILE", help="The page.", rich_help_panel=OUTPUT)
    ],
    dataset_split: DatasetSplit = None,
    column: Column = "text",
    domain_column: DomainColumn = "domain",
    max_texts: MaxTexts = None,
    window: Window = None,
    languages: Languages = None,
    retention: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Show the curve that `emo retention` measured into this folder.",
            show_default="measured anew, if --texts is a folder",
            rich_help_panel=_SHOWN,
        ),
    ] = None,
    no_retention: Annotated[
        bool,
        typer.Option(
            "--no-retention",
            help="Show no curve. Then no model is loaded whole.",
            rich_help_panel=_SHOWN,
        ),
    ] = False,
    clusters: Annotated[
        int, typer.Option(metavar="N", min=2, help="Clusters of tokens.", rich_help_panel=_SHOWN)
    ] = 32,
    shown: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Documents of each domain to show token by token.",
            rich_help_panel=_SHOWN,
        ),
    ] = 2,
    title: Annotated[str, typer.Option(help="Title of the page.", rich_help_panel=_SHOWN)] = (
        "What the experts learned"
    ),
    work: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder for what was measured. It is used again.",
            show_default="the page's name with .data",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    pictures: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Write the main figures here too, as PNG, SVG and CSV.",
            show_default="none",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Seed of clusters and intervals.", rich_help_panel=RUNNING)
    ] = 0,
    dtype: Dtype = None,
    device: Device = "cpu",
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    json: AsJson = False,
) -> None:
    """Show what the experts learned, on one page for the browser.

    The page is one file and needs no network. It has the retention curve, which domain uses which experts,
    how alike domains are, whether experts follow topics or words, clusters of tokens, and the route of single
    documents. What was measured is kept in a folder: the same command goes on after an interruption.

    Example:

    ```python
    >>> from transformers_emo.cli import main
    >>> toy, page = "model_cards/toy-emo", str(tmp_path / "report.html")
    >>> words = ["--window", "64", "--no-retention", "--clusters", "4", "-o", page]
    >>> main(["report", toy, "--texts", f"{toy}/documents", *words])
    1 model, ... documents, ... MB: .../report.html
    0

    ```
    """
    from transformers_emo.analysis.clusters import cluster_tokens
    from transformers_emo.analysis.numbers import routing_numbers
    from transformers_emo.analysis.page import Shown, page_content, write_page, write_pictures
    from transformers_emo.analysis.pictures.plots import require_matplotlib
    from transformers_emo.analysis.routing import documents_of, router_statistics
    from transformers_emo.imports.optional_packages import require

    require("The report needs", "pyarrow", "sklearn", "plotly")
    if pictures is not None:
        require_matplotlib()
    if retention is not None and no_retention:
        raise ValueError("Give --retention or --no-retention, not both.")
    named = [read_model(model) for model in models]
    names = [model.name for model in named]
    if len(set(names)) < len(names):
        raise ValueError(f"The models are called {names}: give each a name of its own, NAME=FOLDER.")
    language_of = read_languages(languages)
    kept = Path(work or f"{out}.data")
    hub = given(revision=revision, token=token, cache_dir=cache_dir)
    measured = []
    with stdout_for_json(json):
        for model in named:
            source = text_source(texts, dataset_split)
            documents = documents_of(source, text=column, domain=domain_column, limit=max_texts)
            statistics = router_statistics(
                model.path,
                documents,
                kept / "routing" / model.name,
                window=window,
                languages=language_of,
                dtype=dtype,
                device=device,
                **hub,
            )
            numbers = routing_numbers(statistics, seed=seed)
            numbers.save(kept / f"{model.name}.json")
            found = cluster_tokens(statistics, num_clusters=clusters, seed=seed)
            measured.append(Shown(model.name, statistics, numbers, found))
        curve = None
        if not no_retention:
            curve = _curve(named, texts, retention, kept, window, dtype, device, hub)
        content = page_content(measured, curve, documents_per_domain=shown)
        size = write_page(content, out, title=title)
        drawn = [] if pictures is None else write_pictures(content, pictures)
    told = (
        f"{len(names)} model{'s' * (len(names) != 1)}, {content['documents']} documents, {size / 1e6:.1f} MB"
    )
    tell(
        json,
        f"{told}: {out}",
        out=out,
        bytes=size,
        data=str(kept),
        pictures=[os.fspath(path) for path in drawn],
        numbers={model.name: model.numbers.data()["numbers"] for model in measured},
        clusters={model.name: [one.data() for one in model.clusters.numbers] for model in measured},
    )


def _curve(
    named: list[NamedModel],
    texts: str,
    retention: str | None,
    kept: Path,
    window: int | None,
    dtype: str | None,
    device: str,
    hub: dict[str, Any],
) -> Any:
    """The retention curve of the models: read, or measured; `None` if the texts are no folder."""
    from transformers_emo.analysis import Retention, measure_retention, read_domains

    names = [model.name for model in named]
    if retention is not None:
        found = Retention.read(retention)
        missing = [name for name in names if name not in found.models]
        if missing:
            raise ValueError(
                f"{missing[0]!r} was not measured in {retention!r}, which has {found.models}: give the "
                "model that name (NAME=FOLDER), or leave --retention out."
            )
        return Retention([m for m in found.measurements if m.model in names])
    if not os.path.isdir(texts):
        return None
    return measure_retention(
        dict(named),
        read_domains(texts),
        kept / "retention",
        methods=["layerwise", "random"],
        window=window,
        dtype=dtype,
        device=device,
        **hub,
    )
