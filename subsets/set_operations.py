"""Set operations on subsets, as pure functions from their fields to the fields of the result.

They know no class: `ExpertSubset` has its operators from here, and `composition.py` its functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from transformers.utils import logging

from .fingerprint import are_apart
from .validation import SubsetError

logger = logging.get_logger(__name__)

_Scores = list[list[float | None] | None]


class Chosen(Protocol):
    """The fields of a subset that the operations read; see `ExpertSubset`."""

    @property
    def experts(self) -> list[list[int] | None]:
        """The experts of each layer."""
        ...

    @property
    def scores(self) -> _Scores | None:
        """The scores of each layer."""
        ...

    @property
    def always_kept(self) -> list[list[int] | None] | None:
        """The experts that every token uses, by layer."""
        ...

    @property
    def root_experts_per_layer(self) -> list[int] | None:
        """The numbers of experts of the root model's layers."""
        ...

    @property
    def num_tokens(self) -> int | None:
        """Calibration tokens."""
        ...

    @property
    def num_texts(self) -> int | None:
        """Calibration texts."""
        ...

    @property
    def source(self) -> str | None:
        """The model that they were chosen on."""
        ...

    @property
    def revision(self) -> str | None:
        """Its revision."""
        ...

    @property
    def fingerprint(self) -> str | None:
        """Its fingerprint."""
        ...

    @property
    def drop_shared(self) -> bool:
        """Whether shared experts may be left out."""
        ...

    @property
    def local_ids(self) -> bool:
        """Whether ids are those of a pruned model."""
        ...


def union(subsets: Sequence[Chosen]) -> dict[str, Any]:
    """The experts that are in any of the subsets.

    Args:
        subsets (`Sequence[Chosen]`): one or more, of one root model.

    Returns:
        `dict[str, Any]`: the fields of the result.

    Raises:
        SubsetError: if they are of different models.

    Example:

    ```python
    >>> from transformers_emo import ExpertSubset
    >>> from transformers_emo.subsets.set_operations import union
    >>> union([ExpertSubset([[0, 1, 31]]), ExpertSubset([[1, 5, 31]])])["experts"]
    [[0, 1, 5, 31]]

    ```
    """
    check_comparable(subsets)
    experts = [
        None if layer[0] is None else sorted({e for ids in layer for e in ids})
        for layer in zip(*(subset.experts for subset in subsets), strict=True)
    ]
    return combined(subsets, experts, "union")


def intersection(subsets: Sequence[Chosen]) -> dict[str, Any]:
    """The experts that are in all of the subsets.

    Args:
        subsets (`Sequence[Chosen]`): one or more, of one root model.

    Returns:
        `dict[str, Any]`: the fields of the result.

    Raises:
        SubsetError: if they are of different models.

    Example:

    ```python
    >>> from transformers_emo import ExpertSubset
    >>> from transformers_emo.subsets.set_operations import intersection
    >>> intersection([ExpertSubset([[0, 1, 31]]), ExpertSubset([[1, 5, 31]])])["experts"]
    [[1, 31]]

    ```
    """
    check_comparable(subsets)
    experts = [
        None if layer[0] is None else sorted(set(layer[0]).intersection(*layer[1:]))
        for layer in zip(*(subset.experts for subset in subsets), strict=True)
    ]
    return combined(subsets, experts, "intersection")


def difference(first: Chosen, second: Chosen) -> dict[str, Any]:
    """The experts of the first subset that are not in the second. Those that every token uses stay.

    Args:
        first (`Chosen`): what to take from; see `transformers_emo.subsets.difference`.
        second (`Chosen`): what to take away.

    Returns:
        `dict[str, Any]`: the fields of the result.

    Raises:
        SubsetError: if they are of different models, or `first` does not know its shared experts.

    Example:

    ```python
    >>> from transformers_emo import ExpertSubset
    >>> from transformers_emo.subsets.set_operations import difference
    >>> first = ExpertSubset([[0, 1, 31]], always_kept=[[31]])
    >>> difference(first, ExpertSubset([[1, 5, 31]]))["experts"]
    [[0, 31]]

    ```
    """
    subsets = (first, second)
    check_comparable(subsets)
    always = always_kept(subsets)
    if always is None:
        if not first.drop_shared:
            raise SubsetError(
                "The subset does not know which experts are shared, and these must stay: call "
                "`subset.for_model(config)` first."
            )
        always = [None] * len(first.experts)
    experts = [
        None if mine is None else [e for e in mine if e not in set(theirs or ()) or e in (stay or ())]
        for mine, theirs, stay in zip(first.experts, second.experts, always, strict=True)
    ]
    return combined(subsets, experts, "difference", scored=[first])


def check_comparable(subsets: Sequence[Chosen]) -> None:
    """Check that ids mean the same in all of the subsets, as far as their fields tell.

    Subsets that look as if they were chosen on different models give a warning.

    Args:
        subsets (`Sequence[Chosen]`): the subsets.

    Raises:
        SubsetError: if there are none, or they are of different models.

    Example:

    ```python
    >>> from transformers_emo import ExpertSubset
    >>> from transformers_emo.subsets.set_operations import check_comparable
    >>> check_comparable([ExpertSubset([[0, 1]]), ExpertSubset([[1, 2]])])

    ```
    """
    if not subsets:
        raise SubsetError("Got no subset: give at least one.")
    first = subsets[0]
    for subset in subsets:
        if subset.local_ids:
            raise SubsetError(
                "The ids of a subset are in the numbering of a model that was pruned, as in "
                "`pruning_metadata.json`: call `subset.for_model(config)` with that model's config first."
            )
        if len(subset.experts) != len(first.experts):
            raise SubsetError(
                f"The subsets have {len(first.experts)} and {len(subset.experts)} layers: they were made for "
                "different models."
            )
        for index, (ids, others) in enumerate(zip(first.experts, subset.experts, strict=True)):
            if (ids is None) != (others is None):
                raise SubsetError(
                    f"Layer {index} is dense (None) in one subset and not in another: they were made for "
                    "different models."
                )
    sizes = [s.root_experts_per_layer for s in subsets if s.root_experts_per_layer is not None]
    if any(list(size) != list(sizes[0]) for size in sizes):
        raise SubsetError(f"The subsets were made for models of different sizes: {sizes}.")
    known = [(subset.fingerprint, subset.source) for subset in subsets]
    reasons = (are_apart(known[0], other) for other in known[1:])
    if reason := next(filter(None, reasons), None):
        logger.warning(
            f"The subsets look as if chosen on different models ({sorted({str(s) for _, s in known})}): "
            f"{reason}. Ids mean nothing in another model: make sure that it is one, or subsets of one."
        )


def combined(
    subsets: Sequence[Chosen],
    experts: list[list[int] | None],
    method: str,
    *,
    scored: Sequence[Chosen] | None = None,
    weights: Sequence[float] | None = None,
) -> dict[str, Any]:
    """The fields of an operation's result: `experts`, what the subsets have in common, and mean scores.

    Args:
        subsets (`Sequence[Chosen]`): the subsets.
        experts (`list[list[int] | None]`): the experts of the result.
        method (`str`): the operation's name.
        scored (`Sequence[Chosen]`, *optional*): the subsets whose scores count; all by default.
        weights (`Sequence[float]`, *optional*): of these; without any, only the experts of the result have
            scores.

    Returns:
        `dict[str, Any]`: the arguments of an `ExpertSubset`.

    Example: see `union`.
    """
    scored = subsets if scored is None else scored
    always = always_kept(subsets)
    scores: _Scores | None = None
    if always is not None and all(subset.scores is not None for subset in scored):
        scores = _mean_scores(scored, weights or [1.0] * len(scored), always)
        if weights is None:
            scores = [
                None if layer is None else [s if e in (ids or ()) else None for e, s in enumerate(layer)]
                for layer, ids in zip(scores, experts, strict=True)
            ]
    return {
        "experts": experts,
        "scores": scores,
        "always_kept": always,
        "root_experts_per_layer": _first(s.root_experts_per_layer for s in subsets),
        "method": method,
        "num_tokens": _total([s.num_tokens for s in subsets]),
        "num_texts": _total([s.num_texts for s in subsets]),
        "source": _common([s.source for s in subsets]),
        "revision": _common([s.revision for s in subsets]),
        "fingerprint": _first(s.fingerprint for s in subsets),
        "drop_shared": any(s.drop_shared for s in subsets),
    }


def _mean_scores(
    subsets: Sequence[Chosen], weights: Sequence[float], always: Sequence[list[int] | None]
) -> _Scores:
    total = sum(weights)
    means: _Scores = []
    for index, stay in enumerate(always):
        layers = [subset.scores[index] for subset in subsets if subset.scores is not None]
        if any(layer is None for layer in layers):
            means.append(None)
            continue
        mean: list[float | None] = [None] * max(len(layer) for layer in layers if layer is not None)
        for layer, weight in zip(layers, weights, strict=True):
            scores = enumerate(layer or ())
            competing = {e: score for e, score in scores if score is not None and e not in (stay or ())}
            mass = math.fsum(competing.values()) or 1.0
            for e, score in competing.items():
                mean[e] = (mean[e] or 0.0) + weight / total * (score / mass)
        for e in stay or ():
            mean[e] = 1.0  # no share is larger
        means.append(mean)
    return means


def always_kept(subsets: Sequence[Chosen]) -> list[list[int] | None] | None:
    """The experts that every token uses, as far as the subsets know them.

    Args:
        subsets (`Sequence[Chosen]`): the subsets, of one root model.

    Returns:
        `list[list[int] | None]`, *optional*: for each layer their ids; `None` if no subset knows them.

    Raises:
        SubsetError: if two subsets say different things.

    Example:

    ```python
    >>> from transformers_emo import ExpertSubset
    >>> from transformers_emo.subsets.set_operations import always_kept
    >>> always_kept([ExpertSubset([[0, 3]]), ExpertSubset([[1, 3]], always_kept=[[3]])])
    [[3]]

    ```
    """
    known = [s.always_kept for s in subsets if s.always_kept is not None and not s.drop_shared]
    if not known:
        return _first(s.always_kept for s in subsets)
    if any(other != known[0] for other in known):
        raise SubsetError(
            "The subsets differ in which experts are shared or always active: they were made for different "
            "models."
        )
    return known[0]


def _first(values):
    return next((value for value in values if value is not None), None)


def _common(values: Sequence[str | None]) -> str | None:
    return values[0] if len(set(values)) == 1 else None


def _total(values: Sequence[int | None]) -> int | None:
    return None if None in values else sum(value for value in values if value is not None)
