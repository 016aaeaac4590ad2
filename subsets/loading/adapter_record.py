"""The experts that an adapter belongs to: the file beside it that names them, and checks against a model.

An adapter of stacked experts has no expert ids. On as many other experts it would silently adapt the wrong
ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from safetensors import safe_open
from transformers.utils import cached_file

from ...configuration import EmoConfig
from ...modeling_emo.weight_names import SIZED_BY_EXPERTS
from ..expert_subset import ExpertSubset
from ..library import RECORD
from ..reduced_config import held_experts
from ..validation import SubsetError

RECORD_KEY = "expert_subset"
"""Under `auto_mapping` of an adapter's config: its experts, as `ExpertSubset.to_dict` gives them."""
_allow_more: ContextVar[bool] = ContextVar("allow_more", default=False)


def read_record(adapter: str | os.PathLike, **hub) -> ExpertSubset | None:
    """The experts that an adapter was trained on, or `None` where the file is not there.

    Args:
        adapter (`str` or `os.PathLike`): the adapter's folder or Hub repository.
        hub: `revision`, `subfolder`, `token` and so on of a Hub repository.

    Raises:
        SubsetError: if the file is damaged.

    Example:

    ```python
    >>> from transformers_emo import ExpertSubset
    >>> from transformers_emo.subsets.loading.adapter_record import read_record
    >>> ExpertSubset([[0, 9]]).save(tmp_path / "expert_subset.json")
    >>> read_record(tmp_path).experts
    [[0, 9]]

    ```
    """
    path = _file(adapter, RECORD, hub)
    return None if path is None else ExpertSubset.load(path)


def check_record(subset: ExpertSubset, config: EmoConfig) -> None:
    """Check that a model holds all experts that an adapter was trained on. It may hold more.

    Args:
        subset (`ExpertSubset`): the adapter's experts, all of them.
        config (`EmoConfig`): the model's config.

    Raises:
        SubsetError: if it lacks some, or is another model.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig, ExpertSubset
    >>> from transformers_emo.subsets.loading.adapter_record import check_record
    >>> config = EmoConfig(num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
    >>> check_record(ExpertSubset([[0, 3]]), config)

    ```
    """
    here = held_experts(config)
    if len(subset.experts) != len(here.experts) or (
        subset.root_experts_per_layer not in (None, here.root_experts_per_layer)
    ):
        raise SubsetError(
            f"The adapter was trained on another model: one with {subset.root_experts_per_layer or '?'} "
            f"experts in its {len(subset.experts)} layers, and this one has {here.root_experts_per_layer} in "
            f"its {len(here.experts)}."
        )
    for layer, (theirs, ours) in enumerate(zip(subset.experts, here.experts, strict=True)):
        if set(theirs or []) - set(ours or []) or (theirs is None) != (ours is None):
            raise SubsetError(
                f"The adapter was trained on the experts {theirs} in layer {layer}, and this model holds "
                f"{ours}: load it onto that subset (`from_pretrained(..., expert_subset={RECORD!r})` with "
                "the file beside the adapter) or onto the full model."
            )


def check_adapter(adapter: str | os.PathLike, config: EmoConfig, hub: dict[str, Any]) -> None:
    """Check that Transformers or PEFT can put an adapter on a model as it is.

    An adapter without a record is left to them.

    Args:
        adapter (`str` or `os.PathLike`): the adapter's folder or Hub repository.
        config (`EmoConfig`): the model's config.
        hub (`dict`): `revision`, `subfolder`, `token` and so on of a Hub repository.

    Raises:
        SubsetError: if the adapter was trained on experts that the model lacks, or adapts experts or their
            router where the model holds more.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig, ExpertSubset, SubsetError
    >>> from transformers_emo.subsets.loading.adapter_record import check_adapter
    >>> ExpertSubset([[0, 9]]).save(tmp_path / "expert_subset.json")
    >>> config = EmoConfig(num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
    >>> try:
    ...     check_adapter(tmp_path, config, {})
    ... except SubsetError as error:
    ...     print(error)  # doctest: +ELLIPSIS
    The adapter was trained on the experts [0, 9] in layer 0, and this model holds [0, 1, 2, 3]...

    ```
    """
    subset = read_record(adapter, **hub)
    if subset is None:
        return
    check_record(subset, config)
    if subset.experts == held_experts(config).experts:
        return
    weights = _file(adapter, "adapter_model.safetensors", hub)
    if weights is None:
        return
    with safe_open(weights, framework="pt") as file:
        expert_tensor = next(filter(SIZED_BY_EXPERTS.fullmatch, file.keys()), None)
    if expert_tensor is not None:
        raise SubsetError(
            f"The adapter was trained on some of the experts that this model holds, and has sizes of theirs "
            f"({expert_tensor}): put it on with `transformers_emo.training.load_adapter(model, adapter)`, "
            "which gives each expert its part."
        )


def check_adapter_config(adapter_config: Any, config: EmoConfig) -> None:
    """Check that an adapter's config was made for the same experts as the model holds.

    `lora_config` writes the experts of its model into the config, and they are saved beside the adapter. On
    other experts that record would be false. Configs without a record are not checked.

    Args:
        adapter_config (`peft.PeftConfig`): the adapter's.
        config (`EmoConfig`): the model's.

    Raises:
        SubsetError: if it was made for other experts.

    Example:

    ```python
    >>> from types import SimpleNamespace
    >>> from transformers_emo import EmoConfig, SubsetError
    >>> from transformers_emo.subsets.loading.adapter_record import check_adapter_config
    >>> made_for = SimpleNamespace(expert_subset={"experts": [[0, 3]]})
    >>> config = EmoConfig(num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
    >>> try:
    ...     check_adapter_config(made_for, config)
    ... except SubsetError as error:
    ...     print(error)  # doctest: +ELLIPSIS
    The adapter's config was made for the experts [0, 3] in layer 0, and this model holds [0, 1, 2, 3]...

    ```
    """
    record = getattr(adapter_config, "expert_subset", None)
    if record is None:
        return
    subset, here = ExpertSubset.from_dict(record), held_experts(config)
    if subset.root_experts_per_layer not in (None, here.root_experts_per_layer):
        check_record(subset, config)  # another model: it says so
    differing = [
        layer
        for layer, (theirs, ours) in enumerate(zip(subset.experts, here.experts, strict=False))
        if theirs != ours
    ]
    if differing or len(subset.experts) != len(here.experts):
        layer = differing[0] if differing else min(len(subset.experts), len(here.experts)) - 1
        raise SubsetError(
            f"The adapter's config was made for the experts {subset.experts[layer]} in layer {layer}, and "
            f"this model holds {here.experts[layer]}: make it anew by `lora_config(model, ...)`, after the "
            "model's experts were chosen."
        )


def check_adapters(adapter_configs: Any, config: EmoConfig) -> None:
    """Check that adapters were trained on the very experts that a model holds, where their configs say it.

    PEFT's own loading (`PeftModel.from_pretrained`, `AutoPeftModelForCausalLM`) shows a model only the
    configs. Those saved by `lora_config`, or of an adapter of a subset, name their experts in `auto_mapping`,
    which PEFT keeps as it is. A config that has yet to be trained gets the experts of its model.

    Args:
        adapter_configs (`Mapping[str, peft.PeftConfig]`): by the adapters' names.
        config (`EmoConfig`): the model's config.

    Raises:
        SubsetError: if one was trained on other experts, or on some of them.

    Example:

    ```python
    >>> from types import SimpleNamespace
    >>> from transformers_emo import EmoConfig, SubsetError
    >>> from transformers_emo.subsets.loading.adapter_record import check_adapters
    >>> config = EmoConfig(num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
    >>> saved = SimpleNamespace(auto_mapping={"expert_subset": {"experts": [[0, 3]]}})
    >>> try:
    ...     check_adapters({"default": saved}, config)
    ... except SubsetError as error:
    ...     print(error)  # doctest: +ELLIPSIS
    The adapter was trained on the experts [0, 3] in layer 0, and this model holds [0, 1, 2, 3]...

    ```
    """
    if not isinstance(adapter_configs, Mapping) or _allow_more.get():
        return
    here = held_experts(config)
    for adapter in adapter_configs.values():
        mapping = getattr(adapter, "auto_mapping", None) or {}
        record = mapping.get(RECORD_KEY)
        if record is not None and not getattr(adapter, "_trains_here", False):
            subset = ExpertSubset.from_dict(record)
            check_record(subset, config)
            for layer, (theirs, ours) in enumerate(zip(subset.experts, here.experts, strict=True)):
                if theirs != ours:
                    raise SubsetError(
                        f"The adapter was trained on the experts {theirs} in layer {layer}, and this model "
                        f"holds {ours}: with more experts it computes something else. Load the model with "
                        f"`expert_subset=` and the file {RECORD} beside the adapter, or put the adapter on "
                        "by `transformers_emo.training.load_adapter(model, adapter)`."
                    )
        elif not getattr(adapter, "inference_mode", True):
            mapping = {name: value for name, value in mapping.items() if name != RECORD_KEY}
            # Without a task PEFT writes another mapping, or wants none.
            is_part = config.retained_experts is not None and getattr(adapter, "task_type", None) is not None
            if is_part or hasattr(adapter, "expert_subset"):
                mapping[RECORD_KEY] = here.to_dict()
            adapter.auto_mapping = mapping or None
            adapter._trains_here = True


@contextmanager
def more_experts_allowed() -> Iterator[None]:
    """Leave `check_adapters` out, where `check_adapter` has looked at the adapter's folder.

    Example: see `EmoPreTrainedModel.load_adapter`.
    """
    token = _allow_more.set(True)
    try:
        yield
    finally:
        _allow_more.reset(token)


def _file(adapter: str | os.PathLike, name: str, hub: dict[str, Any]) -> str | None:
    """A file of an adapter, or `None`: also where it was never fetched and the Hub cannot be reached."""
    return cached_file(
        os.fspath(adapter),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )
