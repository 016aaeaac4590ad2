"""The paper's settings for the optimiser and its schedule, as `TrainingArguments`."""

from __future__ import annotations

import math
import os
from numbers import Integral, Real
from types import NoneType
from typing import Any, Literal, get_args, get_type_hints

import torch
from transformers import TrainingArguments

from ..imports.optional_packages import require

RecipeName = Literal["pretrain", "anneal", "fine-tune"]

_OPTIMISER = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
}
_RECIPES: dict[str, dict[str, Any]] = {
    "pretrain": _OPTIMISER
    | {
        "learning_rate": 4e-3,
        "warmup_steps": 2000,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    },
    # It continues where pretraining ends: at a tenth of the learning rate.
    "anneal": _OPTIMISER | {"learning_rate": 4e-4, "warmup_steps": 0, "lr_scheduler_type": "linear"},
    "fine-tune": {
        "learning_rate": 5e-5,
        "warmup_steps": 0.1,
        "lr_scheduler_type": "linear",
        "num_train_epochs": 1,
        "windows_per_step": 32,
    },
}


# The least and the largest of what `TrainingArguments` takes without a look, and would train nonsense with.
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "eval_accumulation_steps",
            "save_total_limit",
            "dataloader_prefetch_factor",
        ),
        (1, math.inf),
    ),
    **dict.fromkeys(
        (
            "learning_rate",
            "weight_decay",
            "adam_epsilon",
            "max_grad_norm",
            "warmup_steps",
            "dataloader_num_workers",
        ),
        (0, math.inf),
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, math.nextafter(1, 0))),
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps", "num_train_epochs"), (5e-324, math.inf)),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1)),
    **dict.fromkeys(("warmup_ratio", "label_smoothing_factor"), (0, 1)),
}
# In words, where the two numbers would be strange to read.
_IN_WORDS = {(5e-324, math.inf): "a number above 0", (0, math.nextafter(1, 0)): "a number from 0 and below 1"}


def training_arguments(
    recipe: RecipeName,
    output_dir: str | os.PathLike,
    *,
    windows_per_step: int | None = None,
    **changes: Any,
) -> TrainingArguments:
    """`TrainingArguments` with the settings of the paper, for `EmoTrainer` or `Trainer`.

    Source: paper section 4 and the authors' training configuration, https://arxiv.org/abs/2605.06663.

    | | learning rate | warm-up | schedule |
    |---|---|---|---|
    | `"pretrain"` | 4e-3 | 2000 steps | cosine to 10 % |
    | `"anneal"` | 4e-4 | none | linear to 0 |
    | `"fine-tune"` | 5e-5 | 10 % | linear to 0, one epoch of batches of 32 |

    The first two have AdamW (0.9, 0.95), epsilon 1e-8, weight decay 0.1 and gradients clipped at 1.0; the
    paper pretrains with 1,024 windows of 4,096 tokens in each step (`windows_per_step=1024`). As in the
    paper, `EmoTrainer` decays all weights but the input embedding. The coefficients of the losses stand in
    the config, and its defaults are the paper's. Annealing continues the pretraining of an EMO, or of a
    standard mixture of experts. With document pools in its config, the latter becomes an EMO.

    Args:
        recipe (`str`): `"pretrain"`, `"anneal"` or `"fine-tune"`.
        output_dir (`str` or `os.PathLike`): for checkpoints.
        windows_per_step (`int`, *optional*): windows in one step of the optimiser, over all devices:
            sets `gradient_accumulation_steps` for the number of devices and `per_device_train_batch_size`
            (by default 8, or fewer if a step has fewer windows).
        changes: arguments of `TrainingArguments`; they take the place of the recipe's.

    Returns:
        `TrainingArguments`

    Raises:
        ValueError: if there is no such recipe, something else stands where a number is expected, a number is
            out of range, the windows cannot be divided among the devices, or the recipe's warm-up is as long
            as the whole training.
        ImportError: without `accelerate`.

    Example:

    ```python
    >>> from transformers_emo.training import training_arguments
    >>> arguments = training_arguments(
    ...     "pretrain", tmp_path, max_steps=10_000, windows_per_step=64, use_cpu=True
    ... )
    >>> arguments.learning_rate, arguments.adam_beta2, arguments.gradient_accumulation_steps
    (0.004, 0.95, 8)

    ```
    """
    require("Training needs", "accelerate")
    if recipe not in _RECIPES:
        raise ValueError(f"There is no recipe {recipe!r}: name one of {list(get_args(RecipeName))}.")
    _check_numbers(changes)
    if windows_per_step is not None and (not _is_a(windows_per_step, int) or windows_per_step < 1):
        raise ValueError(f"`windows_per_step` is {windows_per_step!r}: give an integer of at least 1.")
    # `DocumentCollator` reads columns that the model's signature does not name.
    settings: dict[str, Any] = {"remove_unused_columns": False, "report_to": "none"} | _RECIPES[recipe]
    if not torch.accelerator.is_available():  # or PyTorch would warn that pinned memory has no use
        settings["dataloader_pin_memory"] = False
    default_windows = settings.pop("windows_per_step", None)
    if not {"per_device_train_batch_size", "gradient_accumulation_steps"} & set(changes):
        windows_per_step = windows_per_step or default_windows
    max_steps = changes.get("max_steps", 0)
    if "warmup_steps" not in changes and 0 < max_steps <= settings["warmup_steps"]:
        raise ValueError(
            f"The recipe {recipe!r} warms up for {settings['warmup_steps']} steps, and `max_steps` is "
            f"{max_steps}: give `warmup_steps` too (a number below 1 is a share of all steps)."
        )
    if windows_per_step is None:
        return TrainingArguments(output_dir=os.fspath(output_dir), **settings | changes)
    if "gradient_accumulation_steps" in changes:
        raise ValueError("`windows_per_step` sets `gradient_accumulation_steps`: give one of them.")
    changes.setdefault("per_device_train_batch_size", min(8, windows_per_step))
    arguments = TrainingArguments(output_dir=os.fspath(output_dir), **settings | changes)
    at_once = arguments.train_batch_size * arguments.world_size
    if windows_per_step % at_once:
        raise ValueError(
            f"{windows_per_step} windows per step cannot be divided among {arguments.world_size} processes "
            f"with {arguments.train_batch_size} at once: give a multiple of {at_once}."
        )
    arguments.gradient_accumulation_steps = windows_per_step // at_once
    return arguments


def _check_numbers(settings: dict[str, Any]) -> None:
    """Refuse text where a number is expected, and numbers out of range: `TrainingArguments` takes both."""
    hints = get_type_hints(TrainingArguments)
    for name, value in settings.items():
        kinds = set(get_args(hints.get(name)) or [hints.get(name)])
        if kinds <= {bool, int, float, NoneType} and not any(_is_a(value, kind) for kind in kinds):
            expected = " or ".join(sorted("none" if kind is NoneType else kind.__name__ for kind in kinds))
            raise ValueError(f"`{name}` is {value!r}, expected {expected}: change its value.")
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if is_number and not math.isfinite(value):
            raise ValueError(f"`{name}` is {value!r}, expected a finite number: change its value.")
        least, most = _RANGES.get(name, (-math.inf, math.inf))
        if is_number and not least <= value <= most:
            at_most = "" if most == math.inf else f" and at most {most}"
            expected = _IN_WORDS.get((least, most), f"at least {least}{at_most}")
            raise ValueError(f"`{name}` is {value!r}, expected {expected}: change its value.")
    if settings.get("max_steps", -1) < 1 and settings.get("max_steps", -1) != -1:
        raise ValueError(
            f"`max_steps` is {settings['max_steps']!r}, expected at least 1, or -1 for as many as "
            "`num_train_epochs` gives: change its value."
        )


def _is_a(value: Any, kind: type) -> bool:
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return isinstance(value, kind)
