"""Each process's share of a stream of windows: its own documents, encoded by it alone, and where it stands.

Of several data-parallel processes, each reads its own shards of the documents, and each worker of a process
its own of these. A share never ends: at its end it begins again, as the next epoch. So no process runs out of
windows while others wait for it.

Each window carries its position, so that what is saved is where training stands, and not where the workers
are, which read ahead. A share that goes on from a saved position first gives as many placeholders as it had
given windows. `Trainer` skips them as the windows that were trained on before, and nothing is encoded again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from ..tokenization import PackedStream

POSITION = "stream_position"
"""The name under which a batch carries its position."""


@dataclass(frozen=True)
class StreamPosition:
    """Where a worker stands in its share, once it has given out a window.

    Args:
        worker (`int`): the number of the worker.
        windows (`int`): how many windows it has given out in all.
        state (`dict`): what the stream goes on from; see `PackedStream.state_dict`.

    Example: see `StreamShare`.
    """

    worker: int
    windows: int
    state: dict[str, Any]


class StreamShare(IterableDataset):
    """The windows of one process, without end.

    Args:
        stream (`PackedStream`): the windows of all.
        rank (`int`): the number of this process among those that see different data.
        ranks (`int`): how many these are. If the documents have at least as many shards, and a multiple of
            `ranks`, each process reads its own shards; else it reads all rows, and encodes every so-manieth.
        workers (`int`, defaults to 0): the most workers that will read it. There are no more than shards.

    Raises:
        ValueError: on iterating, if there is not one window for a worker.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from transformers_emo.tokenization import pack_dataset
    >>> from transformers_emo.training.stream_share import StreamShare
    >>> documents = Dataset.from_dict({"input_ids": [[5, 6], [7, 8]]}).to_iterable_dataset(num_shards=2)
    >>> stream = pack_dataset(documents, eos_token_id=9, window=3)
    >>> windows = iter(StreamShare(stream, rank=1, ranks=2))
    >>> [next(windows)["input_ids"].tolist() for _ in range(2)]
    [[7, 8, 9], [7, 8, 9]]

    ```
    """

    def __init__(self, stream: PackedStream, *, rank: int, ranks: int, workers: int = 0):
        from datasets.distributed import split_dataset_by_node  # optional

        self.stream = copy.copy(stream)
        if ranks > 1:
            self.stream.documents = split_dataset_by_node(stream.documents, rank=rank, world_size=ranks)
        self.rank, self.ranks = rank, ranks
        self.workers = min(workers, self.stream.documents.num_shards)
        self.positions: dict[int, StreamPosition] = {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        stream, given = copy.copy(self.stream), 0
        stream.documents = self.stream.documents.with_format(
            None
        )  # a copy, whose epochs are this iteration's
        stream.documents.set_epoch(self.stream.documents.epoch)
        resumed = worker in self.positions  # perhaps behind the last window of an epoch
        if resumed:
            given = self.positions[worker].windows
            for _ in range(given):
                yield {POSITION: None}
            stream.load_state_dict(self.positions[worker].state)
        while True:
            before = given
            for window in stream:
                given += 1
                yield {**window, POSITION: StreamPosition(worker, given, stream.state_dict())}
            if given == before and not resumed:
                raise ValueError(
                    f"Worker {worker} of process {self.rank} has not one window of {stream.window} tokens: "
                    f"give the documents more rows and shards, for {self.ranks} processes and their "
                    "workers (`dataloader_num_workers`)."
                )
            stream.set_epoch(stream.documents.epoch + 1)
            resumed = False

    def state_dict(self) -> dict[str, Any] | None:
        """Where each worker stands, as JSON can hold it.

        Returns:
            `dict`, *optional*: `None` if the rows are shuffled in a buffer, which no state holds: then only
            reading the windows once more leads to the same place.
        """
        if _has_buffer(self.stream.documents):
            return None
        places = {
            str(at.worker): {"windows": at.windows, "state": at.state} for at in self.positions.values()
        }
        return {"rank": self.rank, "ranks": self.ranks, "workers": self.workers, "places": places}

    def load_state_dict(self, state: Mapping[str, Any], *, windows: int) -> None:
        """Go on from where a process stood.

        Args:
            state (`Mapping`): from `state_dict`.
            windows (`int`): how many windows `Trainer` will skip.

        Raises:
            ValueError: if the state is of other processes, workers or batches.
        """
        places = {int(worker): place for worker, place in state["places"].items()}
        saved = {name: state[name] for name in ("rank", "ranks", "workers")}
        saved["windows trained on"] = sum(place["windows"] for place in places.values())
        now = {"rank": self.rank, "ranks": self.ranks, "workers": self.workers, "windows trained on": windows}
        different = next((name for name in now if now[name] != saved[name]), None)
        if different is not None:
            raise ValueError(
                f"The checkpoint says where a stream stood, and this run divides it otherwise ({different}: "
                f"{now[different]}, expected {saved[different]}): resume with as many processes, workers, "
                "windows in a batch and accumulated batches, or set `ignore_data_skip` to begin anew."
            )
        self.positions = {
            worker: StreamPosition(worker, place["windows"], place["state"])
            for worker, place in places.items()
        }


def _has_buffer(documents: Any) -> bool:
    """Whether the rows of a stream may pass through a shuffle buffer. `datasets` does not say so publicly."""
    left = [getattr(documents, "_ex_iterable", None)]
    while left:
        rows = left.pop()
        if rows is None or "Buffer" in type(rows).__name__:
            return True
        inner = [rows.ex_iterable] if hasattr(rows, "ex_iterable") else getattr(rows, "ex_iterables", [])
        left += inner.values() if isinstance(inner, Mapping) else inner
    return False


class PositionCollator:
    """Makes batches as another collator does, with the position of their last window.

    Args:
        collate (`Callable`): makes a batch of windows.

    Example: `EmoTrainer` uses it for a `PackedStream`.
    """

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]):
        self.collate = collate

    def __call__(self, windows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch; of placeholders, one that is to be skipped."""
        position = windows[-1][POSITION]
        if position is None:
            return {POSITION: None}
        plain = [{name: value for name, value in row.items() if name != POSITION} for row in windows]
        return {**self.collate(plain), POSITION: position}
