"""Tasks of lm-evaluation-harness: they are found, their prompts are shown, models are scored on them.

https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ...imports.optional_packages import require
from ...imports.transformers_versions import private_names
from ...modeling_emo import EmoForCausalLM
from .task_scores import TaskGroup

_SEED = 1234  # draws demonstrations; the harness's own default


class Tasks(NamedTuple):
    """What was asked for.

    Args:
        tasks (`dict[str, Any]`): the harness's tasks, by their names.
        groups (`list[TaskGroup]`): the groups among what was asked for that have one score.

    Example: see `load_tasks`.
    """

    tasks: dict[str, Any]
    groups: list[TaskGroup]


def load_tasks(
    names: Sequence[str],
    *,
    include_path: str | os.PathLike | None = None,
    num_fewshot: int | None = None,
) -> Tasks:
    """Load tasks and groups of tasks.

    Args:
        names (`Sequence[str]`): as the harness calls them.
        include_path (`str` or `os.PathLike`, *optional*): a folder of YAML files with more tasks.
        num_fewshot (`int`, *optional*): demonstrations in each prompt; as each task says by default. A task
            that says 0 keeps it, as in the harness.

    Returns:
        `Tasks`: the tasks, of groups too, and the groups.

    Raises:
        ImportError: if the harness is not installed.
        ValueError: if there is no such task, it needs code or inputs that are not run here, or
            `num_fewshot` is negative.

    Example:

    ```python
    >>> from transformers_emo.analysis.tasks.harness import load_tasks
    >>> try:
    ...     load_tasks(["gsm8"])
    ... except ValueError as error:
    ...     print(str(error)[:47])
    There is no task 'gsm8'. Near to it are 'gsm8k'

    ```
    """
    require("Scores on tasks need", "lm_eval")
    with private_names("harness"):
        from lm_eval.tasks import TaskManager

    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"`num_fewshot` is {num_fewshot}, expected 0 or more demonstrations.")
    if include_path is not None and not os.path.isdir(include_path):
        raise ValueError(
            f"`include_path` is {os.fspath(include_path)!r}, and there is no such folder: name one with the "
            "YAML files of tasks."
        )
    loaded = None
    if include_path is not None:  # the harness's own tasks are thousands of files, and often not needed
        loaded = _load_own(TaskManager(include_path=os.fspath(include_path), include_defaults=False), names)
    if loaded is None:
        manager = TaskManager(include_path=None if include_path is None else os.fspath(include_path))
        _check_names(names, manager)
        loaded = manager.load(list(names))
    for name, task in loaded["tasks"].items():
        for what, said in (("UNSAFE_CODE", "runs code that models write"), ("MULTIMODAL", "shows pictures")):
            if getattr(task, what, False):
                raise ValueError(f"The task {name!r} {said}, which is not done here: leave it out.")
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
    groups = []
    for name, group in loaded["groups"].items():
        metrics = group.aggregate_metric_list
        if name in names and metrics:
            members = [task.task_name for task in group.get_all_tasks()]
            groups.append(TaskGroup(name, members, bool(metrics[0].weight_by_size)))
    return Tasks(loaded["tasks"], groups)


def _load_own(manager: Any, names: Sequence[str]) -> Any:
    """Load tasks of a folder alone; `None` if some are elsewhere."""
    if any(name not in manager.task_index for name in names):
        return None
    try:
        return manager.load(list(names))
    except (KeyError, ValueError):  # a group of tasks that are elsewhere; or an error that will come again
        return None


def _check_names(names: Sequence[str], manager: Any) -> None:
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=5, cutoff=0.5)
            said = f"Near to it are {', '.join(map(repr, near))}." if near else "See `lm_eval ls tasks`."
            raise ValueError(f"There is no task {name!r}. {said} Tasks of your own: `include_path`.")


def calibration_prompts(task: Any, number: int) -> list[str]:
    """Prompts of a task with their gold answers, none of them scored: what experts are chosen from.

    A prompt has the task's description, as many demonstrations as those that are scored, then one more
    question with its answer. They are of the task's few-shot split, or else of its validation or training
    split. They are drawn from it, the same ones every time, since files are often in order.

    Args:
        task: from `load_tasks`.
        number (`int`): at most so many prompts.

    Raises:
        ValueError: if all that the task has is scored.

    Example: see `tests/analysis/tasks`.
    """
    at_once = task.get_config("num_fewshot") + 1
    examples = list(_examples(task, number * at_once))
    if not examples:
        raise ValueError(
            f"The split from which experts would be chosen for the task {task.task_name!r} is empty: name "
            "another as `fewshot_split` in its YAML file."
        )
    prompts = []
    for start in range(0, len(examples), at_once):
        together = examples[start : start + at_once]
        description, _ = together[-1]
        prompts.append(f"{description}{''.join(text for _, text in together)}".rstrip())
    return prompts


def _examples(task: Any, number: int) -> Iterator[tuple[str, str]]:
    """The task's description for a question, and the question with its answer in a demonstration's form."""
    config, shown = task.config, task.fewshot_cfg
    scored = config.test_split or config.validation_split
    if shown.split not in (None, scored) or (shown.split is None and shown.samples is not None):
        documents = task.fewshot_docs()
    elif config.validation_split not in (None, scored):
        documents = task.validation_docs()
    elif config.training_split not in (None, scored):
        documents = task.training_docs()
    else:
        raise ValueError(
            f"The task {task.task_name!r} has only the split {scored!r}, which is scored: experts chosen "
            "from it would know the answers. Name another as `fewshot_split` in its YAML file, or measure "
            "with the method `random` only."
        )
    documents = list(documents)
    if len(documents) > number:
        documents = random.Random(_SEED).sample(documents, number)
    for document in documents:
        question: Any = task.doc_to_text(document, shown.doc_to_text)
        choices: Any = task.doc_to_choice(document, shown.doc_to_choice) if shown.doc_to_choice else None
        if task.multiple_input:  # the choices are beginnings, and the question is the right one's number
            question, choices = choices[question], None
        turn = task.build_qa_turn(
            q=question,
            c=choices,
            a=task.doc_to_target(document, shown.doc_to_target),
            gen_prefix=task.resolve_field(document, shown.gen_prefix),
            tgt_delim=shown.target_delimiter,
            few_delim=shown.fewshot_delimiter,
        )
        description = task.resolve_field(document, config.description) or ""
        yield description, "".join(message.to_text() for message in turn)


def requests_digest(task: Any, limit: int | None) -> str:
    """A digest of everything that a model is asked in a task, which differs for other documents or prompts.

    Args:
        task: from `load_tasks`.
        limit (`int`, *optional*): only the first so many documents.

    Example: see `tests/analysis/tasks`.
    """
    task.set_fewshot_seed(seed=_SEED)
    task.build_all_requests(limit=limit)
    digest = hashlib.sha256()
    for instance in task.instances:
        digest.update(repr((instance.request_type, instance.args, task.doc_to_target(instance.doc))).encode())
    return digest.hexdigest()[:16]


class TaskMetrics(NamedTuple):
    """What the harness says of a model on one task.

    Args:
        metrics (`dict[str, float]`): by `"metric,filter"`.
        errors (`dict[str, float]`): their standard errors, where there are some.
        documents (`int`): how many were scored.

    Example: see `Scorer`.
    """

    metrics: dict[str, float]
    errors: dict[str, float]
    documents: int


class Scorer:
    """A loaded model as the harness wants it.

    Args:
        model (`EmoForCausalLM`): the model. It is scored with the experts of the `use_experts` around a call.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        batch_size (`int`): requests at a time.

    Example: see `measure_tasks`.
    """

    def __init__(self, model: EmoForCausalLM, tokenizer: PreTrainedTokenizerBase, batch_size: int):
        from lm_eval.models.huggingface import HFLM  # optional

        self._model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)

    def score(self, task: Any, limit: int | None = None) -> TaskMetrics:
        """Score the model on one task.

        Args:
            task: from `load_tasks`.
            limit (`int`, *optional*): only the first so many documents.

        Returns:
            `TaskMetrics`: all that the harness gives.
        """
        from lm_eval.evaluator import evaluate  # optional

        task.set_fewshot_seed(seed=_SEED)  # the same demonstrations with every choice of experts
        name = task.task_name
        alone = {"tasks": {name: task}, "groups": {}, "group_map": {}}
        found = evaluate(self._model, alone, limit=limit, log_samples=False, bootstrap_iters=1000)
        values, metrics, errors = found["results"][name], {}, {}
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or not isinstance(value, int | float) or not math.isfinite(value):
                continue
            if metric.endswith("_stderr"):
                errors[f"{metric.removesuffix('_stderr')},{kind}"] = float(value)
            else:
                metrics[key] = float(value)
        return TaskMetrics(metrics, errors, found["n-samples"][name]["effective"])
