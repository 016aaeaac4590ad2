"""New subsets from old ones: set operations, a mix by score, and how alike subsets are.

All work on subsets in the numbering of one root model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

from transformers.utils import logging

from .expert_subset import ExpertSubset, SubsetError
from .fingerprint import are_apart
from .ranking import jaccard

logger = logging.get_logger(__name__)

_Scores = list[list[float | None] | None]


@dataclass(frozen=True)
class SubsetOverlap:
    """How alike subsets are, each two of them.

    Args:
        names (`list[str]`): their names.
        jaccard_NN (`list[list[float]]`): for each two, the experts in both over those in either, mean over
            layers; 1 on the diagonal.

    Example: see `subset_overlap`.
    """

    names: list[str]
    jaccard_NN: list[list[float]]

    @property
    def mean(self) -> float:
        """Mean over pairs of different subsets."""
        number = len(self.names)
        return (sum(map(sum, self.jaccard_NN)) - number) / (number * (number - 1))


def union(*subsets: ExpertSubset) -> ExpertSubset:
    """The experts that are in any of the subsets; also `first | second`.

    If all have scores, the union has them too (see `mix`), for its own experts: `(code | math).top(32)` is a
    choice among them.

    Args:
        subsets (`ExpertSubset`): one or more, of one root model.

    Raises:
        SubsetError: if they are of different models.

    Example:

    ```python
    >>> from transformers_emo import ExpertSubset
    >>> (ExpertSubset([[0, 1, 31]]) | ExpertSubset([[1, 5, 31]])).experts
    [[0, 1, 5, 31]]

    ```
    """
    _check_comparable(subsets)
    experts = [
        None if layer[0] is None else sorted({e for ids in layer for e in ids})
        for layer in zip(*(subset.experts for subset in subsets), strict=True)
    ]
    return _combined(subsets, experts, "union")


def intersection(*subsets: ExpertSubset) -> ExpertSubset:
    """The experts that are in all of the subsets; also `first & second`.

    A layer may be left with nothing but its shared experts: no model can be loaded with that.

    Args:
        subsets (`ExpertSubset`): one or more, of one root model.

    Raises:
        SubsetError: if they are of different models.

    Example:

    ```python
    >>> from transformers_emo import ExpertSubset
    >>> (ExpertSubset([[0, 1, 31]]) & ExpertSubset([[1, 5, 31]])).experts
    [[1, 31]]

    ```
    """
    _check_comparable(subsets)
    experts = [
        None if layer[0] is None else sorted(set(layer[0]).intersection(*layer[1:]))
        for layer in zip(*(subset.experts for subset in subsets), strict=True)
    ]
    return _combined(subsets, experts, "intersection")


def difference(first: ExpertSubset, second: ExpertSubset) -> ExpertSubset:
    """The experts of the first subset that are not in the second; also `first - second`.

    Shared and always-active experts stay, as every token uses them. A layer may be left with nothing else: no
    model can be loaded with that.

    Args:
        first (`ExpertSubset`): what to take from. It must know its shared experts, unless none are to stay
            (`drop_shared`): subsets from `select_experts` or `ExpertSubset.for_model` do.
        second (`ExpertSubset`): what to take away.

    Raises:
        SubsetError: if they are of different models, or `first` does not know its shared experts.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig, ExpertSubset
    >>> config = EmoConfig(num_hidden_layers=1, num_experts=32)
    >>> (ExpertSubset([[0, 1, 31]]).for_model(config) - ExpertSubset([[1, 5, 31]])).experts
    [[0, 31]]

    ```
    """
    subsets = (first, second)
    _check_comparable(subsets)
    always = _always_kept(subsets)
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
    return _combined(subsets, experts, "difference", scored=[first])


def mix(
    subsets: Sequence[ExpertSubset], num_experts: int, weights: Sequence[float] | None = None
) -> ExpertSubset:
    """A choice by the weighted mean of several subsets' scores, over all experts that were scored.

    Methods score on scales of their own: in each layer a subset's scores are divided by their sum over the
    experts that compete, so that every subset has one vote to spread, of its weight. An expert that a subset
    has no score for gets nothing from it.

    Args:
        subsets (`Sequence[ExpertSubset]`): subsets with scores, of one root model.
        num_experts (`int`): experts to keep in each layer, shared ones included.
        weights (`Sequence[float]`, *optional*): one a subset, not negative; equal by default.

    Returns:
        `ExpertSubset`: with the mean as its scores, so that `top` can choose again.

    Raises:
        SubsetError: if they are of different models or have no scores, the weights do not fit, or a layer has
            not so many experts.

    Example:

    ```python
    >>> from transformers_emo import ExpertSubset, mix
    >>> code = ExpertSubset([[0, 3]], scores=[[0.8, 0.1, 0.1, 1.0]], always_kept=[[3]])
    >>> math = ExpertSubset([[1, 3]], scores=[[0.0, 0.6, 0.4, 1.0]], always_kept=[[3]])
    >>> mix([code, math], 2, weights=[1, 3]).experts
    [[1, 3]]

    ```
    """
    subsets = list(subsets)
    _check_comparable(subsets)
    weights = [1.0] * len(subsets) if weights is None else list(weights)
    good = all(isinstance(weight, Real) and math.isfinite(weight) and weight >= 0 for weight in weights)
    if len(weights) != len(subsets) or not good or not sum(weights):
        raise SubsetError(
            f"The weights are {weights}, expected {len(subsets)} finite numbers from 0, not all of them 0."
        )
    lacking = [number for number, subset in enumerate(subsets) if subset.scores is None]
    always = _always_kept(subsets)
    if lacking or always is None:
        raise SubsetError(
            f"Subset {lacking[0] if lacking else 0} has no scores to mix: choose it with `select_experts`."
        )
    mixed = _combined(subsets, subsets[0].experts, "mix", weights=weights)
    return mixed.top(num_experts)


def read_subsets(folder: str | os.PathLike) -> dict[str, ExpertSubset]:
    """All subsets of a folder, by name.

    Args:
        folder (`str` or `os.PathLike`): holds `<name>.json` files, such as `subsets/` of a model.

    Raises:
        SubsetError: if there are none, or a file holds no subset.

    Example:

    ```python
    >>> from transformers_emo import ExpertSubset
    >>> from transformers_emo.subsets import read_subsets
    >>> ExpertSubset([[0, 31]]).save(tmp_path / "math.json")
    >>> list(read_subsets(tmp_path))
    ['math']

    ```
    """
    subsets = {path.stem: ExpertSubset.load(path) for path in sorted(Path(folder).glob("*.json"))}
    if not subsets:
        raise SubsetError(f"There are no expert subsets in {os.fspath(folder)!r}: expected .json files.")
    return subsets


def subset_overlap(subsets: str | os.PathLike | Mapping[str, ExpertSubset]) -> SubsetOverlap:
    """How alike subsets are: the Jaccard index of each two, mean over layers.

    Shared experts, which every subset keeps, are left out where the subsets know them.

    Args:
        subsets (`str`, `os.PathLike` or `Mapping[str, ExpertSubset]`): a folder of subsets, or subsets by
            name; two or more, of one root model.

    Raises:
        SubsetError: if there are fewer than two, or they are of different models.

    Example:

    ```python
    >>> from transformers_emo import ExpertSubset, subset_overlap
    >>> subset_overlap({"code": ExpertSubset([[0, 1]]), "math": ExpertSubset([[1, 2]])}).jaccard_NN
    [[1.0, 0.3333333333333333], [0.3333333333333333, 1.0]]

    ```
    """
    named = subsets if isinstance(subsets, Mapping) else read_subsets(subsets)
    if len(named) < 2:
        raise SubsetError(f"Subsets are compared with each other: expected at least 2, got {list(named)}.")
    _check_comparable(list(named.values()))
    always = _always_kept(list(named.values())) or [None] * len(next(iter(named.values())).experts)
    chosen = [
        [
            None if ids is None else [e for e in ids if e not in (stay or ())]
            for ids, stay in zip(subset.experts, always, strict=True)
        ]
        for subset in named.values()
    ]
    return SubsetOverlap(list(named), [[jaccard(a, b) for b in chosen] for a in chosen])


def _check_comparable(subsets: Sequence[ExpertSubset]) -> None:
    """See that ids mean the same in all of the subsets, as far as they tell."""
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


def _combined(
    subsets: Sequence[ExpertSubset],
    experts: list[list[int] | None],
    method: str,
    *,
    scored: Sequence[ExpertSubset] | None = None,
    weights: Sequence[float] | None = None,
) -> ExpertSubset:
    """The result of an operation: `experts`, what is common to the subsets, and scores from those `scored`.

    Without `weights` only the experts of the result have scores.
    """
    scored = subsets if scored is None else scored
    always = _always_kept(subsets)
    scores: _Scores | None = None
    if always is not None and all(subset.scores is not None for subset in scored):
        scores = _mean_scores(scored, weights or [1.0] * len(scored), always)
        if weights is None:
            scores = [
                None if layer is None else [s if e in (ids or ()) else None for e, s in enumerate(layer)]
                for layer, ids in zip(scores, experts, strict=True)
            ]
    return ExpertSubset(
        experts,
        scores=scores,
        always_kept=always,
        root_experts_per_layer=_first(s.root_experts_per_layer for s in subsets),
        method=method,
        num_tokens=_total([s.num_tokens for s in subsets]),
        num_texts=_total([s.num_texts for s in subsets]),
        source=_common([s.source for s in subsets]),
        revision=_common([s.revision for s in subsets]),
        fingerprint=_first(s.fingerprint for s in subsets),
        drop_shared=any(s.drop_shared for s in subsets),
    )


def _mean_scores(
    subsets: Sequence[ExpertSubset], weights: Sequence[float], always: Sequence[list[int] | None]
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


def _always_kept(subsets: Sequence[ExpertSubset]) -> list[list[int] | None] | None:
    """What the subsets that know it say, which for one model is the same."""
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
