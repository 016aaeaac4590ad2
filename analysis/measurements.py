"""Measurements of models with fewer experts: how they are kept, their means and their errors.

Shape suffixes: N documents of a domain, W resamplings of the documents.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..checkpoints.small_files import parse_json
from ..checkpoints.writing.durable_files import make_folders, sync_folder

FULL = "full"

Key = tuple[str, str, str, float, int | None]


@dataclass(frozen=True)
class Measurement:
    """The losses of the test documents of one domain, with one choice of experts.

    Args:
        model (`str`): the model's name.
        domain (`str`): the domain's name.
        method (`str`): how the experts were chosen; `"full"` for all of them.
        share (`float`): the share of experts that was asked for.
        num_experts (`int`): experts kept in each layer, shared ones included.
        seed (`int`, *optional*): the seed that drew calibration texts or random experts; `None` for the full
            model.
        loss (`list[float]`): the loss of each document in nats, summed over its tokens.
        correct (`list[int]`): how many tokens of each document the model predicted correctly.
        tokens (`list[int]`): how many tokens of each document were to be predicted.
        num_experts_per_tok (`int`, defaults to 1): experts that a token takes in the full model.
        min_experts (`int`, defaults to 1): the fewest experts that a subset of the model can keep.

    Example: see `Retention`.
    """

    model: str
    domain: str
    method: str
    share: float
    num_experts: int
    seed: int | None
    loss: list[float]
    correct: list[int]
    tokens: list[int]
    num_experts_per_tok: int = 1
    min_experts: int = 1

    @property
    def key(self) -> Key:
        """What tells it from other measurements."""
        return self.model, self.domain, self.method, self.share, self.seed

    @property
    def mean_loss(self) -> float:
        """Nats per token."""
        return sum(self.loss) / sum(self.tokens)

    @property
    def accuracy(self) -> float:
        """The share of tokens that the model predicted correctly."""
        return sum(self.correct) / sum(self.tokens)

    @property
    def loss_error(self) -> float | None:
        """The standard error of `mean_loss` over documents (of a ratio of sums); `None` for one document."""
        number = sum(tokens > 0 for tokens in self.tokens)
        if number < 2:
            return None
        residual_N = np.array(self.loss) - self.mean_loss * np.array(self.tokens)
        return float(np.sqrt(number / (number - 1) * (residual_N**2).sum()) / sum(self.tokens))


class Retention:
    """Measurements of one or more models on the same documents.

    Args:
        measurements (`Iterable[Measurement]`): all of them, in any order.

    Example:

    ```python
    >>> from transformers_emo.analysis import Measurement, Retention
    >>> full = Measurement("emo", "python", "full", 1.0, 32, None, [6.0, 3.0], [1, 1], [2, 1])
    >>> half = Measurement("emo", "python", "global", 0.5, 16, 0, [7.0, 5.0], [1, 0], [2, 1])
    >>> retention = Retention([full, half])
    >>> retention.loss("emo", "global", 0.5) - retention.loss("emo", "global", 1.0)
    1.0
    >>> retention.accuracy("emo", "global", 0.5)
    0.3333333333333333

    ```
    """

    def __init__(self, measurements: Iterable[Measurement]):
        self.measurements = list(measurements)
        by_choice: dict[tuple[str, str, float], dict[int | None, dict[str, Measurement]]] = {}
        for m in self.measurements:
            seeds = by_choice.setdefault((m.model, m.method, m.share), {})
            seeds.setdefault(m.seed, {})[m.domain] = m
        self._by_choice = by_choice
        self.models = list(dict.fromkeys(m.model for m in self.measurements))
        self.domains = list(dict.fromkeys(m.domain for m in self.measurements))
        self.methods = list(dict.fromkeys(m.method for m in self.measurements if m.method != FULL))
        self.num_seeds = len({m.seed for m in self.measurements if m.method != FULL})
        self.shares = sorted({m.share for m in self.measurements}, reverse=True)

    @classmethod
    def read(cls, folder: str | os.PathLike) -> Retention:
        """Read the measurements that `measure_retention` has written to a folder, also those of a run that is
        not finished.

        Args:
            folder (`str` or `os.PathLike`): the `out` of `measure_retention`.

        Raises:
            ValueError: if there are no measurements.

        Example: see `measure_retention`.
        """
        path = Path(folder) / Journal.NAME
        if not path.is_file():
            raise ValueError(
                f"There are no measurements in {os.fspath(folder)!r}: `emo retention` makes them."
            )
        return cls(Journal(path).measurements.values())

    def choices(self, model: str, method: str, share: float) -> dict[int | None, dict[str, Measurement]]:
        """For each seed the measurements by domain. At share 1 they are those of the full model.

        A seed counts only if all domains were measured with it, so that all means are over the same domains.
        """
        seeds = self._by_choice.get((model, FULL if share >= 1 else method, share), {})
        return {seed: ms for seed, ms in seeds.items() if len(ms) == len(self.domains)}

    def methods_of(self, model: str) -> list[str]:
        """The methods by which experts of a model were chosen; all methods, if none was used on it."""
        own = {m.method for m in self.measurements if m.model == model}
        return [method for method in self.methods if method in own] or self.methods

    def num_experts(self, model: str, share: float) -> int | None:
        """How many experts were kept in each layer at a share; `None` if it was not measured."""
        return next((m.num_experts for m in self.measurements if (m.model, m.share) == (model, share)), None)

    def layer_size(self, model: str) -> tuple[int, int, int]:
        """Experts of a layer in the full model, the fewest a subset can keep, and how many a token takes."""
        most = max((m for m in self.measurements if m.model == model), key=lambda m: m.num_experts)
        return most.num_experts, most.min_experts, most.num_experts_per_tok

    def loss(self, model: str, method: str, share: float) -> float | None:
        """The mean over seeds and domains of the loss per token, in nats; `None` if it was not measured."""
        return _mean(m.mean_loss for m in self._all(model, method, share))

    def accuracy(self, model: str, method: str, share: float) -> float | None:
        """The mean over seeds and domains of the next-token accuracy; `None` if it was not measured."""
        return _mean(m.accuracy for m in self._all(model, method, share))

    def loss_error(self, model: str, method: str, share: float) -> float | None:
        """How exact `loss` is: its standard deviation over seeds, or its standard error over documents.

        Returns:
            `float`, *optional*: with several seeds the standard deviation of their mean losses, which the
            full model has not; with one seed the standard error over documents. `None` if nothing was
            measured, or a domain has one document only.
        """
        seeds = self.choices(model, method, share)
        if share >= 1 and self.num_seeds > 1:
            return None
        if len(seeds) > 1:
            means = [np.mean([m.mean_loss for m in ms.values()]) for ms in seeds.values()]
            return float(np.std(means, ddof=1))
        errors = [m.loss_error for ms in seeds.values() for m in ms.values()]
        if not errors or any(error is None for error in errors):
            return None
        return float(np.sqrt(sum(error**2 for error in errors)) / len(errors))  # type: ignore[operator,misc]

    def resampled_loss(
        self, model: str, method: str, share: float, *, num: int = 1000, seed: int = 0
    ) -> np.ndarray:
        """`loss` with the documents of each domain resampled (the bootstrap), (W,) float64.

        With the same `num` and `seed` all models and choices see the same resampled documents. So differences
        and ratios can be taken first, and quantiles of them afterwards.

        Args:
            model, method, share: as for `loss`.
            num (`int`, defaults to 1000): how often documents are resampled (W).
            seed (`int`, defaults to 0): the seed of the resampling.

        Raises:
            ValueError: if there is no such measurement.
        """
        seeds = self.choices(model, method, share)
        if not seeds:
            raise ValueError(
                f"There is no measurement of {model!r} by {method!r} at the share {share:g}: measure it with "
                "`measure_retention`."
            )
        total_W = np.zeros(num)
        for index, domain in enumerate(self.domains):
            tokens_N = np.array(next(iter(seeds.values()))[domain].tokens)
            times_WN = _resampling(len(tokens_N), num, (seed, index))
            loss_N = np.mean([ms[domain].loss for ms in seeds.values()], axis=0)
            total_W += (times_WN @ loss_N) / np.maximum(times_WN @ tokens_N, 1)
        return total_W / len(self.domains)

    def _all(self, model: str, method: str, share: float) -> Iterable[Measurement]:
        return (m for ms in self.choices(model, method, share).values() for m in ms.values())


def experts_at(share: float, available: int, least: int) -> int | None:
    """How many experts a share is: the nearest number, or the next larger one if the nearest is too small.

    Args:
        share (`float`): above 0, at most 1.
        available (`int`): experts of a layer, shared ones included.
        least (`int`): the fewest of them that a subset can keep.

    Returns:
        `int`, *optional*: the number; `None` if a subset cannot be so small.

    Example:

    ```python
    >>> from transformers_emo.analysis.measurements import experts_at
    >>> experts_at(0.03125, 128, 2), experts_at(0.001, 128, 2)
    (4, None)

    ```
    """
    exact = share * available
    return next((k for k in (math.floor(exact + 0.5), math.ceil(exact)) if k >= least), None)


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None


@lru_cache(maxsize=64)  # one for each domain
def _resampling(num_documents: int, num: int, seed: tuple[int, int]) -> np.ndarray:
    """How often each document is drawn in each resampling, which draws N times, (W, N)."""
    even_N = np.full(num_documents, 1 / num_documents)
    return np.random.default_rng(seed).multinomial(num_documents, even_N, num)


class Journal:
    """Measurements on disk, one in each line as JSON. An interrupted run loses at most one.

    Settings come before the first measurement that was made with them. A later run must have the same ones.

    Args:
        path (`str` or `os.PathLike`): the file. It is made with the first measurement.

    Raises:
        ValueError: if the file holds anything else.

    Example:

    ```python
    >>> from transformers_emo.analysis import Journal, Measurement
    >>> journal = Journal(tmp_path / "measurements.jsonl")
    >>> journal.require({"window": 256})
    >>> journal.add(Measurement("emo", "python", "full", 1.0, 32, None, [6.0], [1], [2]))
    >>> ("emo", "python", "full", 1.0, None) in Journal(tmp_path / "measurements.jsonl").measurements
    True

    ```
    """

    NAME = "measurements.jsonl"
    kind: ClassVar[type] = Measurement  # what a line holds; it has a `key`

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.settings: dict[str, Any] = {}
        self.measurements: dict[Any, Any] = {}  # by their keys
        self._unwritten: dict[str, Any] = {}  # settings for which there is no measurement yet
        self._whole = 0  # the bytes of complete lines
        if not self.path.exists():
            return
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break  # an interrupted run did not finish this line
            self._whole += len(line)
            try:
                data = parse_json(line)
                if "settings" in data:
                    self.settings |= data["settings"]
                else:
                    measurement = self.kind(**data)
                    self.measurements[measurement.key] = measurement
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{os.fspath(self.path)!r}, line {number} is no measurement ({error}). Measure into "
                    "another folder."
                ) from error

    def require(self, settings: Mapping[str, Any]) -> None:
        """Note the settings of the measurements that follow. They are written with the first of these.

        Args:
            settings (`Mapping[str, Any]`): JSON data by name.

        Raises:
            ValueError: if the measurements in the file were made with another setting.
        """
        for name, value in settings.items():
            if name in self.settings and self.settings[name] != value:
                raise ValueError(
                    f"{os.fspath(self.path)!r} was measured with {name} = {self.settings[name]!r}, and now "
                    f"it is {value!r}: measure into another folder, or remove that file."
                )
        self._unwritten |= {name: v for name, v in settings.items() if name not in self.settings}
        self.settings |= settings

    def add(self, measurement: Any) -> None:
        """Add a measurement, and write it to disk at once.

        Args:
            measurement (`Measurement`): what was measured; of another `kind` in another journal.
        """
        lines = [{"settings": self._unwritten}] if self._unwritten else []
        self._append([*lines, asdict(measurement)])
        self._unwritten = {}
        self.measurements[measurement.key] = measurement

    def _append(self, data: Iterable[dict[str, Any]]) -> None:
        make_folders(self.path.parent)
        lines = b"".join(json.dumps(one).encode() + b"\n" for one in data)
        is_new = not self.path.exists()
        with self.path.open("wb" if is_new else "r+b") as file:
            file.seek(self._whole)
            if not is_new and b"\n" in file.read():
                raise ValueError(
                    f"Another run has added measurements to {os.fspath(self.path)!r}: nothing was written. "
                    "Call again when it is done: this continues with what both have measured."
                )
            file.truncate(self._whole)
            file.seek(self._whole)
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            sync_folder(self.path.parent)
        self._whole += len(lines)
