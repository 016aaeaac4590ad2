"""`emo retention --tasks`: scores on tasks of lm-evaluation-harness."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..shared import stdout_for_json, tell

_WORDS = {"num_prompts": "--prompts"}


def refuse_other_kind(
    tasks: Sequence[str] | None, of_texts: Mapping[str, Any], of_tasks: Mapping[str, Any]
) -> None:
    """Refuse options that say nothing about what is measured.

    Args:
        tasks (`Sequence[str]`, *optional*): `--tasks`.
        of_texts (`Mapping[str, Any]`): the options for texts, as they are written, with their values.
        of_tasks (`Mapping[str, Any]`): those for tasks, by the names of their values.

    Raises:
        ValueError: if there are neither texts nor tasks, or one has options of the other.

    Example:

    ```python
    >>> from transformers_emo.commands.analysis.retention_tasks import refuse_other_kind
    >>> refuse_other_kind(["gsm8k"], {"--texts": None}, {"limit": 4})

    ```
    """
    if tasks is None and of_texts["--texts"] is None:
        raise ValueError("There is nothing to measure on: give `--texts` DIR, or `--tasks` such as gsm8k.")
    words = (
        list(of_texts)
        if tasks is not None
        else [_WORDS.get(name, f"--{name.replace('_', '-')}") for name in of_tasks]
    )
    values = of_texts.values() if tasks is not None else of_tasks.values()
    wrong = [
        word for word, value in zip(words, values, strict=True) if value is not None and value is not False
    ]
    if wrong:
        kind, other = ("--tasks", "--texts") if tasks is not None else ("--texts", "--tasks")
        are = "is" if len(wrong) == 1 else "are"
        raise ValueError(
            f"{' and '.join(wrong)} {are} not for `{kind}`, only for `{other}`: "
            "leave it out, or measure texts and tasks one after the other."
        )


def score_on_tasks(
    models: Mapping[str, str],
    tasks: Sequence[str],
    out: str,
    *,
    card: str | None,
    plots: bool,
    json: bool,
    **settings: Any,
) -> None:
    """Score models, and print and write what came of it.

    Args:
        models (`Mapping[str, str]`): folders or repositories by name.
        tasks (`Sequence[str]`): names, also several in one word with commas.
        out (`str`): the folder.
        card (`str`, *optional*): the card of the one model.
        plots (`bool`): draw a picture.
        json (`bool`): print JSON.
        settings: as for `measure_tasks`.

    Raises:
        ValueError: if a card is named for several models, and as `measure_tasks`.

    Example: see `transformers_emo.analysis.tasks.measure_tasks`.
    """
    from transformers_emo.analysis.pictures.plots import require_matplotlib
    from transformers_emo.analysis.tasks import add_to_card, measure_tasks, write_task_report

    if card is not None and len(models) > 1:
        raise ValueError(f"`--card` is of one model, and {list(models)} are measured: measure one at a time.")
    if plots:
        require_matplotlib()
    names = [name for word in tasks for name in word.split(",") if name]
    with stdout_for_json(json):
        scores = measure_tasks(models, names, out, **settings)
        table = write_task_report(scores, out, plots=plots)
        if card is not None:
            add_to_card(scores, next(iter(models)), card)
    facts = [
        {
            "model": model,
            "task": task,
            "method": method,
            "num_experts": k,
            "metric": scores.metric(task),
            "value": value,
            "error": scores.error(model, task, method, k),
        }
        for model in scores.models
        for task in scores.tasks
        for method in scores.methods
        for k in scores.sizes(model)
        if (value := scores.value(model, task, method, k)) is not None
    ]
    tell(json, table, out=out, scores=facts)
