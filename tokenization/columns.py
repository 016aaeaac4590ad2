"""What packing and encoding have in common: checks of sizes and columns, and documents that end in EOS.

Shape suffixes: T tokens, D documents.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from ..imports.optional_packages import import_optional
from .tokenization_emo import EmoTokenizer

WINDOW = 4096
"""Tokens of a window, by default: what EMO was trained with."""

_LARGEST_ID = np.iinfo(np.int32).max  # datasets keep ids as int32


def import_datasets() -> Any:
    """The package `datasets`. Only what reads a dataset needs it, so it is imported when it is asked for.

    Returns:
        `ModuleType`: the package.

    Raises:
        ImportError: if it is not installed.

    Example:

    ```python
    >>> from transformers_emo.tokenization.columns import import_datasets
    >>> import_datasets().__name__
    'datasets'

    ```
    """
    return import_optional("datasets", "Reading a dataset needs")


def check_at_least_one(**sizes: int) -> None:
    """Refuse arguments that are smaller than 1.

    Args:
        sizes (`int`): the values, by the names of the arguments.

    Raises:
        ValueError: if one of them is smaller than 1.

    Example:

    ```python
    >>> from transformers_emo.tokenization.columns import check_at_least_one
    >>> check_at_least_one(window=4096, batch_size=1)

    ```
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"`{name}` is {size}, expected at least 1: give a larger number.")


def check_column(column: str, names: Collection[str], argument: str = "column") -> None:
    """Refuse a column that a dataset does not have.

    Args:
        column (`str`): the column that was asked for.
        names (`Collection[str]`): the columns that the dataset has.
        argument (`str`, defaults to `"column"`): the argument that names the column, for the error.

    Raises:
        ValueError: if the column is none of the names.

    Example:

    ```python
    >>> from transformers_emo.tokenization.columns import check_column
    >>> check_column("text", ["id", "text"])

    ```
    """
    if column not in names:
        raise ValueError(
            f"The dataset has no column {column!r}, only {sorted(names)}: name the right one as `{argument}`."
        )


def eos_id(tokenizer: EmoTokenizer | None, eos_token_id: int | None = None) -> int:
    """The id of the EOS token that ends a document.

    Args:
        tokenizer (`EmoTokenizer`, *optional*): a tokenizer; its EOS token counts.
        eos_token_id (`int`, *optional*): the id, where there is no tokenizer.

    Returns:
        `int`: the id.

    Raises:
        ValueError: if the tokenizer has no EOS token.

    Example:

    ```python
    >>> from transformers_emo import EmoTokenizer
    >>> from transformers_emo.tokenization.columns import eos_id
    >>> eos_id(EmoTokenizer.from_pretrained("model_cards/toy-emo")), eos_id(None, 9)
    (0, 9)

    ```
    """
    eos = eos_token_id if tokenizer is None else tokenizer.eos_token_id
    if eos is None:
        raise ValueError("The tokenizer has no EOS token to end documents with: set `tokenizer.eos_token`.")
    return eos


def end_documents(documents: Iterable[Sequence[int]], eos_token_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Join documents, so that each of them ends in exactly one EOS.

    Args:
        documents (`Iterable[Sequence[int]]`): the ids of each document: lists or integer arrays.
        eos_token_id (`int`): the EOS token.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: the ids of all documents, (T,) int64, and the length of each
        document with its EOS, (D,) int64.

    Raises:
        ValueError: if a document is not a list of ids from 0 to 2**31 - 1.

    Example:

    ```python
    >>> from transformers_emo.tokenization.columns import end_documents
    >>> ids, lengths = end_documents([[5, 6], [7, 9, 9], []], eos_token_id=9)
    >>> ids.tolist(), lengths.tolist()
    ([5, 6, 9, 7, 9, 9], [3, 2, 1])

    ```
    """
    arrays = [_as_ids(document, index) for index, document in enumerate(documents)]
    lengths_D = np.array([len(array) for array in arrays], dtype=np.int64)
    ids_T = np.concatenate([np.empty(0, dtype=np.int64), *arrays])
    if len(ids_T) and (ids_T.min() < 0 or ids_T.max() > _LARGEST_ID):
        raise ValueError(
            f"Documents of the batch hold ids from {ids_T.min()} to {ids_T.max()}: expected 0 to "
            f"{_LARGEST_ID}. Name a column of token ids, or give a `tokenizer` for a column of texts."
        )
    ends_D = lengths_D.cumsum()
    begins_D = ends_D - lengths_D
    # For each place: one after the last token so far that is no EOS, or 0 if there is none.
    place_T = np.arange(1, len(ids_T) + 1)
    last_T = np.maximum.accumulate(np.where(ids_T != eos_token_id, place_T, 0))
    kept_D = np.maximum(np.concatenate([[0], last_T])[ends_D], begins_D)
    is_kept_T = place_T <= np.repeat(kept_D, lengths_D)

    lengths_D = kept_D - begins_D + 1
    ends_D = lengths_D.cumsum()
    is_text = np.ones(lengths_D.sum(), dtype=bool)
    is_text[ends_D - 1] = False
    ended_T = np.full(len(is_text), eos_token_id, dtype=np.int64)
    ended_T[is_text] = ids_T[is_kept_T]
    return ended_T, lengths_D


def _as_ids(document: Sequence[int], index: int) -> np.ndarray:
    array = np.asarray(document)
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
        raise ValueError(
            f"Document {index} of the batch is a {type(document).__name__} of shape {array.shape} and type "
            f"{array.dtype}: expected a list of ids. Texts need a `tokenizer`."
        )
    return array.astype(np.int64)
