"""`from_pretrained` where the caller names no experts: inside `emo run`, those that the user asked for."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ....checkpoints.hub.names import HUB_KWARGS
from ....checkpoints.patience import bounded_waits
from ....configuration import EmoConfig
from ....modeling_emo.pools.prompt_pool import pool_sizes
from ...numbering import present_experts, root_experts, size_range
from ...reduced_config import EXPERT_SETTINGS, held_experts
from .. import from_pretrained as loading
from ..tokenizer_copy import SubsetName
from .run_choice import RunChoice


def from_pretrained(
    load: Callable,
    cls: type,
    path: str | os.PathLike,
    *args,
    expert_subset: Any = None,
    exclude_experts: Any = None,
    **kwargs,
):
    """`from_pretrained`, with the choice of `emo run` where the caller makes none.

    A caller who gives `expert_subset` or `exclude_experts` gets exactly these; `exclude_experts={}` is the
    whole model. A choice that does not fit the model is an error. The whole model is never loaded instead.

    Args:
        load, cls, path, args, expert_subset, exclude_experts, kwargs: as in `loading.from_pretrained`.

    Raises:
        CheckpointError: if the server of a repository asks for a long wait or sends next to nothing.
        SubsetError: if the subset or the exclusion does not fit the model.
        ValueError: if the document pool does not.

    Example: see `EmoPreTrainedModel.from_pretrained`.
    """
    with bounded_waits(path):
        return _from_pretrained(
            load, cls, path, *args, expert_subset=expert_subset, exclude_experts=exclude_experts, **kwargs
        )


def _from_pretrained(
    load: Callable,
    cls: type,
    path: str | os.PathLike,
    *args,
    expert_subset: Any,
    exclude_experts: Any,
    **kwargs,
):
    callers_own = expert_subset is not None or exclude_experts is not None
    is_part = False
    if isinstance(path, SubsetName) and not callers_own:
        is_part = True
        expert_subset, kwargs = path.expert_subset, path.origin.hub_kwargs | kwargs
        _give_whole_config(path, kwargs)
        callers_own = not path.by_run
    choice = RunChoice.read()
    if choice is None:
        return loading.from_pretrained(
            load, cls, path, *args, expert_subset=expert_subset, exclude_experts=exclude_experts, **kwargs
        )
    if not callers_own and not is_part:
        expert_subset, exclude_experts = choice.expert_subset, choice.exclude_experts
    try:
        result = loading.from_pretrained(
            load, cls, path, *args, expert_subset=expert_subset, exclude_experts=exclude_experts, **kwargs
        )
        model = result[0] if isinstance(result, tuple) else result  # output_loading_info=True
        if isinstance(model.config.name_or_path, SubsetName):
            model.config.name_or_path.by_run = not callers_own
        if choice.document_pool is not None:
            pool_sizes(model.config, choice.document_pool)
            model.base_model.default_document_pool = choice.document_pool
    except Exception as error:
        error.add_note(f"`emo run {choice}` asks for this of every EMO model that is loaded, here {path}.")
        raise
    if choice.document_pool is not None or not callers_own:
        Path(choice.mark).touch()
    if os.environ.get("RANK", "0") == "0":  # one of the workers of `torchrun` speaks for all
        print(f"emo run: {path}: {describe(choice, model.config, callers_own)}", file=sys.stderr, flush=True)
    return result


def _give_whole_config(part: SubsetName, kwargs: dict[str, Any]) -> None:
    """Where the part's own config is given too, as trainers do, put that of the whole model in its place.

    The experts are counted as in the files; all other settings stay those of the given config.
    """
    config = kwargs.get("config")
    if not isinstance(config, EmoConfig) or held_experts(config).experts != part.expert_subset.experts:
        return
    hub = {name: value for name, value in kwargs.items() if name in HUB_KWARGS}
    whole = EmoConfig.from_pretrained(str(part), **hub)
    kwargs["config"] = copy.deepcopy(config)
    for name in EXPERT_SETTINGS:
        setattr(kwargs["config"], name, getattr(whole, name))


def describe(choice: RunChoice, config: EmoConfig, callers_own: bool = False) -> str:
    """Which experts a model was loaded with, in words.

    Args:
        choice (`RunChoice`): what the user asked for.
        config (`EmoConfig`): the model's, with the experts that it holds.
        callers_own (`bool`, defaults to `False`): the program itself chose the experts.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.subsets.loading.choice.default_choice import describe
    >>> from transformers_emo.subsets.loading.choice.run_choice import RunChoice
    >>> config = EmoConfig(num_hidden_layers=1, num_experts=4, num_experts_per_tok=2,
    ...                    retained_experts=[[1, 5, 9, 15]], root_experts_per_layer=[16])
    >>> describe(RunChoice(expert_subset="python", document_pool=2), config)
    "experts of subset 'python' (4 of 16 a layer), in document pools of 2 routed experts"

    ```
    """
    held = size_range(len(ids) for ids in present_experts(config) if ids)
    number = f"({held} of {size_range(filter(None, root_experts(config)))} a layer)"
    exclusion = " but those of --exclude" if choice.exclude_experts is not None else ""
    if callers_own:
        words = f"experts that the program itself chooses {number}"
        if choice.expert_subset is not None or exclusion:
            words += f", not those of `{choice}`"
    elif choice.expert_subset is not None:
        words = f"experts of subset {choice.expert_subset!r}{exclusion} {number}"
    else:
        words = f"all its experts{exclusion} {number}"
    if choice.document_pool is not None:
        words += f", in document pools of {choice.document_pool} routed experts"
    return words
