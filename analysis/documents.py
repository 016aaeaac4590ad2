"""Domains: documents to choose experts from, and others to measure on."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ..checkpoints.hub.names import existing_folder
from ..tokenization.beginnings import encode_beginnings

_SPLITS = ("calibration", "test")


@dataclass(frozen=True)
class Domain:
    """Documents of one kind.

    Args:
        name (`str`): the domain's name.
        calibration (`tuple[str, ...]`): texts to choose experts from.
        test (`tuple[str, ...]`): other texts to measure on.

    Example: see `read_domains`.
    """

    name: str
    calibration: tuple[str, ...]
    test: tuple[str, ...]


def read_domains(
    folder: str | os.PathLike, names: Sequence[str] | None = None, *, max_test: int | None = None
) -> list[Domain]:
    """Read domains from JSON Lines files, one document a line with its text as `text`.

    The files are `calibration/<domain>.jsonl` and `test/<domain>.jsonl`. Or they are `<domain>.jsonl`, and
    each line names its `split`: `"calibration"` or `"test"`. Lines of other splits and empty texts are
    skipped.

    Args:
        folder (`str` or `os.PathLike`): where the files are.
        names (`Sequence[str]`, *optional*): the domains to read, in this order. By default all, sorted by
            name.
        max_test (`int`, *optional*): take only the first so many test documents of each domain.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if there is no such domain, a line is no document, or a domain has no document of a split.

    Example:

    ```python
    >>> from transformers_emo.analysis import read_domains
    >>> python, = read_domains("model_cards/toy-emo/documents", ["python"])
    >>> len(python.calibration), len(python.test)
    (8, 12)

    ```
    """
    if max_test is not None and max_test < 1:
        raise ValueError(f"`max_test` is {max_test}, expected at least 1 test document for each domain.")
    folder = existing_folder(folder)
    splits = [folder / split for split in _SPLITS]
    apart = all(split.is_dir() for split in splits)
    found = sorted({path.stem for place in (splits if apart else [folder]) for path in place.glob("*.jsonl")})
    if not found:
        raise ValueError(
            f"Found no documents in {os.fspath(folder)!r}: expected calibration/<domain>.jsonl and "
            "test/<domain>.jsonl, or <domain>.jsonl with a `split` in every line."
        )
    unknown = [name for name in names or () if name not in found]
    if unknown:
        raise ValueError(f"There is no domain {unknown[0]!r} in {os.fspath(folder)!r}: name one of {found}.")
    domains = []
    for name in names or found:
        documents = {split: _read_split(folder, name, split, apart) for split in _SPLITS}
        for split, texts in documents.items():
            if not texts:
                raise ValueError(
                    f"The domain {name!r} in {os.fspath(folder)!r} has no {split} document: add one, or "
                    "leave the domain out."
                )
        domains.append(Domain(name, documents["calibration"], documents["test"][:max_test]))
    return domains


def _read_split(folder: Path, name: str, split: str, apart: bool) -> tuple[str, ...]:
    path = folder / split / f"{name}.jsonl" if apart else folder / f"{name}.jsonl"
    if not path.is_file():
        return ()
    documents = read_lines(path)
    return tuple(d["text"] for d in documents if d["text"] and (apart or d.get("split") == split))


def read_lines(path: Path, column: str = "text") -> Iterator[dict]:
    """Read a JSON Lines file of documents, line by line. Empty lines are skipped.

    Args:
        path (`Path`): the file.
        column (`str`, defaults to `"text"`): what holds a document's text.

    Raises:
        ValueError: if a line is no object with a text.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from transformers_emo.analysis.documents import read_lines
    >>> next(read_lines(Path("model_cards/toy-emo/documents/python.jsonl")))["split"]
    'calibration'

    ```
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                document = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{os.fspath(path)!r}, line {number} is no JSON: {error}. Correct it."
                ) from error
            if not isinstance(document, dict) or not isinstance(document.get(column), str):
                raise ValueError(f"{os.fspath(path)!r}, line {number}: expected an object with a `{column}`.")
            yield document


def encode_documents(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], window: int
) -> list[torch.Tensor]:
    """Token ids of documents, cut to a window.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        texts (`Sequence[str]`): the documents.
        window (`int`): how many tokens to keep of each document, from its beginning.

    Returns:
        `list[torch.Tensor]`: int64 ids (S,), one tensor for each document.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from transformers_emo.analysis import encode_documents
    >>> tokenizer = AutoTokenizer.from_pretrained("model_cards/toy-emo")
    >>> [len(ids) for ids in encode_documents(tokenizer, ["import os", "import sys, os, json"], window=4)]
    [2, 4]

    ```
    """
    return [torch.tensor(ids, dtype=torch.long) for ids in encode_beginnings(tokenizer, texts, window)]


def draw(documents: Collection, num: int, seed: int, domain: str) -> list:
    """Draw documents of a domain at random, each once at most. They stay in their order.

    Args:
        documents (`Collection`): what to draw from.
        num (`int`): how many to draw. If there are fewer, all are drawn.
        seed (`int`): the seed. Another seed draws other documents.
        domain (`str`): the domain's name. Each domain draws independently of the others.

    Example:

    ```python
    >>> from transformers_emo.analysis import draw
    >>> draw(range(100), 3, seed=0, domain="python") == draw(range(100), 3, seed=0, domain="python")
    True
    >>> draw(range(100), 3, seed=0, domain="python") == draw(range(100), 3, seed=1, domain="python")
    False

    ```
    """
    documents = list(documents)
    picked = random.Random(f"{seed}/{domain}").sample(range(len(documents)), min(num, len(documents)))
    return [documents[index] for index in sorted(picked)]
