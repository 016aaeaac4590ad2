"""The main figures of a page as PNG and SVG, their data as CSV, and all numbers."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_text
from ..pictures.plots import COLOURS, new_figure, save_figure

_FIELDS = ("name", "layer", "unit", "value", "low", "high", "chance", "chance_low", "chance_high")
_TOLD = {
    "domain": "domain",
    "token": "token",
    "domain beyond token": "domain,\ngiven token",
    "token beyond domain": "token,\ngiven domain",
    "word class by characters": "kind of\ncharacters",
    "part of speech": "part of\nspeech",
}


def write_pictures(content: dict[str, Any], folder: str | os.PathLike) -> list[Path]:
    """Write the main figures as PNG and SVG, the data of each as CSV, and all numbers.

    Args:
        content (`dict[str, Any]`): from `page_content`.
        folder (`str` or `os.PathLike`): where they go: `domains_by_experts`, `topics_or_words` and
            `clusters`.

    Returns:
        `list[Path]`: the files.

    Raises:
        ImportError: if matplotlib is not installed.

    Example: see `page_content`.
    """
    folder = Path(folder)
    written = []
    for name, draw in (
        ("domains_by_experts", _maps),
        ("topics_or_words", _words),
        ("clusters", _clusters),
    ):
        figure, head, rows = draw(content)
        for ending in ("png", "svg"):
            save_figure(figure, folder / f"{name}.{ending}")
        write_text(folder / f"{name}.csv", _csv(head, rows))
        written += [folder / f"{name}.{ending}" for ending in ("png", "svg", "csv")]
    write_text(folder / "numbers.csv", _csv(["model", *_FIELDS], _numbers(content)))
    return [*written, folder / "numbers.csv"]


def _numbers(content: dict[str, Any]) -> list[list[Any]]:
    """All numbers of all models. Those of clusters are called so."""
    rows = []
    for model in content["models"]:
        clusters = [one | {"name": f"clusters: {one['name']}"} for one in model["clusters"]["numbers"]]
        for one in [*model["numbers"], *clusters]:
            rows.append([model["name"], *(_shown(one.get(field, "")) for field in _FIELDS)])
    return rows


def _shown(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _maps(content: dict[str, Any]) -> tuple[Any, list[str], list[list[Any]]]:
    """The domains by the experts of the layer in the middle, a map for each model."""
    models, domains = content["models"], content["domains"]
    figure, grid = new_figure(1, len(models), width=5.2 * len(models) + 0.6, height=0.24 * len(domains) + 1.4)
    rows: list[list[Any]] = []
    for axes, model in zip(grid.flat, models, strict=True):
        shown = model["maps"][len(model["maps"]) // 2]
        values = np.array(shown["values"]) * len(shown["experts"])
        image = axes.imshow(values, vmin=0, vmax=8, cmap="viridis", aspect="auto", interpolation="nearest")
        axes.set_yticks(range(len(domains)), domains, fontsize=8)
        axes.set_xticks([])
        axes.set_xlabel(f"{len(shown['experts'])} experts of layer {shown['layer']}", fontsize=9)
        axes.set_title(model["name"], fontsize=11)
        for domain, row in zip(domains, shown["values"], strict=True):
            rows += [
                [model["name"], shown["layer"], domain, e, v]
                for e, v in zip(shown["experts"], row, strict=True)
            ]
    figure.colorbar(image, ax=list(grid.flat), label="times an even share", shrink=0.9)
    return figure, ["model", "layer", "domain", "expert", "probability"], rows


def _words(content: dict[str, Any]) -> tuple[Any, list[str], list[list[Any]]]:
    """What domain, token and word class tell of the expert."""
    names = [name for name in _TOLD if any(_number(model["numbers"], name) for model in content["models"])]
    figure, ((axes,),) = new_figure(1, 1, width=7.5, height=3.8)
    rows = _bars(
        axes, [(m["name"], [_number(m["numbers"], name) for name in names]) for m in content["models"]]
    )
    axes.set_xticks(range(len(names)), [_TOLD[name] for name in names], fontsize=9)
    axes.set_ylabel("known of the choice of experts, %")
    return figure, ["model", "what is known", "share", "low", "high"], rows


def _clusters(content: dict[str, Any]) -> tuple[Any, list[str], list[list[Any]]]:
    """Whether clusters follow domains, tokens or classes of words."""
    names = [
        n["name"] for n in content["models"][0]["clusters"]["numbers"] if n["name"].startswith("agreement")
    ]
    figure, ((axes,),) = new_figure(1, 1, width=6.5, height=3.6)
    rows = _bars(
        axes,
        [(m["name"], [_number(m["clusters"]["numbers"], name) for name in names]) for m in content["models"]],
    )
    labels = [name.removeprefix("agreement with ").replace(" by ", "\nby ") for name in names]
    axes.set_xticks(range(len(names)), labels, fontsize=9)
    axes.set_ylabel("agreement of clusters with ..., %")
    return figure, ["model", "label", "agreement", "low", "high"], rows


def _bars(axes: Any, models: Sequence[tuple[str, list[dict[str, Any] | None]]]) -> list[list[Any]]:
    width = 0.8 / len(models)
    rows = []
    for index, (name, numbers) in enumerate(models):
        known = [(place, one) for place, one in enumerate(numbers) if one]
        axes.bar(
            [place + width * (index - (len(models) - 1) / 2) for place, _ in known],
            [100 * one["value"] for _, one in known],
            width,
            yerr=[100 * (one["high"] - one["value"]) for _, one in known],
            color=COLOURS[index % len(COLOURS)],
            label=name,
            capsize=2,
        )
        rows += [[name, one["name"], one["value"], one["low"], one["high"]] for _, one in known]
    axes.legend(frameon=False, fontsize=9)
    axes.grid(True, axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return rows


def _number(numbers: Sequence[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """The number of that name for all layers together."""
    return next((one for one in numbers if one["name"] == name and "layer" not in one), None)


def _csv(head: list[str], rows: list[list[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()
