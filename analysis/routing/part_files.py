"""The parquet files of one part of the documents.

`documents-00003.parquet` has one row for each document and layer, `tokens-00003.parquet` one row for each
token that is kept by itself. The tokens are written first: a part is done when its documents are there.

Shape suffixes: as in `recorder`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...checkpoints.writing.durable_files import write_whole
from ...imports.optional_packages import require
from .recorder import LayerRecorder
from .tokens import TokenisedDocument

_TEXTS = b"emo-texts"  # in the file's metadata: what the part's documents are recognised by


def require_parquet() -> None:
    """See that parquet files can be written and read.

    Raises:
        ImportError: if pyarrow is not installed.

    Example:

    ```python
    >>> from transformers_emo.analysis.routing.part_files import require_parquet
    >>> require_parquet()

    ```
    """
    require("Router statistics need", "pyarrow")


def documents_file(folder: str | os.PathLike, part: int) -> Path:
    """The file of a part's documents.

    Args:
        folder (`str` or `os.PathLike`): where the parts are.
        part (`int`): its number.

    Example:

    ```python
    >>> from transformers_emo.analysis.routing.part_files import documents_file
    >>> documents_file("out", 3).name
    'documents-00003.parquet'

    ```
    """
    return Path(folder) / f"documents-{part:05d}.parquet"


def tokens_file(folder: str | os.PathLike, part: int) -> Path:
    """The file of a part's tokens.

    Args:
        folder (`str` or `os.PathLike`): where the parts are.
        part (`int`): its number.

    Example: see `documents_file`.
    """
    return Path(folder) / f"tokens-{part:05d}.parquet"


def write_part(
    folder: str | os.PathLike,
    part: int,
    texts: str,
    documents: Sequence[TokenisedDocument],
    recorders: Mapping[int, LayerRecorder],
) -> None:
    """Write a part's files. Each appears under its name only when it is whole.

    Args:
        folder (`str` or `os.PathLike`): where the parts are.
        part (`int`): its number.
        texts (`str`): what the documents are recognised by.
        documents (`Sequence[TokenisedDocument]`): the documents.
        recorders (`Mapping[int, LayerRecorder]`): what was written down, by layer.

    Example: see `router_statistics`.
    """
    _write(tokens_file(folder, part), _tokens_table(documents, recorders), texts)
    _write(documents_file(folder, part), _documents_table(documents, recorders), texts)


def texts_of_part(folder: str | os.PathLike, part: int) -> str | None:
    """What the documents of a part are recognised by; `None` if the part is not done.

    Args:
        folder (`str` or `os.PathLike`): where the parts are.
        part (`int`): its number.

    Example:

    ```python
    >>> from transformers_emo.analysis.routing.part_files import texts_of_part
    >>> texts_of_part(tmp_path, 0) is None
    True

    ```
    """
    import pyarrow.parquet as pq

    path = documents_file(folder, part)
    if not path.is_file():
        return None
    return (pq.read_schema(path).metadata or {}).get(_TEXTS, b"").decode()


def _write(path: Path, table: Any, texts: str) -> None:
    import pyarrow.parquet as pq

    content = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({_TEXTS: texts}), content, compression="zstd")
    write_whole(path, content.getvalue())


def _documents_table(documents: Sequence[TokenisedDocument], recorders: Mapping[int, LayerRecorder]) -> Any:
    import pyarrow as pa

    tables = []
    for layer, recorder in recorders.items():
        number = len(documents)
        tables.append(
            pa.table(
                {
                    "document": pa.array([one.index for one in documents], pa.int64()),
                    "domain": pa.array([one.document.domain for one in documents], pa.string()),
                    "split": pa.array([one.document.split for one in documents], pa.string()),
                    "layer": pa.array(np.full(number, layer), pa.int32()),
                    "tokens": pa.array([len(one.ids) for one in documents], pa.int64()),
                    "entropy": pa.array(recorder.entropy_N.numpy()),
                    "probability": _lists(recorder.probability_NR.numpy()),
                    "picks": _lists(recorder.picks_NR.numpy()),
                    "prefix_probability": _lists(recorder.prefix_NPR.flatten(1).float().numpy()),
                }
            )
        )
    return pa.concat_tables(tables)


def _tokens_table(documents: Sequence[TokenisedDocument], recorders: Mapping[int, LayerRecorder]) -> Any:
    import pyarrow as pa

    kept = [len(one.pieces) for one in documents]
    columns: dict[str, Any] = {
        "document": pa.array([one.index for one in documents for _ in one.pieces], pa.int64()),
        "position": pa.array([place for number in kept for place in range(number)], pa.int32()),
        "token": pa.array([i for one in documents for i in one.ids[: len(one.pieces)]], pa.int32()),
    }
    for name, lists in (
        ("piece", [one.pieces for one in documents]),
        ("characters", [one.characters for one in documents]),
        ("part_of_speech", [one.parts_of_speech for one in documents]),
    ):
        columns[name] = pa.array([value for values in lists for value in values], pa.string())
    for layer, recorder in recorders.items():
        columns[f"picks_{layer}"] = _lists(recorder.picks_SK.numpy().astype(np.uint16))
        has_vector = columns["position"].to_numpy() < recorder.num_vectors
        columns[f"probability_{layer}"] = _lists(recorder.vectors_VR.numpy(), has_vector)
    return pa.table(columns)


def _lists(rows: np.ndarray, present: np.ndarray | None = None) -> Any:
    """A column of lists, equally long. Rows that are not `present` are null, and have no list."""
    import pyarrow as pa

    counts = np.full(len(rows), rows.shape[1]) if present is None else present * rows.shape[1]
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    null = None if present is None else pa.array(~present)
    return pa.ListArray.from_arrays(offsets, pa.array(rows.reshape(-1)), mask=null)
