"""Scores of models with fewer experts on tasks: how they are kept, and the means over groups of tasks."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..measurements import FULL, Journal

Key = tuple[str, str, str, int, int | None]

# Metrics that are shares of the documents. Others, perplexity for one, are shown as they are.
_SHARES = ("acc", "exact_match", "em", "f1", "pass_at_1", "prompt_level_strict_acc")


@dataclass(frozen=True)
class TaskScore:
    """The metrics of one model on one task, with one choice of experts.

    Args:
        model (`str`): the model's name.
        task (`str`): the task, as the harness calls it.
        method (`str`): how the experts were chosen; `"full"` for all of them.
        num_experts (`int`): experts kept in each layer, shared ones included.
        seed (`int`, *optional*): the seed of a random choice; `None` for the full model.
        metrics (`dict[str, float]`): the value of each metric, by the harness's `"metric,filter"`.
        errors (`dict[str, float]`): their standard errors, where the harness gives them.
        metric (`str`): which of them is the task's own: the first one that its file names.
        documents (`int`): how many were scored.
        num_fewshot (`int`): demonstrations in a prompt.

    Example: see `TaskScores`.
    """

    model: str
    task: str
    method: str
    num_experts: int
    seed: int | None
    metrics: dict[str, float]
    errors: dict[str, float]
    metric: str
    documents: int
    num_fewshot: int

    @property
    def key(self) -> Key:
        """What tells it from other scores."""
        return self.model, self.task, self.method, self.num_experts, self.seed


@dataclass(frozen=True)
class TaskGroup:
    """Tasks that have one score together, such as the 57 of `mmlu`.

    Args:
        name (`str`): as the harness calls it.
        tasks (`Sequence[str]`): its tasks.
        by_size (`bool`, defaults to `True`): a task with more documents counts more.

    Example: see `TaskScores`.
    """

    name: str
    tasks: Sequence[str] = field(default_factory=list)
    by_size: bool = True


class TaskJournal(Journal):
    """Scores on disk, as `Journal` keeps measurements.

    Example:

    ```python
    >>> from transformers_emo.analysis.tasks import TaskJournal, TaskScore
    >>> journal = TaskJournal(tmp_path / "tasks.jsonl")
    >>> journal.add(TaskScore("emo", "arc", "full", 64, None, {"acc,none": 0.5}, {}, "acc,none", 8, 0))
    >>> list(TaskJournal(tmp_path / "tasks.jsonl").measurements)
    [('emo', 'arc', 'full', 64, None)]

    ```
    """

    NAME = "tasks.jsonl"
    kind = TaskScore


class TaskScores:
    """Scores of one or more models on the same tasks.

    Args:
        scores (`Iterable[TaskScore]`): all of them, in any order.
        groups (`Iterable[TaskGroup]`): groups whose means are wanted.

    Example:

    ```python
    >>> from transformers_emo.analysis.tasks import TaskGroup, TaskScore, TaskScores
    >>> def score(task, value, documents):
    ...     return TaskScore("emo", task, "full", 64, None, {"acc,none": value}, {}, "acc,none", documents, 0)
    >>> scores = TaskScores([score("a", 0.5, 10), score("b", 1.0, 30)], [TaskGroup("both", ["a", "b"])])
    >>> scores.value("emo", "both", "full", 64)
    0.875

    ```
    """

    def __init__(self, scores: Iterable[TaskScore], groups: Iterable[TaskGroup] = ()):
        self.scores = list(scores)
        self.groups = {group.name: group for group in groups}
        self.models = list(dict.fromkeys(score.model for score in self.scores))
        in_groups = {task for group in self.groups.values() for task in group.tasks}
        alone = dict.fromkeys(score.task for score in self.scores if score.task not in in_groups)
        self.tasks = [*self.groups, *alone]
        self.methods = list(dict.fromkeys(s.method for s in self.scores if s.method != FULL)) or [FULL]
        self._by_key = {score.key: score for score in self.scores}

    @classmethod
    def read(cls, folder: str | os.PathLike) -> TaskScores:
        """Read the scores that `measure_tasks` has written to a folder, also those of an unfinished run.

        Args:
            folder (`str` or `os.PathLike`): the `out` of `measure_tasks`.

        Raises:
            ValueError: if there are no scores.

        Example: see `measure_tasks`.
        """
        path = Path(folder) / TaskJournal.NAME
        if not path.is_file():
            raise ValueError(
                f"There are no scores on tasks in {os.fspath(folder)!r}: `emo retention --tasks` makes them."
            )
        return cls.of_journal(TaskJournal(path))

    @classmethod
    def of_journal(cls, journal: TaskJournal) -> TaskScores:
        """The scores of a journal, with the groups that were asked for.

        Args:
            journal (`TaskJournal`): an open one.

        Example: see `measure_tasks`.
        """
        named = {name: value for name, value in journal.settings.items() if name.startswith(_GROUP)}
        groups = [TaskGroup(**value) for value in named.values()]
        return cls(journal.measurements.values(), groups)

    def sizes(self, model: str) -> list[int]:
        """The numbers of experts that were measured, the full model's first."""
        return sorted({score.num_experts for score in self.scores if score.model == model}, reverse=True)

    def metric(self, task: str) -> str:
        """The metric that `value` is of, such as `acc`; the first, where the tasks of a group differ."""
        parts = self._parts(task)
        return next(score.metric for score in self.scores if score.task in parts).removesuffix(",none")

    def unit(self, task: str) -> float:
        """What the values of a task are divided by in tables: 0.01 for shares, shown in per cent, else 1."""
        name = self.metric(task).partition(",")[0]
        return 0.01 if name in _SHARES or name.startswith("acc_") else 1.0

    def value(self, model: str, task: str, method: str, num_experts: int) -> float | None:
        """The value of a task's own metric, mean over seeds; of a group, the mean over its tasks.

        Returns:
            `float`, *optional*: `None` if it was not measured, or not on all tasks of the group.
        """
        values = [value for value, _ in self._of_seeds(model, task, method, num_experts)]
        return sum(values) / len(values) if values else None

    def error(self, model: str, task: str, method: str, num_experts: int) -> float | None:
        """The standard error of `value` over documents; `None` where the harness gives none.

        Of several seeds it is the mean: they see the same documents.
        """
        errors = [error for _, error in self._of_seeds(model, task, method, num_experts)]
        known = [error for error in errors if error is not None]
        return sum(known) / len(known) if known and len(known) == len(errors) else None

    def _parts(self, task: str) -> Sequence[str]:
        return self.groups[task].tasks if task in self.groups else [task]

    def _of_seeds(
        self, model: str, task: str, method: str, num_experts: int
    ) -> list[tuple[float, float | None]]:
        """The value and its error for each seed with which all tasks were measured."""
        group = self.groups.get(task)
        seeds = dict.fromkeys(score.seed for score in self.scores)
        found = []
        for seed in seeds:
            # All experts are the full model, by whatever method.
            parts = [
                self._by_key.get((model, part, method, num_experts, seed))
                or self._by_key.get((model, part, FULL, num_experts, None))
                for part in self._parts(task)
            ]
            scores = [score for score in parts if score is not None]
            if not scores or len(scores) < len(parts):
                continue
            sizes = [score.documents if group is None or group.by_size else 1 for score in scores]
            total = sum(sizes)
            value = sum(n * s.metrics[s.metric] for n, s in zip(sizes, scores, strict=True)) / total
            errors = [score.errors.get(score.metric) for score in scores]
            error = None
            if all(e is not None for e in errors):
                error = (
                    math.sqrt(sum((n * (e or 0)) ** 2 for n, e in zip(sizes, errors, strict=True))) / total
                )
            found.append((value, error))
        return found


_GROUP = "group "


def group_settings(groups: Iterable[TaskGroup]) -> dict[str, dict]:
    """Groups as settings of a journal, so that `TaskScores.read` knows them.

    Args:
        groups (`Iterable[TaskGroup]`): those that were asked for.

    Example:

    ```python
    >>> from transformers_emo.analysis.tasks import TaskGroup
    >>> from transformers_emo.analysis.tasks.task_scores import group_settings
    >>> group_settings([TaskGroup("both", ["a", "b"])])
    {'group both': {'name': 'both', 'tasks': ['a', 'b'], 'by_size': True}}

    ```
    """
    return {f"{_GROUP}{group.name}": asdict(group) for group in groups}
