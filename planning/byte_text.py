"""Numbers of bytes and rows of a table as text for people."""

from __future__ import annotations

from collections.abc import Sequence

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def bytes_text(size: float) -> str:
    """A number of bytes with a unit, three digits of it.

    Args:
        size (`float`): the bytes.

    Example:

    ```python
    >>> from transformers_emo.planning.byte_text import bytes_text
    >>> bytes_text(27_063_000_000), bytes_text(15_364_640), bytes_text(512)
    ('27.1 GB', '15.4 MB', '512 B')

    ```
    """
    for unit, name in _UNITS:
        if size >= 0.9995 * unit:
            digits = 2 if size < 9.995 * unit else 1 if size < 99.95 * unit else 0
            return f"{size / unit:.{digits}f} {name}"
    return f"{size:.0f} B"


def columns(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Rows as aligned columns.

    Args:
        rows (`Sequence[Sequence[str]]`): the cells, all rows equally long; the first row is the heading.
        left (`int`, defaults to 1): so many columns begin at the left, the others end at the right.

    Example:

    ```python
    >>> from transformers_emo.planning.byte_text import columns
    >>> print(columns([["experts", "memory"], ["16", "5.87 MB"]]))
      experts   memory
      16       5.87 MB

    ```
    """
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return "\n".join(
        "  "
        + "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
