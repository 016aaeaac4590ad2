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

from . import set_operations
from .expert_subset import ExpertSubset
from .ranking import jaccard
from .set_operations import always_kept, check_comparable, combined
from .validation import SubsetError


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
    return ExpertSubset(**set_operations.union(subsets))


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
    return ExpertSubset(**set_operations.intersection(subsets))


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
    return ExpertSubset(**set_operations.difference(first, second))


def mix(
    subsets: Sequence[ExpertSubset], num_experts: int, weights: Sequence[float] | None = None
) -> ExpertSubset:
    """A choice by the weighted mean of several subsets' scores, over all experts that were scored.

    Each method has its own scale of scores. So in each layer a subset's scores are divided by their sum over
    the experts that compete: every subset has one vote, of its weight, and spreads it. An expert without a
    score in a subset gets nothing from it.

    Args:
        subsets (`Sequence[ExpertSubset]`): subsets with scores, of one root model.
        num_experts (`int`): experts to keep in each layer, shared ones included.
        weights (`Sequence[float]`, *optional*): one a subset, not negative; equal by default.

    Returns:
        `ExpertSubset`: with the mean as its scores, so that `top` can choose again.

    Raises:
        SubsetError: if they are of different models or have no scores, the weights do not fit, or a layer has
            too few experts.

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
    check_comparable(subsets)
    weights = [1.0] * len(subsets) if weights is None else list(weights)
    good = all(isinstance(weight, Real) and math.isfinite(weight) and weight >= 0 for weight in weights)
    if len(weights) != len(subsets) or not good or not sum(weights):
        raise SubsetError(
            f"The weights are {weights}, expected {len(subsets)} finite numbers from 0, not all of them 0."
        )
    lacking = [number for number, subset in enumerate(subsets) if subset.scores is None]
    always = always_kept(subsets)
    if lacking or always is None:
        raise SubsetError(
            f"Subset {lacking[0] if lacking else 0} has no scores to mix: choose it with `select_experts`."
        )
    mixed = combined(subsets, subsets[0].experts, "mix", weights=weights)
    return ExpertSubset(**mixed).top(num_experts)


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
    check_comparable(list(named.values()))
    always = always_kept(list(named.values())) or [None] * len(next(iter(named.values())).experts)
    chosen = [
        [
            None if ids is None else [e for e in ids if e not in (stay or ())]
            for ids, stay in zip(subset.experts, always, strict=True)
        ]
        for subset in named.values()
    ]
    return SubsetOverlap(list(named), [[jaccard(a, b) for b in chosen] for a in chosen])
