"""Pictures of the retention curve, of topics and of subsets, with matplotlib (the extra `analysis`).

Their background is white, so that they can be read on light and on dark pages.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...checkpoints.writing.durable_files import write_whole
from ...imports.optional_packages import require
from ...subsets import SubsetOverlap
from ..measurements import Retention
from ..topics import TopicCosine

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..tasks.task_scores import TaskScores

# The colours of Okabe and Ito, which colour-blind people can tell apart too. The random choice is grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
_RANDOM = "#7F7F7F"
_STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
_DOTS_PER_INCH = 150


def require_matplotlib() -> None:
    """Check that pictures can be drawn.

    Raises:
        ImportError: if matplotlib is not installed.

    Example:

    ```python
    >>> from transformers_emo.analysis.pictures.plots import require_matplotlib
    >>> require_matplotlib()

    ```
    """
    require("Pictures need", "matplotlib")


def plot_retention(retention: Retention, path: str | os.PathLike) -> None:
    """Draw the mean loss against the share of experts, a line for each model and method.

    The bands around the lines are `Retention.loss_error` wide to each side.

    Args:
        retention (`Retention`): the measurements.
        path (`str` or `os.PathLike`): the picture's file. Its ending says the format.

    Raises:
        ImportError: if matplotlib is not installed.

    Example:

    ```python
    >>> from transformers_emo.analysis import Measurement, Retention, plot_retention
    >>> retention = Retention([
    ...     Measurement("emo", "python", "full", 1.0, 32, None, [6.0, 3.0], [1, 1], [2, 1]),
    ...     Measurement("emo", "python", "global", 0.5, 16, 0, [7.0, 3.5], [1, 1], [2, 1]),
    ... ])
    >>> plot_retention(retention, tmp_path / "retention.png")

    ```
    """
    figure, ((axes,),) = new_figure(1, 1, width=7.5, height=4.8)
    _draw_curves(axes, retention, bands=True)
    axes.set_ylabel("test loss (nats per token)")
    axes.set_xlabel("experts kept")
    axes.legend(frameon=False, fontsize=9)
    domains = len(retention.domains)
    axes.set_title(
        f"Loss as experts are removed, mean over {domains} domain{'s' * (domains != 1)}", fontsize=11
    )
    save_figure(figure, path)


def plot_domains(retention: Retention, path: str | os.PathLike) -> None:
    """Draw the loss against the share of experts, a small picture for each domain.

    Args:
        retention (`Retention`): the measurements.
        path (`str` or `os.PathLike`): the picture's file.

    Raises:
        ImportError: if matplotlib is not installed.

    Example: see `plot_retention`.
    """
    columns = min(4, len(retention.domains))
    rows = -(-len(retention.domains) // columns)
    figure, grid = new_figure(rows, columns, width=2.9 * columns + 0.4, height=2.3 * rows + 0.8)
    flat = list(grid.flat)
    for axes, domain in zip(flat, retention.domains, strict=False):
        _draw_curves(axes, Retention([m for m in retention.measurements if m.domain == domain]), bands=False)
        axes.set_title(domain, fontsize=10)
        axes.tick_params(labelsize=7)
    for axes in flat[len(retention.domains) :]:
        axes.set_visible(False)
    handles, labels = flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.supxlabel("experts kept", fontsize=10)
    figure.supylabel("test loss (nats per token)", fontsize=10)
    save_figure(figure, path)


def plot_topics(topics: Mapping[str, TopicCosine], path: str | os.PathLike) -> None:
    """Draw the cosines between domains as heat maps, one for each model, on one scale.

    Args:
        topics (`Mapping[str, TopicCosine]`): from `topic_cosine`, by the models' names.
        path (`str` or `os.PathLike`): the picture's file.

    Raises:
        ImportError: if matplotlib is not installed.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.analysis import TopicCosine, plot_topics
    >>> topics = TopicCosine(["python", "coq"], torch.tensor([[1.0, 0.3], [0.3, 1.0]]))
    >>> plot_topics({"emo": topics}, tmp_path / "topics.png")

    ```
    """
    matrices = {
        f"{name}: mean {topic.mean:.2f}": (topic.domains, topic.cosine_MM.cpu().numpy())
        for name, topic in topics.items()
    }
    _heat_maps(matrices, "cosine of mean routed probabilities", path)


def plot_overlap(overlap: SubsetOverlap, path: str | os.PathLike) -> None:
    """Draw how alike subsets are as a heat map.

    Args:
        overlap (`SubsetOverlap`): from `subset_overlap`.
        path (`str` or `os.PathLike`): the picture's file.

    Raises:
        ImportError: if matplotlib is not installed.

    Example:

    ```python
    >>> from transformers_emo import ExpertSubset, subset_overlap
    >>> from transformers_emo.analysis import plot_overlap
    >>> overlap = subset_overlap({"code": ExpertSubset([[0, 1]]), "math": ExpertSubset([[1, 2]])})
    >>> plot_overlap(overlap, tmp_path / "overlap.png")

    ```
    """
    matrices = {f"mean {overlap.mean:.2f}": (overlap.names, np.array(overlap.jaccard_NN))}
    _heat_maps(matrices, "experts in both / in either", path)


def plot_tasks(
    scores: TaskScores, paper: Mapping[str, Mapping[str, Mapping[int, float]]], path: str | os.PathLike
) -> None:
    """Draw the scores on tasks against the experts kept, a small picture for each task.

    Args:
        scores (`TaskScores`): from `measure_tasks`.
        paper (`Mapping`): scores to draw beside them, in grey and in per cent: by task, model and experts.
        path (`str` or `os.PathLike`): the picture's file.

    Raises:
        ImportError: if matplotlib is not installed.

    Example:

    ```python
    >>> from transformers_emo.analysis.pictures.plots import plot_tasks
    >>> from transformers_emo.analysis.tasks import PAPER_SCORES, TaskScore, TaskScores
    >>> full = TaskScore("emo", "arc", "full", 64, None, {"acc,none": 0.5}, {}, "acc,none", 9, 0)
    >>> plot_tasks(TaskScores([full]), PAPER_SCORES, tmp_path / "tasks.png")

    ```
    """
    columns = min(3, len(scores.tasks))
    rows = -(-len(scores.tasks) // columns)
    figure, grid = new_figure(rows, columns, width=3.6 * columns + 0.6, height=2.8 * rows + 1.0)
    flat = list(grid.flat)
    lines = {}
    for axes, task in zip(flat, scores.tasks, strict=False):
        drawn: set[int] = set()
        unit = scores.unit(task)
        for number, (model, values) in enumerate(paper.get(task, {}).items()):
            style, mark = _STYLES[number]
            lines[f"paper: {model}"] = axes.plot(
                list(values), list(values.values()), color=_RANDOM, linestyle=style, marker=mark, markersize=3
            )[0]
            drawn |= set(values)
        for model, colour in zip(scores.models, COLOURS * len(scores.models), strict=False):
            for method, (style, mark) in zip(scores.methods, _STYLES * len(scores.methods), strict=False):
                points = [
                    (k, value / unit, (scores.error(model, task, method, k) or 0.0) / unit)
                    for k in scores.sizes(model)
                    if (value := scores.value(model, task, method, k)) is not None
                ]
                if not points:
                    continue
                sizes, values_at, errors = zip(*points, strict=True)
                lines[f"{model}, {method}"] = axes.errorbar(
                    sizes, values_at, errors, color=colour, linestyle=style, marker=mark, markersize=4
                )
                drawn |= set(sizes)
        axes.set_xscale("log", base=2)
        axes.invert_xaxis()
        axes.set_xticks(sorted(drawn), [str(k) for k in sorted(drawn)])
        axes.minorticks_off()
        axes.grid(True, color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{task}\n{scores.metric(task)}{' (%)' * (unit < 1)}", fontsize=9)
    for axes in flat[len(scores.tasks) :]:
        axes.set_visible(False)
    figure.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=9
    )
    figure.supxlabel("experts kept", fontsize=10)
    figure.supylabel("score", fontsize=10)
    save_figure(figure, path)


def _heat_maps(
    matrices: Mapping[str, tuple[Sequence[str], np.ndarray]], label: str, path: str | os.PathLike
) -> None:
    """Draw square matrices of values from 0 to 1, by their titles. Rows and columns have the same names."""
    size = max(3.2, 0.32 * max(len(names) for names, _ in matrices.values()) + 1.2)
    figure, grid = new_figure(1, len(matrices), width=size * len(matrices) + 0.6, height=size + 0.3)
    for axes, (title, (names, matrix)) in zip(grid.flat, matrices.items(), strict=True):
        image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_title(title, fontsize=11)
    figure.colorbar(image, ax=list(grid.flat), label=label, shrink=0.8)
    save_figure(figure, path)


def new_figure(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, Any]:
    """A new figure that does not touch the state of pyplot.

    Args:
        rows, columns (`int`): of axes.
        width, height (`float`): inches.

    Returns:
        `tuple`: the figure, and its axes, an array (rows, columns).

    Raises:
        ImportError: if matplotlib is not installed.

    Example:

    ```python
    >>> from transformers_emo.analysis.pictures.plots import new_figure, save_figure
    >>> figure, ((axes,),) = new_figure(1, 1, width=4, height=3)
    >>> _ = axes.plot([1, 2, 3])
    >>> save_figure(figure, tmp_path / "line.png")

    ```
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Write a picture. It appears under its name only when it is whole.

    Args:
        figure (`Figure`): from `new_figure`.
        path (`str` or `os.PathLike`): the file. Its ending says the format. Its folder is made if it does not
            exist.

    Example: see `new_figure`.
    """
    picture = io.BytesIO()
    figure.savefig(picture, dpi=_DOTS_PER_INCH, format=Path(path).suffix[1:] or None)
    write_whole(path, picture.getvalue())


def _draw_curves(axes: Axes, retention: Retention, *, bands: bool) -> None:
    """Draw the curves. The colour shows the model, the line and its marks show the method."""
    named = [method for method in retention.methods if method != "random"]
    shares: Sequence[float] = ()
    for model, colour in zip(retention.models, COLOURS * len(retention.models), strict=False):
        for method in retention.methods:
            points = [
                (share, loss, retention.loss_error(model, method, share) or 0.0)
                for share in retention.shares
                if (loss := retention.loss(model, method, share)) is not None
            ]
            if len(points) < 2:
                continue
            share, loss, error = np.array(points).T
            shares = sorted({*shares, *share})
            line, mark = _STYLES[named.index(method) % 3] if method in named else _STYLES[3]
            axes.plot(
                share,
                loss,
                color=colour,
                linestyle=line,
                marker=mark,
                markersize=4,
                linewidth=1.6,
                alpha=1.0 if method in named else 0.55,
                label=f"{model}, {method}",
            )
            if bands:
                axes.fill_between(share, loss - error, loss + error, color=colour, alpha=0.12, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.invert_xaxis()
    axes.set_xticks(shares, [f"{100 * share:.3g} %" for share in shares])
    axes.minorticks_off()
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
