"""What `config._name_or_path` of a part is: the name of its model, which loads that part again.

Trainers make a model's reference by `from_pretrained(config._name_or_path)` (TRL's DPO, KTO and GRPO). Of a
part, the reference is that part, and not the whole model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Self

import yaml

from ..expert_subset import ExpertSubset
from ..reduced_config import held_experts
from .tokenizer_copy import Origin


class SubsetName(str):
    """The folder or repository of a model, with the experts of a part of it; otherwise a string like any.

    `from_pretrained(name)` loads these experts. `str(name)` is the plain name, which loads them all.

    Args:
        place (`str`): the folder or Hub repository.

    Example:

    ```python
    >>> from transformers_emo import EmoForCausalLM
    >>> part = EmoForCausalLM.from_pretrained("model_cards/toy-emo", expert_subset=[[0, 1, 2, 31]] * 4)
    >>> part.config.name_or_path
    'model_cards/toy-emo'
    >>> EmoForCausalLM.from_pretrained(part.config.name_or_path).config.num_experts
    4
    >>> EmoForCausalLM.from_pretrained(str(part.config.name_or_path)).config.num_experts
    32

    ```
    """

    expert_subset: ExpertSubset
    origin: Origin
    by_run: bool = False  # the experts are those that `emo run` was asked for

    @classmethod
    def of(cls, place: str | os.PathLike, subset: ExpertSubset, hub_kwargs: Mapping[str, Any]) -> Self:
        """The name of a part.

        Args:
            place (`str` or `os.PathLike`): the folder or Hub repository of the model.
            subset (`ExpertSubset`): the experts.
            hub_kwargs (`Mapping[str, Any]`): `revision`, `token`, `cache_dir` and so on, to load it again.
        """
        name = cls(os.fspath(place))
        name.expert_subset, name.origin = subset, Origin.of(place, hub_kwargs)
        return name


def name_part(model: Any, place: str | os.PathLike, hub_kwargs: Mapping[str, Any]) -> None:
    """Let the config of a model say where it is from, and if it is a part, which part.

    Args:
        model (`EmoPreTrainedModel`): the model.
        place (`str` or `os.PathLike`): the folder or Hub repository.
        hub_kwargs (`Mapping[str, Any]`): `revision`, `token`, `cache_dir` and so on, to load it again.

    Example: see `SubsetName`.
    """
    name: str = os.fspath(place)
    if model.config.retained_experts is not None:
        held = held_experts(model.config)
        object.__setattr__(held, "drop_shared", True)  # whatever the part leaves out, it is meant
        name = SubsetName.of(place, held, hub_kwargs)
    model.config._name_or_path = name  # `name_or_path = ...` would make it a plain string


def _as_string(dumper: Any, name: SubsetName) -> Any:
    return dumper.represent_str(str(name))


for _representer in (yaml.representer.SafeRepresenter, yaml.representer.Representer):
    _representer.add_representer(SubsetName, _as_string)  # model cards name their base model
