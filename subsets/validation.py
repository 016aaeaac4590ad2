"""Checks of the ids and scores of a subset."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

from ..checkpoints.errors import tidy


class SubsetError(ValueError):
    """An expert subset is malformed, or does not fit the model it is meant for.

    Example:

    ```python
    >>> from transformers_emo import ExpertSubset, SubsetError
    >>> try:
    ...     ExpertSubset([[3, 3]])
    ... except SubsetError as error:
    ...     print(error)
    Layer 0 names expert 3 twice: name each expert once.

    ```
    """

    def __init__(self, *args: Any):
        super().__init__(*(tidy(arg) if isinstance(arg, str) else arg for arg in args))


def is_id(value: Any) -> bool:
    """Whether a value can be the id of an expert: an integer from 0, of any kind but bool.

    Args:
        value: anything.

    Example:

    ```python
    >>> from transformers_emo.subsets.validation import is_id
    >>> is_id(3), is_id(True), is_id(-1), is_id("3")
    (True, False, False, False)

    ```
    """
    # To Python, True and False are integers. They are not ids.
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def check_scores(scores: list, experts: list, always_kept: list) -> None:
    """Check that experts can be ranked: one score that is not a number would spoil the whole order.

    Args:
        scores (`list`): for each layer the score of every expert of the root model, or `None`.
        experts, always_kept (`list`): for each layer the ids kept, and those kept whatever their score.

    Raises:
        SubsetError: if a score is no finite number, or one of an expert that is kept is missing.

    Example:

    ```python
    >>> from transformers_emo.subsets.validation import check_scores
    >>> check_scores([[0.3, 0.7, None]], [[1, 2]], [[2]])

    ```
    """
    for index, (layer, *kept) in enumerate(zip(scores, experts, always_kept, strict=True)):
        if layer is None:
            continue
        if not isinstance(layer, list | tuple):
            raise SubsetError(f"The scores of layer {index} are {layer!r}, expected a list.")
        for expert, score in enumerate(layer):
            is_number = isinstance(score, Real) and not isinstance(score, bool) and math.isfinite(score)
            if score is not None and not is_number:
                raise SubsetError(
                    f"The score of expert {expert} in layer {index} is {score!r}, expected a finite number, "
                    "or None for an expert that was not scored."
                )
        last = max((e for ids in kept for e in ids or ()), default=-1)
        if last >= len(layer):
            raise SubsetError(
                f"Layer {index} has scores of {len(layer)} experts and keeps expert {last}: expected a "
                "score, or None, for every expert of the root model."
            )


def as_layers(value: Any) -> list:
    """Make a list of a sequence, a set (sorted), an array or a tensor.

    Args:
        value: anything.

    Raises:
        SubsetError: if it is none of these.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.subsets.validation import as_layers
    >>> as_layers(torch.tensor([[1, 2]])), as_layers({3, 1})
    ([[1, 2]], [1, 3])

    ```
    """
    if hasattr(value, "tolist"):  # arrays and tensors
        value = value.tolist()
    if isinstance(value, set | frozenset):
        value = sorted(value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return list(value)
    raise SubsetError(f"Expected one list of expert ids a layer, got {value!r}.")


def checked_ids(experts: Iterable) -> list[list[int] | None]:
    """The ids of each layer, sorted; `None` stays for a dense layer.

    Args:
        experts (`Iterable`): anything that `as_layers` takes; its entries too, or `None`.

    Raises:
        SubsetError: if an entry is not an id, or an id stands twice in a layer.

    Example:

    ```python
    >>> from transformers_emo.subsets.validation import checked_ids
    >>> checked_ids([[3, 1], None])
    [[1, 3], None]

    ```
    """
    checked: list[list[int] | None] = []
    for index, ids in enumerate(as_layers(experts)):
        if ids is None:
            checked.append(None)
            continue
        ids = as_layers(ids)
        wrong = [e for e in ids if not is_id(e)]
        if wrong:
            raise SubsetError(f"Layer {index} names expert {wrong[0]!r}: expected integers from 0.")
        doubled = [e for e, count in Counter(ids).items() if count > 1]
        if doubled:
            raise SubsetError(f"Layer {index} names expert {doubled[0]} twice: name each expert once.")
        checked.append(sorted(int(e) for e in ids))
    return checked
