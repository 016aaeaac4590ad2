"""A folder of scores: its settings, and the sums of each part of the text.

A part is a safetensors file. It appears under its name when it is whole.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from ...checkpoints.errors import CheckpointError
from ...checkpoints.local_files import LocalFiles
from ...checkpoints.safetensors_header import read_metadata
from ...checkpoints.small_files import read_json
from ...checkpoints.writing.durable_files import write_whole
from ..choosing.scores import ExpertOutput, RouterProbability

_FORMAT, _VERSION = "emo-selection", 1
_ABOUT = "about"
_SETTINGS, _END = "settings.json", "end.json"


@dataclass(frozen=True)
class PartSums:
    """What the texts of one part add to the scores.

    Args:
        texts (`str`): what the texts are recognised by.
        num_texts, num_tokens (`int`): how many counted.
        sums (`dict[int, torch.Tensor]`): for each layer with experts (E,), float64.
        weights (`dict[int, torch.Tensor]`): what they are divided by: (1,), or (E,) for methods by output.

    Example: see `SelectionStatistics`.
    """

    texts: str
    num_texts: int
    num_tokens: int
    sums: dict[int, torch.Tensor]
    weights: dict[int, torch.Tensor]

    def add_to(self, scores: list[RouterProbability | ExpertOutput | None]) -> None:
        """Add the part to the score objects of all layers.

        Args:
            scores (`list`): from `new_score`.
        """
        for index, score in enumerate(scores):
            if score is None:
                continue
            score.sum_E += self.sums[index]
            if isinstance(score, ExpertOutput):
                score.weight_E += self.weights[index]
            else:
                score.weight += float(self.weights[index])


class SelectionStatistics:
    """Scores on disk.

    Args:
        folder (`str` or `os.PathLike`): what `collect_statistics` wrote, complete or not.

    Raises:
        ValueError: if there are no such scores in it.

    Example:

    ```python
    >>> from transformers_emo.subsets.collecting import SelectionStatistics, collect_statistics
    >>> _ = collect_statistics("model_cards/toy-emo", ["1+1=2", "import os"], tmp_path, texts_per_part=1,
    ...                        progress=False)
    >>> found = SelectionStatistics(tmp_path)
    >>> found.num_parts, found.missing(), found.read(0).num_tokens
    (2, [], 5)

    ```
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        try:
            data = read_json(self.folder / _SETTINGS)
        except FileNotFoundError as error:
            raise ValueError(
                f"There are no scores in {os.fspath(folder)!r}: `emo select --statistics` makes them."
            ) from error
        if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (_FORMAT, _VERSION):
            raise ValueError(
                f"{os.fspath(self.folder / _SETTINGS)!r} is no file of scores of version {_VERSION}: give "
                "another folder."
            )
        self.settings: dict[str, Any] = data["settings"]

    @classmethod
    def begin(cls, folder: str | os.PathLike, settings: dict[str, Any]) -> SelectionStatistics:
        """Write the settings of scores that will be collected, or compare them with those that are there.

        Args:
            folder (`str` or `os.PathLike`): the folder.
            settings (`dict[str, Any]`): JSON data.

        Raises:
            ValueError: if the folder holds scores with other settings.
        """
        path = Path(folder) / _SETTINGS
        if not path.is_file():
            data = {"format": _FORMAT, "version": _VERSION, "settings": settings}
            write_whole(path, json.dumps(data, indent=1) + "\n")
            return cls(folder)
        there = cls(folder)
        if difference := there.differs(settings):
            raise ValueError(
                f"{os.fspath(folder)!r} holds scores with {difference}: give another folder, or the same "
                "settings."
            )
        return there

    def differs(self, settings: dict[str, Any], *, ignored: tuple[str, ...] = ("model",)) -> str | None:
        """In what the settings differ from others, in words; `None` if in nothing.

        Args:
            settings (`dict[str, Any]`): the others.
            ignored (`tuple[str, ...]`): what may differ.
        """
        for name, value in settings.items():
            if name not in ignored and self.settings.get(name) != value:
                if name in ("config", "excluded"):
                    return f"another `{name}`"
                return f"{name} = {self.settings.get(name)!r}, and now it is {value!r}"
        return None

    def end(self, num_parts: int, texts: str) -> None:
        """Note how many parts there are, when a process has read all texts.

        Args:
            num_parts (`int`): how many.
            texts (`str`): what all texts together are recognised by.

        Raises:
            ValueError: if another process read other texts.
        """
        path = self.folder / _END
        if path.is_file():
            if self._end() != {"num_parts": num_parts, "texts": texts}:
                raise ValueError(
                    f"Another process read other texts for {os.fspath(self.folder)!r}: give all processes "
                    "the same texts in the same order, or another folder."
                )
            return
        write_whole(path, json.dumps({"num_parts": num_parts, "texts": texts}) + "\n")

    def _end(self) -> dict[str, Any]:
        try:
            return read_json(self.folder / _END)
        except FileNotFoundError as error:
            raise ValueError(
                f"No process has read all texts for {os.fspath(self.folder)!r} yet: run the same "
                "command again."
            ) from error

    @property
    def is_ended(self) -> bool:
        """`bool`: whether a process has read all texts, so that the number of parts is known."""
        return (self.folder / _END).is_file()

    @property
    def num_parts(self) -> int:
        """`int`: how many parts there are, done or not. `ValueError` if that is not known yet."""
        return self._end()["num_parts"]

    @property
    def texts(self) -> str:
        """`str`: what all texts together are recognised by."""
        return self._end()["texts"]

    def missing(self) -> list[int]:
        """`list[int]`: the numbers of parts that are not here."""
        return [part for part in range(self.num_parts) if not self._file(part).is_file()]

    def done(self) -> list[int]:
        """`list[int]`: the numbers of parts that are here."""
        return sorted(int(path.stem.split("-")[1]) for path in self.folder.glob("part-?????.safetensors"))

    def _file(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.safetensors"

    def texts_of(self, part: int) -> str | None:
        """What the texts of a part are recognised by; `None` if it is not done.

        Args:
            part (`int`): its number.
        """
        if not self._file(part).is_file():
            return None
        return self._about(part)["texts"]

    def _about(self, part: int) -> dict[str, Any]:
        files, name = LocalFiles(self.folder), self._file(part).name
        try:
            return json.loads(read_metadata(files, name)[_ABOUT])
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"{os.fspath(self._file(part))!r} holds no scores: delete it, and run the same command again."
            ) from error
        finally:
            files.close()

    def write(self, part: int, sums: PartSums) -> None:
        """Write a part.

        Args:
            part (`int`): its number.
            sums (`PartSums`): its sums.
        """
        tensors = {f"{index}.sum": tensor for index, tensor in sums.sums.items()}
        tensors |= {f"{index}.weight": tensor for index, tensor in sums.weights.items()}
        about = {"texts": sums.texts, "num_texts": sums.num_texts, "num_tokens": sums.num_tokens}
        # As one entry: the library writes several in any order, and equal parts shall be equal files.
        write_whole(self._file(part), save(tensors, {_ABOUT: json.dumps(about)}))

    def read(self, part: int) -> PartSums:
        """Read a part.

        Args:
            part (`int`): its number.

        Raises:
            CheckpointError: if the file is damaged.
        """
        about = self._about(part)
        tensors = load(self._file(part).read_bytes())
        sums, weights = (
            {int(name.split(".")[0]): t for name, t in tensors.items() if name.endswith(kind)}
            for kind in (".sum", ".weight")
        )
        return PartSums(about["texts"], about["num_texts"], about["num_tokens"], sums, weights)
