"""`pruning_metadata.json`, which the authors' scripts write beside a pruned model
(https://github.com/allenai/EMO). `ExpertSubset.load` reads it.
"""

from __future__ import annotations

import json
import os
from typing import Any

from ..checkpoints.writing.durable_files import write_whole
from ..configuration import EmoConfig
from .expert_subset import AUTHORS_METHODS, ExpertSubset
from .reduced_config import local_experts

_METHODS = {ours: theirs for theirs, ours in AUTHORS_METHODS.items()}


def pruning_metadata(subset: ExpertSubset, config: EmoConfig) -> dict[str, Any]:
    """A subset as the authors' scripts write it.

    Scores are not part of it, and ids are in the numbering of the model that is pruned.

    Args:
        subset (`ExpertSubset`): the subset.
        config (`EmoConfig`): the config of the model that is, or was, pruned to it.

    Returns:
        `dict[str, Any]`: their keys; `prune_keep_k` is `None` where layers keep different numbers, and a
        dense layer keeps `[]`.

    Raises:
        SubsetError: if the subset does not fit the model.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig, ExpertSubset
    >>> from transformers_emo.subsets import pruning_metadata
    >>> config = EmoConfig(num_hidden_layers=1, num_experts=4, num_experts_per_tok=2,
    ...                    retained_experts=[[1, 5, 9, 15]], root_experts_per_layer=[16])
    >>> pruning_metadata(ExpertSubset([[5, 9, 15]]), config)["experts_kept_per_layer"]
    [[1, 2, 3]]

    ```
    """
    kept = local_experts(subset.for_model(config), config)
    sizes = {len(ids) for ids in kept if ids is not None}
    shared = {
        sum(e >= layer.num_routed for e in ids)
        for ids, layer in zip(kept, config.layer_experts, strict=True)
        if ids is not None
    }
    return {
        "original_model": subset.source or config.name_or_path or None,
        "prune_keep_k": sizes.pop() if len(sizes) == 1 else None,
        "num_shared_experts": shared.pop() if len(shared) == 1 else None,
        "pruning_method": _METHODS.get(subset.method or "", subset.method),
        "experts_kept_per_layer": [ids or [] for ids in kept],
    }


def save_pruning_metadata(subset: ExpertSubset, config: EmoConfig, path: str | os.PathLike) -> None:
    """Write a subset as the authors' scripts do. The file appears only when it is complete.

    Args:
        subset (`ExpertSubset`): the subset.
        config (`EmoConfig`): the config of the model that is, or was, pruned to it.
        path (`str` or `os.PathLike`): the file; the scripts call it `pruning_metadata.json`.

    Raises:
        SubsetError: if the subset does not fit the model.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig, ExpertSubset
    >>> from transformers_emo.subsets import save_pruning_metadata
    >>> config = EmoConfig(num_hidden_layers=1, num_experts=16)
    >>> save_pruning_metadata(ExpertSubset([[5, 9, 15]]), config, tmp_path / "pruning_metadata.json")
    >>> ExpertSubset.load(tmp_path / "pruning_metadata.json").for_model(config).experts
    [[5, 9, 15]]

    ```
    """
    write_whole(path, json.dumps(pruning_metadata(subset, config), indent=2) + "\n")
