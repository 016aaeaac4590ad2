"""Scores on tasks as a table beside the paper's, as CSV, as a picture, and in a card's metadata."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ...checkpoints.writing.durable_files import write_whole
from ..files import write_text
from ..measurements import FULL
from ..pictures.plots import plot_tasks
from ..tables import table
from .paper import PAPER_MODELS, PAPER_SCORES
from .task_scores import TaskScores

_COLUMNS = (
    *("model", "task", "method", "num_experts", "seed", "metric", "value", "error"),
    *("documents", "num_fewshot"),
)
_SOURCE = "measured by `emo retention --tasks`"


def write_task_report(scores: TaskScores, out: str | os.PathLike, *, plots: bool = True) -> str:
    """Write the scores as `tasks.csv`, with every metric, as `tasks.md` and as `tasks.png`.

    Args:
        scores (`TaskScores`): from `measure_tasks`.
        out (`str` or `os.PathLike`): the folder.
        plots (`bool`, defaults to `True`): draw the picture.

    Returns:
        `str`: the table, as markdown.

    Raises:
        ImportError: if a picture is asked for and matplotlib is not installed.

    Example:

    ```python
    >>> from transformers_emo.analysis.tasks import TaskScore, TaskScores, write_task_report
    >>> name = "exact_match,none"
    >>> full = TaskScore("emo", "gsm8k", "full", 128, None, {name: 0.1}, {}, name, 9, 5)
    >>> text = write_task_report(TaskScores([full]), tmp_path / "scores", plots=False)
    >>> sorted(path.name for path in (tmp_path / "scores").iterdir())
    ['tasks.csv', 'tasks.md']

    ```
    """
    out = Path(out)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for score in scores.scores:
        for metric, value in score.metrics.items():
            error = score.errors.get(metric)
            cells = (metric, f"{value:.6f}", "" if error is None else f"{error:.6f}")
            seed = "" if score.seed is None else score.seed
            writer.writerow(
                [score.model, score.task, score.method, score.num_experts, seed, *cells]
                + [score.documents, score.num_fewshot]
            )
    write_text(out / "tasks.csv", text.getvalue())
    markdown = task_markdown(scores)
    write_text(out / "tasks.md", f"# Scores on tasks\n\n{markdown}\n")
    if plots:
        plot_tasks(scores, PAPER_SCORES, out / "tasks.png")
    return markdown


def task_markdown(scores: TaskScores) -> str:
    """The scores as a table, task by task, with the paper's beside them where it has the task.

    Args:
        scores (`TaskScores`): from `measure_tasks`.

    Returns:
        `str`: markdown. Shares are in per cent. In brackets is the standard error over documents.

    Example:

    ```python
    >>> from transformers_emo.analysis.tasks import TaskScore, TaskScores, task_markdown
    >>> name = "exact_match,none"
    >>> full = TaskScore("emo", "gsm8k", "full", 128, None, {name: 0.1}, {}, name, 9, 5)
    >>> print(task_markdown(TaskScores([full])).splitlines()[4])
    | gsm8k (exact_match) | 128 | 10.0 | 12.0 | 13.9 |

    ```
    """
    ours = [(model, method) for model in scores.models for method in _methods_of(scores, model)]
    has_paper = any(task in PAPER_SCORES for task in scores.tasks)
    head = ["task", "experts", *(model if method == FULL else f"{model}, {method}" for model, method in ours)]
    head += [f"paper: {model}" for model in PAPER_MODELS] if has_paper else []
    rows = []
    for task in scores.tasks:
        sizes = sorted({k for model in scores.models for k in scores.sizes(model)}, reverse=True)
        for k in sizes:
            cells = [_cell(scores, model, task, method, k) for model, method in ours]
            if all(cell == "–" for cell in cells):
                continue
            if has_paper:
                paper = PAPER_SCORES.get(task, {})
                cells += [f"{paper[m][k]:.1f}" if k in paper.get(m, {}) else "–" for m in PAPER_MODELS]
            rows.append([f"{task} ({scores.metric(task)})", str(k), *cells])
    said = "By experts kept in each layer, shares in per cent; in brackets the standard error over documents."
    if has_paper:
        said += (
            " The paper's are of its own harness, which may format prompts and read answers in other ways: "
            "compare how a column falls, before its height."
        )
    return "\n".join([said, "", *table(head, rows)])


def add_to_card(scores: TaskScores, model: str, card: str | os.PathLike) -> None:
    """Put the scores of one model into the `model-index` of its card, which the Hub shows.

    Results of other tasks and sizes stay as they are; those of the same are replaced.

    Args:
        scores (`TaskScores`): from `measure_tasks`.
        model (`str`): which model's.
        card (`str` or `os.PathLike`): the card, a `README.md` that exists.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if there are no scores of this model.

    Example:

    ```python
    >>> from huggingface_hub import ModelCard
    >>> from transformers_emo.analysis.tasks import TaskScore, TaskScores, add_to_card
    >>> full = TaskScore("emo", "arc", "full", 64, None, {"acc,none": 0.5}, {}, "acc,none", 9, 0)
    >>> _ = (tmp_path / "README.md").write_text("---\\nlicense: apache-2.0\\n---\\n# emo\\n")
    >>> add_to_card(TaskScores([full]), "emo", tmp_path / "README.md")
    >>> result, = ModelCard.load(tmp_path / "README.md").data.eval_results
    >>> result.metric_name, result.metric_value
    ('acc, all 64 experts', 50.0)

    ```
    """
    card = Path(card)
    if not card.is_file():
        raise FileNotFoundError(
            f"There is no card {os.fspath(card)!r}: name the `README.md` of the model that was measured."
        )
    added = _results(scores, model)
    loaded: Any = ModelCard.load(card)
    names = {(result.dataset_type, result.metric_name) for result in added}
    before = loaded.data.eval_results or []
    kept = [result for result in before if (result.dataset_type, result.metric_name) not in names]
    loaded.data.eval_results = [*kept, *added]
    loaded.data.model_name = loaded.data.model_name or model
    write_whole(card, str(loaded).encode("utf-8"))


def _results(scores: TaskScores, model: str) -> list[EvalResult]:
    if model not in scores.models:
        raise ValueError(f"There are no scores of {model!r}: name one of {scores.models}.")
    found = []
    for task in scores.tasks:
        metric = scores.metric(task)
        for method in _methods_of(scores, model):
            for k in (sizes := scores.sizes(model)):
                value = scores.value(model, task, method, k)
                if value is None or (k == sizes[0] and method != _methods_of(scores, model)[0]):
                    continue
                chosen = f"all {k} experts" if k == sizes[0] else f"{k} of {sizes[0]} experts, {method}"
                found.append(
                    EvalResult(
                        task_type="text-generation",
                        dataset_type=task,
                        dataset_name=task,
                        metric_type=metric.partition(",")[0],
                        metric_name=f"{metric}, {chosen}",
                        metric_value=round(value / scores.unit(task), 4),
                        source_name=_SOURCE,
                        source_url="https://github.com/EleutherAI/lm-evaluation-harness",
                    )
                )
    return found


def _methods_of(scores: TaskScores, model: str) -> Sequence[str]:
    own = {score.method for score in scores.scores if score.model == model}
    return [method for method in scores.methods if method in own] or [FULL]


def _cell(scores: TaskScores, model: str, task: str, method: str, k: int) -> str:
    value, error = scores.value(model, task, method, k), scores.error(model, task, method, k)
    if value is None:
        return "–"
    unit = scores.unit(task)
    form = ".1f" if unit < 1 else ".4g"
    return f"{value / unit:{form}}" + ("" if error is None else f" ({error / unit:{form}})")
