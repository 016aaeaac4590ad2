"""A folder of router statistics: its settings, and its parts for reading.

Shape suffixes: N documents of a part, R routed experts of a layer, P prefixes, S tokens of a part, K experts
that a token picks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...checkpoints.small_files import read_json
from ...checkpoints.writing.durable_files import write_whole
from .part_files import documents_file, require_parquet, tokens_file

_FORMAT, _VERSION = "emo-routing", 1
_SETTINGS, _END = "settings.json", "end.json"


@dataclass(frozen=True)
class LayerRows:
    """The documents of one part in one layer.

    Args:
        probability_NR (`np.ndarray`): float64, the router's probabilities, added up over each document.
        picks_NR (`np.ndarray`): int64, how often each expert was picked.
        entropy_N (`np.ndarray`): float64, the entropy of the tokens' probabilities in bits, added up.
        prefix_NPR (`np.ndarray`): float32, the probabilities added up over the first tokens.

    Example: see `RoutingStatistics`.
    """

    probability_NR: np.ndarray
    picks_NR: np.ndarray
    entropy_N: np.ndarray
    prefix_NPR: np.ndarray


class RoutingStatistics:
    """Router statistics on disk, read part by part.

    Args:
        folder (`str` or `os.PathLike`): what `router_statistics` wrote.

    Raises:
        ValueError: if there are no statistics in it.

    Example:

    ```python
    >>> from transformers_emo.analysis.routing import RoutingStatistics, documents_of, router_statistics
    >>> documents = documents_of("model_cards/toy-emo/documents", limit=4)
    >>> _ = router_statistics("model_cards/toy-emo", documents, tmp_path, window=32, progress=False)
    >>> found = RoutingStatistics(tmp_path)
    >>> found.documents()["tokens"].tolist()
    [32, 32, 32, 32]
    >>> found.layer_rows(part=0, layer=3).picks_NR.shape
    (4, 31)

    ```
    """

    def __init__(self, folder: str | os.PathLike):
        require_parquet()
        self.folder = Path(folder)
        self.settings = _read_settings(self.folder)
        if self.settings is None:
            raise ValueError(
                f"There are no router statistics in {os.fspath(folder)!r}: `emo routing` makes them."
            )

    @property
    def layers(self) -> list[int]:
        """The layers with experts."""
        return [int(layer) for layer in self.settings["layers"]]

    def experts(self, layer: int) -> list[int]:
        """The ids of a layer's routed experts, in the order of the columns."""
        return self.settings["layers"][str(layer)]["experts"]

    def picks(self, layer: int) -> int:
        """How many of them a token takes."""
        return self.settings["layers"][str(layer)]["picks"]

    @property
    def num_documents(self) -> int:
        """How many documents there are.

        Raises:
            ValueError: if no process has come to the end of the documents yet.
        """
        try:
            return read_json(self.folder / _END)["num_documents"]
        except FileNotFoundError as error:
            raise ValueError(
                f"The statistics in {os.fspath(self.folder)!r} are not finished: run the same command again."
            ) from error

    def parts(self) -> list[int]:
        """The numbers of all parts.

        Raises:
            ValueError: if a part is missing.
        """
        number = -(-self.num_documents // self.settings["documents_per_part"])
        missing = [part for part in range(number) if not documents_file(self.folder, part).is_file()]
        if missing:
            raise ValueError(
                f"{len(missing)} of {number} parts are missing in {os.fspath(self.folder)!r}, such as part "
                f"{missing[0]}: run the processes that did not finish again."
            )
        return list(range(number))

    def documents(self) -> dict[str, np.ndarray]:
        """All documents, without their experts: `document`, `domain`, `split`, `tokens` and `part`."""
        import pyarrow.parquet as pq

        names = ["document", "domain", "split", "tokens"]
        found: dict[str, list[np.ndarray]] = {name: [] for name in [*names, "part"]}
        for part in self.parts():
            table = pq.read_table(
                documents_file(self.folder, part), columns=names, filters=[("layer", "==", self.layers[0])]
            )
            for name in names:
                found[name].append(table[name].to_numpy())
            found["part"].append(np.full(len(table), part))
        return {name: np.concatenate(arrays) for name, arrays in found.items()}

    def layer_rows(self, part: int, layer: int) -> LayerRows:
        """The documents of a part in a layer, in their order.

        Args:
            part (`int`): the part's number.
            layer (`int`): the layer.
        """
        import pyarrow.parquet as pq

        table = pq.read_table(
            documents_file(self.folder, part),
            columns=["probability", "picks", "entropy", "prefix_probability"],
            filters=[("layer", "==", layer)],
        )
        number, experts = len(table), len(self.experts(layer))
        prefixes = len(self.settings["prefixes"])
        return LayerRows(
            _flat(table["probability"]).reshape(number, experts),
            _flat(table["picks"]).reshape(number, experts),
            table["entropy"].to_numpy(),
            _flat(table["prefix_probability"]).reshape(number, prefixes, experts),
        )

    def tokens(self, part: int, columns: list[str]) -> dict[str, np.ndarray]:
        """Columns of a part's tokens.

        Args:
            part (`int`): the part's number.
            columns (`list[str]`): of `document`, `position`, `token`, `piece`, `characters`,
                `part_of_speech`, and for a layer such as 3 `picks_3` (S, K), places in `experts(3)`, and
                `probability_3` (V, R), which only those tokens have whose position is below
                `vectors_per_document`.
        """
        import pyarrow.parquet as pq

        table = pq.read_table(tokens_file(self.folder, part), columns=columns)
        found = {}
        for name in columns:
            if name.startswith("picks_"):
                found[name] = _flat(table[name]).reshape(len(table), -1)
            elif name.startswith("probability_"):
                experts = len(self.experts(int(name.removeprefix("probability_"))))
                found[name] = _flat(table[name]).reshape(-1, experts)
            else:
                found[name] = table[name].to_numpy()
        return found

    def each_token_part(self, columns: list[str]) -> Iterator[dict[str, np.ndarray]]:
        """Columns of the tokens of one part after the other."""
        for part in self.parts():
            yield self.tokens(part, columns)

    @classmethod
    def begin(cls, folder: str | os.PathLike, settings: dict[str, Any]) -> None:
        """Write the settings of statistics that will be made, or compare them with those that are there.

        Args:
            folder (`str` or `os.PathLike`): the folder.
            settings (`dict[str, Any]`): JSON data.

        Raises:
            ValueError: if the folder holds statistics with other settings.
        """
        there = _read_settings(Path(folder))
        if there is None:
            data = {"format": _FORMAT, "version": _VERSION, "settings": settings}
            write_whole(Path(folder) / _SETTINGS, json.dumps(data, indent=1) + "\n")
            return
        for name, value in settings.items():
            if name != "model" and there.get(name) != value:
                raise ValueError(
                    f"{os.fspath(folder)!r} holds router statistics with {name} = {there.get(name)!r}, and "
                    f"now it is {value!r}: give another folder, or the same settings."
                )

    @classmethod
    def end(cls, folder: str | os.PathLike, num_documents: int) -> None:
        """Note how many documents there are.

        Args:
            folder (`str` or `os.PathLike`): the folder.
            num_documents (`int`): how many.

        Raises:
            ValueError: if another process found another number.
        """
        path = Path(folder) / _END
        if path.is_file():
            there = read_json(path)["num_documents"]
            if there != num_documents:
                raise ValueError(
                    f"Another process found {there} documents for {os.fspath(folder)!r}, this one "
                    f"{num_documents}: give all processes the same documents."
                )
            return
        write_whole(path, json.dumps({"num_documents": num_documents}) + "\n")


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / _SETTINGS
    if not path.is_file():
        return None  # type: ignore[return-value]
    data = read_json(path)
    if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (_FORMAT, _VERSION):
        raise ValueError(
            f"{os.fspath(path)!r} is no file of router statistics of version {_VERSION}: give another folder."
        )
    return data["settings"]


def _flat(column: Any) -> np.ndarray:
    """The numbers of a column of lists, one list after the other."""
    return column.combine_chunks().flatten().to_numpy()
