"""The loss curves of a training run, as data and as a picture."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_text
from .plots import COLOURS, new_figure, save_figure

_NOT_LOGGED = ("epoch", "step")


def read_training_log(run: str | os.PathLike) -> list[dict[str, float]]:
    """Read what was logged in training, step by step.

    Args:
        run (`str` or `os.PathLike`): an `output_dir` of `Trainer`, or one checkpoint in it.

    Returns:
        `list[dict[str, float]]`: the reports, each with its `step`. Those of evaluation and the last one, on
        the whole run, are left out.

    Raises:
        ValueError: if there is no whole checkpoint, or nothing was logged.

    Example:

    ```python
    >>> from transformers_emo.analysis import read_training_log
    >>> _ = (tmp_path / "trainer_state.json").write_text(
    ...     '{"log_history": [{"step": 20, "loss": 3.5, "epoch": 0.1}, {"step": 20, "train_runtime": 9.0}]}'
    ... )
    >>> read_training_log(tmp_path)
    [{'step': 20, 'loss': 3.5, 'epoch': 0.1}]

    ```
    """
    from ...training import last_checkpoint  # imported here: the rest of `analysis` starts without `Trainer`

    run = Path(run)
    checkpoint = run if (run / "trainer_state.json").is_file() else last_checkpoint(run)
    if checkpoint is None:
        raise ValueError(
            f"There is no whole checkpoint in {os.fspath(run)!r}: give an `output_dir` of Trainer."
        )
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    reports = [entry for entry in state["log_history"] if "loss" in entry]
    if not reports:
        raise ValueError(f"Nothing was logged in {os.fspath(checkpoint)!r}: set `logging_steps`.")
    return reports


def write_training_csv(log: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Write a training log, one row for each report.

    Args:
        log (`Sequence[Mapping]`): from `read_training_log`.
        path (`str` or `os.PathLike`): the file. It is replaced if it exists.

    Example:

    ```python
    >>> from transformers_emo.analysis import write_training_csv
    >>> write_training_csv([{"step": 20, "loss": 3.5, "epoch": 0.1}], tmp_path / "training.csv")
    >>> print((tmp_path / "training.csv").read_text())
    step,epoch,loss
    20,0.1,3.5
    <BLANKLINE>

    ```
    """
    logged = list(dict.fromkeys(name for report in log for name in report if name not in _NOT_LOGGED))
    text = io.StringIO()
    writer = csv.DictWriter(text, ["step", "epoch", *logged], lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in report.items()}
        for report in log
    )
    write_text(path, text.getvalue())


def plot_training(logs: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike) -> None:
    """Draw the cross entropy and the balance loss against the step.

    If the cross entropy was not logged, the loss is drawn.

    Args:
        logs (`Mapping[str, Sequence[Mapping]]`): from `read_training_log`, by the runs' names.
        path (`str` or `os.PathLike`): the picture's file. Its ending says the format.

    Raises:
        ImportError: if matplotlib is not installed.

    Example:

    ```python
    >>> from transformers_emo.analysis import plot_training
    >>> log = [{"step": step, "ce_loss": 8 / step, "balance_loss": 1.1} for step in (1, 2, 3)]
    >>> plot_training({"emo": log}, tmp_path / "training.png")

    ```
    """
    shown = {"training loss (nats per token)": ("ce_loss", "loss"), "balance loss": ("balance_loss",)}
    logged = {name for log in logs.values() for report in log for name in report}
    shown = {title: names for title, names in shown.items() if logged.intersection(names)}
    figure, (panels,) = new_figure(1, len(shown), width=4.6 * len(shown) + 1, height=3.8)
    for axes, (title, names) in zip(panels, shown.items(), strict=True):
        for (run, log), colour in zip(logs.items(), COLOURS * len(logs), strict=False):
            points = [(r["step"], next(r[n] for n in names if n in r)) for r in log if set(names) & set(r)]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, label=run, linewidth=1.2)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("step")
        axes.grid(True, color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=9)
    save_figure(figure, path)
