"""What a subset of experts means for a model's config."""

from __future__ import annotations

import copy

from ..configuration import EmoConfig
from .expert_subset import ExpertSubset
from .numbering import present_experts, root_experts

EXPERT_SETTINGS = (
    "num_experts",
    "num_experts_per_layer",
    "num_experts_per_tok",
    "num_shared_experts",
    "num_shared_experts_per_layer",
    "always_active_experts",
    "always_active_experts_per_layer",
    "retained_experts",
    "root_experts_per_layer",
)
"""What `subset_config` changes."""


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


def held_experts(config: EmoConfig) -> ExpertSubset:
    """All experts that a model holds; `None` stands for a dense layer.

    Args:
        config (`EmoConfig`): the model's config.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.subsets.reduced_config import held_experts
    >>> held_experts(EmoConfig(num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)).experts
    [[0, 1, 2, 3]]

    ```
    """
    return ExpertSubset(
        [ids or None for ids in present_experts(config)],
        root_experts_per_layer=root_experts(config),
    )
