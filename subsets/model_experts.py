"""Which experts a model holds, and what a subset of them means for its config."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..configuration import EmoConfig

if TYPE_CHECKING:
    from .expert_subset import ExpertSubset


def root_experts(config: EmoConfig) -> list[int]:
    """Experts of each layer of the root model of `config`, 0 for dense layers.

    Args:
        config (`EmoConfig`): a model's config.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.subsets import root_experts
    >>> root_experts(EmoConfig(num_hidden_layers=2))
    [128, 128]

    ```
    """
    return list(config.root_experts_per_layer or [layer.num_experts for layer in config.layer_experts])


def present_experts(config: EmoConfig) -> list[list[int]]:
    """The root ids of the experts that a model holds, layer by layer, in its own order; none for dense
    layers.

    Args:
        config (`EmoConfig`): a model's config.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.subsets import present_experts
    >>> present_experts(EmoConfig(num_hidden_layers=1, num_experts=4, num_experts_per_tok=2))
    [[0, 1, 2, 3]]

    ```
    """
    if config.retained_experts is not None:
        return [ids or [] for ids in config.retained_experts]
    return [list(range(layer.num_experts)) for layer in config.layer_experts]


def protected_experts(config: EmoConfig) -> list[list[int] | None]:
    """The root ids of the shared and always-active experts that a model holds, `None` for dense layers.

    Args:
        config (`EmoConfig`): a model's config.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.subsets.model_experts import protected_experts
    >>> protected_experts(EmoConfig(num_hidden_layers=2))
    [[127], [127]]

    ```
    """
    return [
        None if layer.is_dense else sorted({*ids[layer.num_routed :], *(ids[e] for e in layer.always_active)})
        for layer, ids in zip(config.layer_experts, present_experts(config), strict=True)
    ]


def local_experts(subset: ExpertSubset, config: EmoConfig) -> list[list[int] | None]:
    """The kept experts in the numbering of the model itself.

    Args:
        subset (`ExpertSubset`): a subset that fits, from `ExpertSubset.for_model`.
        config (`EmoConfig`): the config of the model it is applied to.

    Returns:
        `list[list[int] | None]`: for each layer the sorted local ids, `None` for a dense layer.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig, ExpertSubset
    >>> from transformers_emo.subsets import local_experts
    >>> config = EmoConfig(num_hidden_layers=1, num_experts=4, num_experts_per_tok=2,
    ...                    retained_experts=[[1, 5, 9, 15]], root_experts_per_layer=[16])
    >>> local_experts(ExpertSubset([[5, 9, 15]]).for_model(config), config)
    [[1, 2, 3]]

    ```
    """
    local = []
    for ids, present in zip(subset.experts, present_experts(config), strict=True):
        position = {root: index for index, root in enumerate(present)}
        local.append(None if ids is None else [position[root] for root in ids])
    return local


def subset_config(config: EmoConfig, subset: ExpertSubset) -> EmoConfig:
    """The config of the model that remains when only a subset of experts is kept.

    `num_experts` becomes the number kept (a list per layer where layers differ), `num_experts_per_tok` at
    most that; always-active ids are renumbered and `retained_experts` says which experts of the root model
    these are.

    Args:
        config (`EmoConfig`): the config of the model that the subset is taken from; not changed.
        subset (`ExpertSubset`): a subset that fits, from `ExpertSubset.for_model`.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig, ExpertSubset
    >>> from transformers_emo.subsets import subset_config
    >>> config = EmoConfig(num_hidden_layers=2, num_experts=16, num_experts_per_tok=4)
    >>> small = subset_config(config, ExpertSubset([[0, 3, 15], [1, 2, 15]]).for_model(config))
    >>> small.num_experts, small.num_experts_per_tok, small.retained_experts
    (3, 3, [[0, 3, 15], [1, 2, 15]])

    ```
    """
    kept = local_experts(subset, config)
    sizes = [0 if ids is None else len(ids) for ids in kept]
    shared, always = [], []
    for layer, ids in zip(config.layer_experts, kept, strict=True):
        ids = ids or []
        shared.append(sum(e >= layer.num_routed for e in ids))
        always.append([ids.index(e) for e in layer.always_active if e in ids])

    config = copy.deepcopy(config)
    expert_layers = [index for index, size in enumerate(sizes) if size]
    config.num_experts = max(sizes)
    config.num_experts_per_layer = sizes if len(set(sizes)) > 1 else None
    config.num_experts_per_tok = min(config.num_experts_per_tok, config.num_experts)
    if config.num_shared_experts_per_layer is not None or len({shared[index] for index in expert_layers}) > 1:
        config.num_shared_experts_per_layer = shared
    else:
        config.num_shared_experts = shared[expert_layers[0]] if expert_layers else config.num_shared_experts
    if any(always):
        same = all(always[index] == always[expert_layers[0]] for index in expert_layers)
        same = same and config.always_active_experts_per_layer is None
        config.always_active_experts = always[expert_layers[0]] if same else None
        config.always_active_experts_per_layer = None if same else always
    else:
        config.always_active_experts = config.always_active_experts_per_layer = None
    config.retained_experts = copy.deepcopy(subset.experts)
    config.root_experts_per_layer = subset.root_experts_per_layer
    config.validate()
    return config


def size_range(sizes: Iterable[int]) -> str:
    """Numbers of experts as a reader is told them.

    Args:
        sizes (`Iterable[int]`): of the layers.

    Example:

    ```python
    >>> from transformers_emo.subsets.model_experts import size_range
    >>> size_range([16, 16]), size_range([8, 32, 16]), size_range([])
    ('16', '8 to 32', '0')

    ```
    """
    least, *more = sorted(set(sizes)) or [0]
    return f"{least} to {more[-1]}" if more else f"{least}"
