"""Calibration text in pieces: only one piece is in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from ..choosing.calibration import CalibrationText
from ..choosing.rows import read_rows


def pieces_of(calibration: CalibrationText, size: int) -> Iterator[CalibrationText]:
    """The text in pieces, read as they are asked for.

    Args:
        calibration (`CalibrationText`): the text. A `dataset` is read row by row.
        size (`int`): texts, or ready batches, in a piece.

    Example:

    ```python
    >>> from transformers_emo.subsets.choosing.calibration import CalibrationText
    >>> from transformers_emo.subsets.collecting.pieces import pieces_of
    >>> rows = ({"text": text} for text in "abcde")
    >>> [piece.texts for piece in pieces_of(CalibrationText(dataset=rows), 2)]
    [['a', 'b'], ['c', 'd'], ['e']]

    ```
    """
    if calibration.input_ids is not None:
        for start in range(0, len(calibration.input_ids), size):
            part = slice(start, start + size)
            masks, labels = calibration.attention_mask, calibration.labels
            yield replace(
                calibration,
                input_ids=calibration.input_ids[part],
                attention_mask=None if masks is None else masks[part],
                labels=None if labels is None else labels[part],
            )
        return
    for rows in _groups(_rows(calibration), size):
        columns = [list(values) for values in zip(*rows, strict=True)]
        answers = columns[1] if len(columns) > 1 else None
        yield replace(
            calibration, texts=columns[0], answers=answers, dataset=None, answer_column=None, max_texts=None
        )


def recognised_by(piece: CalibrationText) -> str:
    """A digest of the text of a piece.

    Args:
        piece (`CalibrationText`): from `pieces_of`.

    Example:

    ```python
    >>> from transformers_emo.subsets.choosing.calibration import CalibrationText
    >>> from transformers_emo.subsets.collecting.pieces import recognised_by
    >>> recognised_by(CalibrationText(["a"])) == recognised_by(CalibrationText(["b"]))
    False

    ```
    """
    digest = hashlib.sha256()
    add_to_digest(digest, piece)
    return digest.hexdigest()[:32]


def add_to_digest(digest: Any, piece: CalibrationText) -> None:
    """Add the text of a piece to a digest, which is the same for pieces of any size.

    Args:
        digest: of `hashlib`.
        piece (`CalibrationText`): from `pieces_of`.

    Example: see `recognised_by`.
    """
    contents: list[bytes]
    if piece.input_ids is not None:
        columns = [getattr(piece, name) for name in ("input_ids", "attention_mask", "labels")]
        contents = [
            f"{tuple(tensor.shape)}".encode() + tensor.long().contiguous().numpy().tobytes()
            for tensors in zip(*(column for column in columns if column is not None), strict=True)
            for tensor in tensors
        ]
    else:
        rows: Any = zip(
            *(column for column in (piece.texts, piece.answers) if column is not None), strict=True
        )
        contents = [repr(row).encode("utf-8", "surrogatepass") for row in rows]
    for content in contents:
        digest.update(len(content).to_bytes(8, "little") + content)


def _rows(calibration: CalibrationText) -> Iterator[list[Any]]:
    if calibration.dataset is not None:
        columns = [calibration.column]
        columns += [] if calibration.answer_column is None else [calibration.answer_column]
        yield from read_rows(calibration.dataset, columns, calibration.max_texts)
        return
    texts, answers = calibration.texts or (), calibration.answers
    for number, text in enumerate(texts):
        yield [text] if answers is None else [text, list(answers)[number]]


def _groups(rows: Iterator[list[Any]], size: int) -> Iterator[list[list[Any]]]:
    while group := list(islice(rows, size)):
        yield group
