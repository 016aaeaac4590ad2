"""Experts that must never be used, and the subset that remains without them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..configuration import EmoConfig
from .expert_subset import ExpertSubset
from .library import Fetch
from .numbering import present_experts, root_experts
from .validation import SubsetError


def remaining_subset(
    expert_subset: Any,
    exclude_experts: Any,
    config: EmoConfig,
    folder: str | os.PathLike | None = None,
    fetch: Fetch | None = None,
) -> ExpertSubset:
    """A subset without the experts never to use, known to fit a model.

    Args:
        expert_subset: whatever `ExpertSubset.of` takes, or `None` for all experts of the model.
        exclude_experts: experts to leave out, in root numbering: one list of ids a layer (`None` or empty for
            none), ids by layer, or an `ExpertSubset`, its file or its JSON data, of which shared and
            always-active experts stay. `None` for none. Ids that the model does not hold change nothing.
        config (`EmoConfig`): the model's config.
        folder, fetch (*optional*): from `library_of` the model, for subsets that go by a name.

    Returns:
        `ExpertSubset`: in root numbering.

    Raises:
        SubsetError: if either does not fit the model, a shared or always-active expert is to be left out, or
            too few are left.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.subsets.exclusion import remaining_subset
    >>> config = EmoConfig(num_hidden_layers=2, num_experts=8, num_experts_per_tok=4)
    >>> remaining_subset(None, {1: [0, 2]}, config).experts
    [[0, 1, 2, 3, 4, 5, 6, 7], [1, 3, 4, 5, 6, 7]]

    ```
    """
    layers = config.layer_experts
    if expert_subset is None:
        present = [
            None if layer.is_dense else ids
            for layer, ids in zip(layers, present_experts(config), strict=True)
        ]
        # The model itself may lack shared experts: nothing that it holds is dropped.
        expert_subset = ExpertSubset(present)
    subset = ExpertSubset.of(expert_subset, folder, fetch).for_model(config)
    if exclude_experts is None:
        return subset
    excluded = excluded_experts(exclude_experts, config, folder, fetch)
    experts = [
        None if ids is None else [e for e in ids if e not in never]
        for ids, never in zip(subset.experts, excluded, strict=True)
    ]
    for index, (ids, never) in enumerate(zip(experts, excluded, strict=True)):
        if ids == [] and never:
            raise SubsetError(
                f"Nothing remains of layer {index} without its experts {sorted(never)}: exclude fewer."
            )
    fields = {name: getattr(subset, name) for name in subset.__dataclass_fields__}
    return ExpertSubset(**fields | {"experts": experts}).for_model(config)


def named_exclusion(
    exclude_experts: Any, folder: str | os.PathLike | None = None, fetch: Fetch | None = None
) -> Any:
    """Read the experts never to use where they are a subset by name, file or JSON data.

    Args:
        exclude_experts, folder, fetch: as in `remaining_subset`.

    Returns:
        the `ExpertSubset`; ids by layer and lists of ids as they are.

    Raises:
        SubsetError: if there is no such subset, or it cannot be read.

    Example:

    ```python
    >>> from transformers_emo.subsets.exclusion import named_exclusion
    >>> named_exclusion({1: [0, 2]})
    {1: [0, 2]}
    >>> named_exclusion({"experts": [[0, 2]]}).experts
    [[0, 2]]

    ```
    """
    by_layer = isinstance(exclude_experts, Mapping) and (
        all(str(k).isdecimal() for k in exclude_experts)  # JSON has no keys but text
        or not any(isinstance(k, str) for k in exclude_experts)
    )
    if isinstance(exclude_experts, Mapping) and not by_layer:
        return ExpertSubset.from_dict(dict(exclude_experts))
    if isinstance(exclude_experts, str | os.PathLike):
        return ExpertSubset.of(exclude_experts, folder, fetch)
    return exclude_experts


def excluded_experts(
    exclude_experts: Any,
    config: EmoConfig,
    folder: str | os.PathLike | None = None,
    fetch: Fetch | None = None,
) -> list[set[int]]:
    """The experts never to use, for each layer, in root numbering; see `remaining_subset`.

    Args:
        exclude_experts, config, folder, fetch: as in `remaining_subset`.

    Raises:
        SubsetError: as there.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.subsets.exclusion import excluded_experts
    >>> config = EmoConfig(num_hidden_layers=2, num_experts=8, num_experts_per_tok=4)
    >>> excluded_experts([[3], []], config)
    [{3}, set()]

    ```
    """
    layers = config.layer_experts
    exclude_experts = named_exclusion(exclude_experts, folder, fetch)
    if isinstance(exclude_experts, Mapping):
        exclude_experts = {int(k) if str(k).isdecimal() else k: ids for k, ids in exclude_experts.items()}
        wrong = [k for k in exclude_experts if not isinstance(k, int) or not 0 <= k < len(layers)]
        if wrong:
            raise SubsetError(f"There is no layer {wrong[0]!r}: expected 0 to {len(layers) - 1}.")
        exclude_experts = [exclude_experts.get(index) for index in range(len(layers))]
    # Every subset names the shared experts, and they stay. A list of ids that names one is a mistake.
    is_subset = isinstance(exclude_experts, ExpertSubset)
    subset = ExpertSubset.of(exclude_experts)
    if len(subset.experts) != len(layers):
        raise SubsetError(
            f"The exclusion has {len(subset.experts)} layers, the model {len(layers)}: give one list of ids "
            "a layer, or ids by layer."
        )
    if subset.root_experts_per_layer not in (None, root_experts(config)):
        raise SubsetError(
            f"The subset of experts to leave out was made for another model: one with "
            f"{subset.root_experts_per_layer} experts in its layers, and this one has {root_experts(config)}."
        )
    if subset.local_ids:
        subset = subset.for_model(config)
    excluded = []
    for index, (ids, layer, present, size) in enumerate(
        zip(subset.experts, layers, present_experts(config), root_experts(config), strict=True)
    ):
        outside = [e for e in ids or () if e >= size]
        if outside:
            raise SubsetError(f"Layer {index} has no expert {outside[0]}: expected ids from 0 to {size - 1}.")
        protected = {present[e] for e in layer.always_used}
        shared = sorted(protected & set(ids or ()))
        if shared and not is_subset:
            raise SubsetError(
                f"Expert {shared[0]} of layer {index} cannot be excluded: every token uses it (shared or "
                "always active). Leave it out of the list."
            )
        excluded.append(set(ids or ()) - protected)
    return excluded
