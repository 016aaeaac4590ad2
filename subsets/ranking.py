"""From the scores of experts to those that are kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def best_experts(scores: Sequence[float | None], always_kept: Iterable[int], num_experts: int) -> list[int]:
    """The experts of a layer with the largest scores; ties go to the smaller id.

    Args:
        scores (`Sequence[float | None]`): the score of each expert, `None` for one that cannot be chosen.
        always_kept (`Iterable[int]`): experts to keep whatever their score.
        num_experts (`int`): how many to keep, those included.

    Returns:
        `list[int]`: their ids, sorted.

    Example:

    ```python
    >>> from transformers_emo.subsets.ranking import best_experts
    >>> best_experts([0.3, 0.1, 0.3, 0.2, None], [1], 2)
    [0, 1]

    ```
    """
    always = set(always_kept)
    ranked = _ranked(scores, always)
    return sorted([*always, *(expert for _, expert in ranked[: max(num_experts - len(always), 0)])])


def sizes_by_mass(
    scores: Sequence[Sequence[float | None] | None],
    always_kept: Sequence[Iterable[int] | None],
    num_experts: int,
    least: int = 1,
) -> list[int]:
    """How many experts each layer keeps when layers share one budget.

    The scores of a layer, divided by their sum, are its experts' shares; the largest shares of all layers are
    kept. Ties go to the earlier layer.

    Args:
        scores (`Sequence[Sequence[float | None] | None]`): for each layer the scores, `None` for a dense one.
        always_kept (`Sequence[Iterable[int] | None]`): for each layer the experts to keep in any case.
        num_experts (`int`): the mean number of experts to keep in a layer, those included.
        least (`int`, defaults to 1): how many others every layer keeps at the least.

    Returns:
        `list[int]`: the number of each layer, 0 for a dense one.

    Example:

    ```python
    >>> from transformers_emo.subsets.ranking import sizes_by_mass
    >>> sizes_by_mass([[0.97, 0.01, 0.01, 0.01], None, [0.3, 0.3, 0.2, 0.2]], [[], None, []], 2)
    [1, 0, 3]

    ```
    """
    sizes = [0] * len(scores)
    shares: list[tuple[float, int]] = []
    left = 0
    for layer, layer_scores in enumerate(scores):
        if layer_scores is None:
            continue
        always = set(always_kept[layer] or ())
        ranked = _ranked(layer_scores, always)
        total = -sum(negative for negative, _ in ranked) or 1.0
        sizes[layer] = len(always) + min(least, len(ranked))
        left += num_experts - sizes[layer]
        shares += [(negative / total, layer) for negative, _ in ranked[least:]]
    for _, layer in sorted(shares)[: max(left, 0)]:
        sizes[layer] += 1
    return sizes


def jaccard(first: Sequence[Iterable[int] | None], second: Sequence[Iterable[int] | None]) -> float:
    """How far two choices agree: experts in both, divided by experts in either; the mean over layers.

    Args:
        first (`Sequence[Iterable[int] | None]`): for each layer the ids, `None` for a dense one.
        second (`Sequence[Iterable[int] | None]`): the other choice.

    Example:

    ```python
    >>> from transformers_emo.subsets.ranking import jaccard
    >>> jaccard([[0, 1], None, [2, 3]], [[0, 1], None, [3, 4]])
    0.6666666666666666

    ```
    """
    values = []
    for a, b in zip(first, second, strict=True):
        if a is not None and b is not None:
            union = {*a, *b}
            values.append(len(set(a) & set(b)) / len(union) if union else 1.0)
    return sum(values) / len(values) if values else 1.0


def _ranked(scores: Sequence[float | None], always: set[int]) -> list[tuple[float, int]]:
    """The experts to choose from, best first, each as its negative score and its id."""
    return sorted(
        (-score, expert) for expert, score in enumerate(scores) if score is not None and expert not in always
    )
