"""Documents of a Hub dataset, or of files that `datasets` reads, as a stream."""

import re
from collections import defaultdict
from typing import Any

from tqdm import tqdm

from .build import Document


def read_dataset(
    path: str,
    *,
    name: str | None = None,
    split: str = "train",
    data_files: list[str] | None = None,
    text_column: str = "text",
    domain_column: str | None = None,
    limit_mb: float = 500.0,
    licence: str = "see the dataset's card",
) -> dict[str, list[Document]]:
    """Stream a dataset's first documents, by domain.

    Args:
        path: dataset on the Hub, a local folder, or a format such as `json` with `data_files`.
        name: configuration of the dataset.
        split: its split to read; this corpus makes its own splits of it.
        data_files: which files, as patterns; `DOMAIN=PATTERN` reads those files as that domain.
        text_column, domain_column: columns; dots lead into structures (`metadata.source`). Without a domain
            column
            all documents are of the domain `text`.
        limit_mb: how much text is read, in units of 10^6 bytes: of each domain that `data_files` names,
            or in all.
        licence: noted with every document.

    Raises:
        ValueError: if a column is missing, naming those there are, or if there is no text.
    """
    from datasets import load_dataset

    parts: dict[str | None, list[str]] = defaultdict(list)
    for file in data_files or []:
        domain, _, pattern = file.rpartition("=")
        parts[domain or None].append(pattern)
    found: dict[str, list[Document]] = defaultdict(list)
    for part, patterns in (parts or {None: []}).items():
        options: dict[str, Any] = {"data_files": patterns} if patterns else {}
        rows = load_dataset(path, name, split=split, streaming=True, **options)
        size = 0.0
        with tqdm(total=round(limit_mb), desc=f"reading {part or path}", unit="MB") as bar:
            for number, row in enumerate(rows):
                text = _column(row, text_column)
                domain = part or (_column(row, domain_column) if domain_column else "text")
                if not isinstance(text, str):
                    raise ValueError(
                        f"Column {text_column!r} of row {number} is {text!r:.80}, not text: name another one."
                    )
                source = "/".join(filter(None, [path, part, str(number)]))
                found[_file_name(domain)].append(Document(text, source, licence))
                size += len(text.encode()) / 1e6
                bar.update(int(size) - bar.n)
                if size >= limit_mb:
                    break
    if not found:
        raise ValueError(f"Dataset {path!r} ({name=}, {split=}) has no rows.")
    return dict(sorted(found.items()))


def _column(row: dict, column: str):
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, dict) or part not in value:
            there = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"The dataset has no column {column!r}: of {part!r} it has only {there}.")
        value = value[part]
    return value


def _file_name(domain: Any) -> str:
    return re.sub(r"[^\w.-]+", "_", str(domain)).strip("._") or "text"
