"""Scores on tasks of lm-evaluation-harness as experts are removed, beside those of the paper."""

from .measuring import measure_tasks
from .paper import PAPER_SCORES
from .task_report import add_to_card, task_markdown, write_task_report
from .task_scores import TaskGroup, TaskJournal, TaskScore, TaskScores

__all__ = [
    "PAPER_SCORES",
    "TaskGroup",
    "TaskJournal",
    "TaskScore",
    "TaskScores",
    "add_to_card",
    "measure_tasks",
    "task_markdown",
    "write_task_report",
]
