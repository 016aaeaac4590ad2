"""Documents with their domains, from a folder, a JSONL file or a dataset, one after the other."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..documents import read_domains, read_lines

SPLITS = ("calibration", "test")


@dataclass(frozen=True)
class Document:
    """One document.

    Args:
        text (`str`): its text.
        domain (`str`): the name of its domain.
        split (`str`, defaults to `"test"`): `"calibration"` for a document that experts are chosen from,
            `"test"` for one that they are measured on.

    Example: see `documents_of`.
    """

    text: str
    domain: str
    split: str = "test"


def documents_of(
    source: str | os.PathLike | Iterable[Mapping[str, Any]],
    *,
    text: str = "text",
    domain: str = "domain",
    split: str = "split",
    limit: int | None = None,
) -> Iterator[Document]:
    """Read documents one after the other. A stream is never held as a whole.

    Args:
        source (`str`, `os.PathLike` or iterable of mappings): a folder as `read_domains` reads it; a JSONL
            file; or rows, such as a `datasets.Dataset`, also a streamed one.
        text (`str`, defaults to `"text"`): the column of texts.
        domain (`str`, defaults to `"domain"`): the column of the domains' names.
        split (`str`, defaults to `"split"`): the column that says `"calibration"` or `"test"`. Documents of
            other splits are skipped. Without such a column every second document of a domain is for
            calibration, beginning with the first.
        limit (`int`, *optional*): read at most so many documents.

    Raises:
        ValueError: if a row lacks its text or domain, or a line is no JSON object.
        FileNotFoundError: if there is no such file or folder.

    Example:

    ```python
    >>> from transformers_emo.analysis.routing import documents_of
    >>> rows = [{"text": "import os", "domain": "python"}, {"text": "SELECT 1", "domain": "sql"}]
    >>> [(document.domain, document.split) for document in documents_of(rows)]
    [('python', 'calibration'), ('sql', 'calibration')]

    ```
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` is {limit}, expected at least 1 document.")
    found = _found(source, text, domain, split)
    for number, document in enumerate(found):
        if number == limit:
            return
        yield document


def _found(source: Any, text: str, domain: str, split: str) -> Iterator[Document]:
    if isinstance(source, str | os.PathLike):
        if not os.path.isfile(source):
            for one in read_domains(source):
                for name, texts in zip(SPLITS, (one.calibration, one.test), strict=True):
                    yield from (Document(content, one.name, name) for content in texts)
            return
        source = read_lines(Path(source), text)
    seen: Counter[str] = Counter()
    for number, row in enumerate(source):
        for column in (text, domain):
            value = row.get(column) if isinstance(row, Mapping) else None
            if not isinstance(value, str):
                has = sorted(map(str, row)) if isinstance(row, Mapping) else f"a {type(row).__name__}"
                raise ValueError(
                    f"Row {number} has no text in the column {column!r}: it has {has}. Name the column of "
                    "texts and that of domains."
                )
        if not row[text]:
            continue
        said = row.get(split)
        if said is None:
            said = SPLITS[seen[row[domain]] % 2]
            seen[row[domain]] += 1
        if said in SPLITS:
            yield Document(row[text], row[domain], said)
