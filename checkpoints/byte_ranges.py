"""Sets of byte ranges of a file: joining, subtracting and splitting them."""

from __future__ import annotations

from collections.abc import Iterable

Range = tuple[int, int]  # first byte and end, as in slices


def merge_ranges(ranges: Iterable[Range], *, gap: int = 0) -> list[Range]:
    """The same bytes in as few ranges as possible, sorted.

    Args:
        ranges (`Iterable[tuple[int, int]]`): ranges `(start, end)`, in any order, perhaps overlapping.
        gap (`int`, defaults to 0): also merge ranges that are at most so many bytes apart. The result then
            has the bytes between them too.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.byte_ranges import merge_ranges
    >>> merge_ranges([(10, 20), (0, 5), (5, 8)]), merge_ranges([(0, 5), (8, 9)], gap=3)
    ([(0, 8), (10, 20)], [(0, 9)])

    ```
    """
    merged: list[Range] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1] + gap:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def bridge_gaps(ranges: list[Range], *, gap: int, budget: int) -> list[Range]:
    """Fill the smallest gaps between ranges, so that fewer requests are needed.

    Args:
        ranges (`list[tuple[int, int]]`): sorted ranges that do not touch, from `merge_ranges`.
        gap (`int`): the most bytes in a gap that is filled.
        budget (`int`): the most bytes that are filled in all.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.byte_ranges import bridge_gaps
    >>> bridge_gaps([(0, 10), (12, 20), (21, 30), (35, 40)], gap=4, budget=2)
    [(0, 10), (12, 30), (35, 40)]

    ```
    """
    gaps = sorted(
        (after[0] - before[1], before[1]) for before, after in zip(ranges, ranges[1:], strict=False)
    )
    filled: list[Range] = []
    for length, start in gaps:
        if length > gap or length > budget:
            break
        budget -= length
        filled.append((start, start + length))
    return merge_ranges([*ranges, *filled])


def subtract_ranges(ranges: Iterable[Range], present: list[Range]) -> list[Range]:
    """The bytes of some ranges that are not in others.

    Args:
        ranges (`Iterable[tuple[int, int]]`): ranges `(start, end)`.
        present (`list[tuple[int, int]]`): sorted ranges that do not touch, from `merge_ranges`.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.byte_ranges import subtract_ranges
    >>> subtract_ranges([(0, 10), (20, 30)], [(4, 6), (8, 25)])
    [(0, 4), (6, 8), (25, 30)]

    ```
    """
    missing: list[Range] = []
    number = 0
    for start, end in merge_ranges(ranges):
        while number < len(present) and present[number][1] <= start:
            number += 1
        for low, high in present[number:]:
            if low >= end:
                break
            if low > start:
                missing.append((start, low))
            start = max(start, high)
        if start < end:
            missing.append((start, end))
    return missing


def split_ranges(ranges: Iterable[Range], size: int) -> list[Range]:
    """The same ranges in pieces of at most `size` bytes.

    Args:
        ranges (`Iterable[tuple[int, int]]`): ranges `(start, end)`.
        size (`int`): the most bytes in a piece.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.byte_ranges import split_ranges
    >>> split_ranges([(0, 5), (10, 12)], 3)
    [(0, 3), (3, 5), (10, 12)]

    ```
    """
    return [(at, min(at + size, end)) for start, end in ranges for at in range(start, end, size)]


def total_length(ranges: Iterable[Range]) -> int:
    """The number of bytes in ranges that do not overlap.

    Args:
        ranges (`Iterable[tuple[int, int]]`): ranges `(start, end)`.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.byte_ranges import total_length
    >>> total_length([(0, 5), (10, 12)])
    7

    ```
    """
    return sum(end - start for start, end in ranges)
