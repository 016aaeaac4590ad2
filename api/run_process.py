"""What every Python process of `emo run` does first; `startup/sitecustomize.py` calls it."""

from __future__ import annotations

import atexit
import os
import sys
from pathlib import Path

from transformers_emo.subsets.loading.choice.run_choice import RunChoice

from .import_hook import AfterImport
from .transformers_names import name_classes


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
    >>> from transformers_emo.subsets.loading.choice.run_choice import RunChoice
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


_HOOK = AfterImport({"transformers": name_classes})
