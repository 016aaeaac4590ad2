"""Rows of a dataset or a JSONL file."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm


def read_column(
    dataset: Iterable[dict] | str | os.PathLike,
    columns: Sequence[str],
    limit: int | None = None,
    *,
    progress: bool = False,
) -> list[list[Any]]:
    """Columns of a dataset or a JSONL file.

    Args:
        dataset (iterable of `dict`, `str` or `os.PathLike`): the rows, such as a `datasets.Dataset`, also a
            streamed one; or a file with a JSON object in each line, by its path or open.
        columns (`Sequence[str]`): the columns to read.
        limit (`int`, *optional*): read at most so many rows.
        progress (`bool`, defaults to `False`): show a progress bar, if reading takes longer than two seconds.

    Returns:
        `list[list[Any]]`: the values of each column.

    Raises:
        ValueError: if a row lacks a column, or a line of the file is no JSON object.
        OSError: if the file cannot be read.

    Example:

    ```python
    >>> from transformers_emo.subsets.choosing.rows import read_column
    >>> read_column([{"text": "a"}, {"text": "b"}], ["text"], limit=1)
    [['a']]

    ```
    """
    rows = tqdm(
        read_rows(dataset, columns, limit), desc="Reading texts", unit="text", delay=2, disable=not progress
    )
    values: list[list[Any]] = [[] for _ in columns]
    for row in rows:
        for column_values, value in zip(values, row, strict=True):
            column_values.append(value)
    return values


def read_rows(
    dataset: Iterable[dict] | str | os.PathLike, columns: Sequence[str], limit: int | None = None
) -> Iterator[list[Any]]:
    """Columns of a dataset or a JSONL file, row by row as they come.

    Args:
        dataset, columns, limit: as for `read_column`.

    Raises:
        ValueError: if a row lacks a column, or a line of the file is no JSON object.
        OSError: if the file cannot be read.

    Example:

    ```python
    >>> from transformers_emo.subsets.choosing.rows import read_rows
    >>> next(read_rows(({"text": str(number)} for number in range(10**12)), ["text"]))
    ['0']

    ```
    """
    rows: Any = dataset
    if isinstance(dataset, io.IOBase):
        rows = _json_objects(dataset, getattr(dataset, "name", "the file"))
    elif isinstance(dataset, str | os.PathLike):
        rows = _json_lines(Path(dataset))
    # A streamed dataset may be slow, and too long to read to its end.
    for number, row in enumerate(islice(rows, limit)):
        lacking = [column for column in columns if not isinstance(row, dict) or column not in row]
        if lacking:
            found = sorted(row) if isinstance(row, dict) else f"a {type(row).__name__}"
            raise ValueError(
                f"Row {number} of the dataset lacks the column {lacking[0]!r}: it has {found}. Name one of "
                "its columns."
            )
        yield [row[column] for column in columns]


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        yield from _json_objects(file, path)


def _json_objects(lines: Iterable[str | bytes], place: Any) -> Iterator[Any]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"Line {number} of {place} is no JSON: {error}. Put one JSON object in each line."
            ) from error
