"""Models are scored on tasks with all their experts, and with those that each task's own prompts choose."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ...checkpoints.hub.names import is_hub_repo, pinned
from ...checkpoints.source_files import LOADED_FILES, SourceFiles, unchanged
from ...checkpoints.writing.folder_lock import locked_folder
from ...configuration import EmoConfig
from ...modeling_emo import EmoForCausalLM
from ...subsets import select_experts
from ...subsets.loading.model_source import check_hub_kwargs
from ..measurements import FULL
from ..retention import _config, _layer_size, _load, _try_methods
from ..weight_sample import weight_sample
from .harness import Scorer, Tasks, calibration_prompts, load_tasks, requests_digest
from .task_scores import TaskJournal, TaskScore, TaskScores, group_settings

_HALVINGS = 5  # by default: all experts, a half, and so on


def measure_tasks(
    models: Mapping[str, EmoForCausalLM | str | os.PathLike],
    tasks: Sequence[str],
    out: str | os.PathLike,
    *,
    experts: Sequence[int] | None = None,
    methods: Sequence[str] = ("layerwise",),
    seeds: Sequence[int] = (0,),
    num_prompts: int = 8,
    include_path: str | os.PathLike | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    progress: bool = True,
    **hub_kwargs: Any,
) -> TaskScores:
    """Score models on tasks of lm-evaluation-harness by experts kept, as the paper's table does.

    For each task, experts are chosen from prompts of the task itself that are not scored, with their
    demonstrations and gold answers. The tasks of a group choose each for itself. A model is loaded whole and
    once, and scored with these experts only, as in `use_experts`. A model that was loaded with the subset
    alone has the same scores.

    Each score is written to `out/tasks.jsonl` at once, and is not made again. So an interrupted run can be
    continued, and models, tasks, methods and numbers of experts can be added later.

    Args:
        models (`Mapping[str, EmoForCausalLM | str | os.PathLike]`): models, or the folders or repositories to
            load them from, by their names in the results. One is loaded at a time.
        tasks (`Sequence[str]`): tasks and groups of tasks, as the harness calls them.
        out (`str` or `os.PathLike`): the folder of the scores.
        experts (`Sequence[int]`, *optional*): how many experts of each layer to keep, shared ones included.
            By default all, a half, a quarter, an eighth and a sixteenth. The full model is always scored.
        methods (`Sequence[str]`, defaults to `("layerwise",)`): as for `select_experts`.
        seeds (`Sequence[int]`, defaults to `(0,)`): seeds of the method `"random"`. Other methods choose from
            the same prompts each time, and use the first only.
        num_prompts (`int`, defaults to 8): from how many prompts of a task to choose, where it has so many.
        include_path (`str` or `os.PathLike`, *optional*): a folder of YAML files with more tasks.
        num_fewshot (`int`, *optional*): demonstrations in each prompt; as each task says by default.
        limit (`int`, *optional*): score only the first so many documents of each task. For trials only.
        batch_size (`int`, defaults to 8): requests at a time.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): for all models; found beside each by default.
        dtype (`torch.dtype` or `str`, *optional*): the dtype to load models in; as they are saved by default.
        device (`str`, *optional*): the device to load models to; by default a GPU, if there is one.
        progress (`bool`, defaults to `True`): show a progress bar.
        hub_kwargs: `revision`, `token`, `cache_dir` and so on, as for `from_pretrained`; for every model that
            is read from a repository.

    Returns:
        `TaskScores`: all scores in `out`, earlier ones included.

    Raises:
        ImportError: if the harness is not installed (the extra `eval`).
        ValueError: before a model is loaded, if there is no such task, a number is out of range, a task
            has no prompts but those that are scored, or `out` holds scores of other prompts, settings or
            weights.
        BlockingIOError: if another run measures into `out`.
        SourceChangedError: if the folder of a model changes before the model is loaded.

    Example:

    ```python
    >>> from transformers_emo.analysis.tasks import measure_tasks
    >>> scores = measure_tasks(
    ...     {"toy": "model_cards/toy-emo"}, ["emo_languages"], tmp_path, experts=[32, 8], limit=4,
    ...     include_path="examples/data/tasks", progress=False,
    ... )
    >>> scores.sizes("toy"), scores.metric("emo_languages")
    ([32, 8], 'acc')

    ```
    """
    check_hub_kwargs("measure_tasks", hub_kwargs)
    _check_plan(models, tasks, methods, seeds, num_prompts, limit, batch_size)
    hub = {
        name: {} if isinstance(model, EmoForCausalLM) or not is_hub_repo(model) else pinned(model, hub_kwargs)
        for name, model in models.items()
    }
    files = {
        name: SourceFiles.of(model, patterns=LOADED_FILES)
        for name, model in models.items()
        if not isinstance(model, EmoForCausalLM)
    }
    configs = {name: _config(model, hub[name]) for name, model in models.items()}
    sizes = {name: _sizes(name, config, experts) for name, config in configs.items()}
    loaded = load_tasks(tasks, include_path=include_path, num_fewshot=num_fewshot)
    prompts = {
        name: [] if set(methods) <= {"random"} else calibration_prompts(task, num_prompts)
        for name, task in loaded.tasks.items()
    }
    with locked_folder(out):
        journal = TaskJournal(Path(out) / TaskJournal.NAME)
        journal.require(_settings(loaded, prompts, limit))
        plans = {
            name: _plan(journal, name, list(loaded.tasks), methods, seeds, sizes[name]) for name in models
        }
        total = sum(len(ks) for plan in plans.values() for _, _, _, ks in plan)
        with tqdm(total=total, unit="score", desc="Tasks", disable=not progress) as bar:
            for name, model in models.items():
                with unchanged(*([files[name]] if name in files else [])):
                    network = _load(model, dtype, device, hub[name])
                journal.require({f"weights of {name}": weight_sample(network)})
                _try_methods(network, methods, sizes[name][0])
                source = model.name_or_path if isinstance(model, EmoForCausalLM) else model
                own = tokenizer or AutoTokenizer.from_pretrained(source, **hub[name])
                scorer = Scorer(network, own, batch_size)
                for task, method, seed, ks in plans[name]:
                    bar.set_postfix_str(f"{name}, {task}")
                    choices = _choices(network, own, method, seed, prompts[task], ks)
                    for k, subset in zip(ks, choices, strict=True):
                        with network.use_experts(subset):
                            found = scorer.score(loaded.tasks[task], limit)
                        journal.add(_score(name, loaded.tasks[task], method, k, seed, found))
                        bar.update()
                del network, scorer
        return TaskScores.of_journal(journal)


def _check_plan(models, tasks, methods, seeds, num_prompts, limit, batch_size) -> None:
    for what, values in (("models", models), ("tasks", tasks), ("methods", methods), ("seeds", seeds)):
        if not values:
            raise ValueError(f"There are no {what}: give at least one.")
        if len(set(values)) < len(values):
            raise ValueError(f"The {what} are {list(values)}: name each once.")
    for what, value in (("num_prompts", num_prompts), ("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"`{what}` is {value}, expected at least 1.")


def _sizes(name: str, config: EmoConfig, experts: Sequence[int] | None) -> list[int]:
    """The numbers of experts to score, the full model's first."""
    available, least, _ = _layer_size(config)
    if experts is None:
        return [k for i in range(_HALVINGS) if (k := available >> i) >= least]
    for k in experts:
        if not least <= k <= available:
            raise ValueError(
                f"{k} experts cannot be kept of {name!r}: expected {least} to {available}, its shared "
                "experts included."
            )
    return sorted({available, *experts}, reverse=True)


def _settings(loaded: Tasks, prompts: Mapping[str, list[str]], limit: int | None) -> dict[str, Any]:
    """What all scores in a folder must have in common, task by task."""
    settings: dict[str, Any] = group_settings(loaded.groups)
    for name, task in loaded.tasks.items():
        settings[f"requests of {name}"] = requests_digest(task, limit)
        if prompts[name]:
            digest = hashlib.sha256(repr(prompts[name]).encode()).hexdigest()[:16]
            settings[f"calibration prompts of {name}"] = digest
    return settings


def _plan(
    journal: TaskJournal,
    model: str,
    tasks: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    sizes: Sequence[int],
) -> list[tuple[str, str, int | None, list[int]]]:
    """What is not measured yet: a task, a method, a seed, and the numbers of experts."""
    choices: list[tuple[str, int | None]] = [(FULL, None)]
    choices += [(method, seed) for method in methods for seed in (seeds if method == "random" else seeds[:1])]
    plan: list[tuple[str, str, int | None, list[int]]] = []
    for task in tasks:
        for method, seed in choices:
            wanted = sizes[:1] if method == FULL else sizes[1:]
            missing = [k for k in wanted if (model, task, method, k, seed) not in journal.measurements]
            if missing:
                plan.append((task, method, seed, missing))
    return plan


def _choices(network, tokenizer, method, seed, prompts, sizes) -> list[Any]:
    if method == FULL:
        return [None] * len(sizes)
    return select_experts(
        network,
        None if method == "random" else prompts,
        sizes,
        method=method,
        seed=seed,
        tokenizer=None if method == "random" else tokenizer,
        progress=False,
    )


def _score(model, task, method, k, seed, found) -> TaskScore:
    named = [entry["metric"] for entry in task.get_config("metric_list") or []]
    own = next((key for name in named for key in found.metrics if key.partition(",")[0] == str(name)), None)
    if own is None:
        own = next(iter(found.metrics), None)
    if own is None:
        raise ValueError(f"The task {task.task_name!r} has no metric that is a number: leave it out.")
    return TaskScore(
        model=model,
        task=task.task_name,
        method=method,
        num_experts=k,
        seed=seed,
        metrics=found.metrics,
        errors=found.errors,
        metric=own,
        documents=found.documents,
        num_fewshot=task.get_config("num_fewshot"),
    )
