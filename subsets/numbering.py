"""Which experts a model holds, in the numbering of the root model."""

from __future__ import annotations

from collections.abc import Iterable

from ..configuration import EmoConfig


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
    >>> from transformers_emo.subsets.numbering import protected_experts
    >>> protected_experts(EmoConfig(num_hidden_layers=2))
    [[127], [127]]

    ```
    """
    return [
        None if layer.is_dense else sorted(ids[e] for e in layer.always_used)
        for layer, ids in zip(config.layer_experts, present_experts(config), strict=True)
    ]


def size_range(sizes: Iterable[int]) -> str:
    """Numbers of experts as a reader is told them.

    Args:
        sizes (`Iterable[int]`): of the layers.

    Example:

    ```python
    >>> from transformers_emo.subsets.numbering import size_range
    >>> size_range([16, 16]), size_range([8, 32, 16]), size_range([])
    ('16', '8 to 32', '0')

    ```
    """
    least, *more = sorted(set(sizes)) or [0]
    return f"{least} to {more[-1]}" if more else f"{least}"
