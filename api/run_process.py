"""What every Python process of `emo run` does first; `startup/sitecustomize.py` calls it."""

from __future__ import annotations

import atexit
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers_emo.imports.lazy_imports import import_name
from transformers_emo.subsets.loading.run_choice import RunChoice

from .import_hook import AfterImport

_PACKAGE = __package__
# Tools look for a model's classes in `transformers` by the names in its config (`transformers serve`, TRL).
_NAMES = (
    "EmoConfig",
    "EmoForCausalLM",
    "EmoForSequenceClassification",
    "EmoForTokenClassification",
    "EmoModel",
    "EmoPreTrainedModel",
    "EmoTokenizer",
)


def join() -> None:
    """Give `transformers` the names of EMO's classes, and have the first process watch over the choice.

    Importing this package has registered EMO with the auto-classes; `from_pretrained` finds the choice by
    itself. Transformers is not imported here: many processes never do.

    Example:

    ```python
    >>> import transformers
    >>> from transformers_emo.run_process import join
    >>> join()
    >>> transformers.EmoForCausalLM.__module__
    'transformers_emo.modeling_emo.modeling_emo'

    ```
    """
    _HOOK.install()
    choice = RunChoice.read()
    if choice is not None and choice.pid == os.getpid():
        atexit.register(tell_if_unused, choice)


def tell_if_unused(choice: RunChoice) -> None:
    """Say so where no process has loaded an EMO model under the choice; forget the mark otherwise.

    Args:
        choice (`RunChoice`): of this `emo run`.

    Example:

    ```python
    >>> from transformers_emo.run_process import tell_if_unused
    >>> from transformers_emo.subsets.loading.run_choice import RunChoice
    >>> mark = tmp_path / "mark"
    >>> mark.touch()
    >>> tell_if_unused(RunChoice(expert_subset="python", mark=str(mark)))
    >>> mark.exists()
    False

    ```
    """
    if os.getpid() != choice.pid and choice.pid:  # a process forked from the first
        return
    try:
        Path(choice.mark).unlink()
    except FileNotFoundError:
        if getattr(sys, "last_value", None) is not None:  # the program ended with an error, which says more
            return
        print(
            f"emo run: no EMO model was loaded with `{choice}`: nothing in this run used that choice.",
            file=sys.stderr,
        )


def _name_classes(module: ModuleType) -> None:
    # Transformers makes its lazy module more than once, of one class: the class is told, not the module.
    lazy_module: Any = type(sys.modules[module.__name__])
    others = getattr(lazy_module, "__getattr__", None)
    if others is None:
        raise ImportError(
            f"`emo run` gives EMO's classes to the lazy module of Transformers, and Transformers "
            f"{getattr(module, '__version__', '')} has none: see the README for the versions tested."
        )
    if getattr(others, "names_emo", False):
        return

    def with_emo(self: ModuleType, name: str) -> Any:
        if name in _NAMES and self.__name__ == "transformers":
            return import_name(_PACKAGE, name)
        return others(self, name)

    with_emo.names_emo = True  # type: ignore[attr-defined]
    lazy_module.__getattr__ = with_emo


_HOOK = AfterImport({"transformers": _name_classes})
