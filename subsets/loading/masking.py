"""A subset as a mask over a model that is already loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...configuration import EmoConfig
from ..validation import SubsetError
from .model_source import ModelSource


def kept_experts(
    expert_subset: Any,
    config: EmoConfig,
    exclude_experts: Any = None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> list[list[int] | None]:
    """The experts a subset keeps, in the numbering of a model that will mask the others.

    Args:
        expert_subset: whatever `ExpertSubset.of` takes; `None` for all experts.
        config (`EmoConfig`): the model's config.
        exclude_experts: whatever `remaining_subset` takes; none by default.
        weights (`Mapping[str, torch.Tensor]`, *optional*): the model's, by name, to warn of a subset
            that was chosen on another model.

    Raises:
        SubsetError: if it does not fit the model, or drops shared experts: their weights would still be
            there.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.subsets.loading.masking import kept_experts
    >>> kept_experts([[7, 1]], EmoConfig(num_hidden_layers=1, num_experts=8, num_experts_per_tok=4))
    [[1, 7]]

    ```
    """
    source = ModelSource.of_loaded(config)
    kept = source.keep(expert_subset, exclude_experts)
    if kept.subset.drop_shared:
        raise SubsetError("A subset with drop_shared=True cannot be a mask: load the model with it instead.")
    if weights is not None:
        source.warn_if_chosen_elsewhere(kept, weights)
    return kept.local
