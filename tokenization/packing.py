"""Packs documents into windows of equal length. Each document ends in EOS, and only that tells them apart.

Documents stand one after the other and are cut where a window is full. The rest of a document begins the next
window. Labels are the ids themselves, also across the end of a document, as EMO was trained.

Shape suffixes: N windows, W tokens of a window, T tokens, D documents.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from .columns import WINDOW, check_at_least_one, check_column, end_documents, eos_id, import_datasets
from .tokenization_emo import EmoTokenizer

if TYPE_CHECKING:
    import datasets


def pack_documents(
    documents: Iterable[Sequence[int]],
    *,
    eos_token_id: int,
    window: int = WINDOW,
    rest: Sequence[int] | np.ndarray = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Join documents, so that each ends in exactly one EOS, and cut the result into windows.

    A document that ends in EOS gets no second one, and several at its end become one. A document without
    tokens becomes a single EOS. EOS tokens inside a document stay.

    Args:
        documents (`Iterable[Sequence[int]]`): the ids of each document, lists or integer arrays of any
            length.
        eos_token_id (`int`): the EOS token.
        window (`int`, defaults to 4096): W, tokens of a window.
        rest (`Sequence[int]` or `np.ndarray`, *optional*): the tokens that an earlier call left over; they
            come first and are taken as they are.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: int64 windows (N, W), and the tokens after the last window, fewer
        than W: give them to the next call, drop them or pad them.

    Raises:
        ValueError: if the window is smaller than 1, or a document is not a list of ids from 0 to 2**31 - 1.

    Example:

    ```python
    >>> from transformers_emo.tokenization import pack_documents
    >>> windows, rest = pack_documents([[5, 6], [7, 9], []], eos_token_id=9, window=4)
    >>> windows.tolist(), rest.tolist()
    ([[5, 6, 9, 7]], [9, 9])
    >>> windows, rest = pack_documents([[8, 8]], eos_token_id=9, window=4, rest=rest)
    >>> windows.tolist(), rest.tolist()
    ([[9, 9, 8, 8]], [9])

    ```
    """
    check_at_least_one(window=window)
    ids_T, _ = end_documents(documents, eos_token_id)
    ids_T = np.concatenate([np.asarray(rest, dtype=np.int64), ids_T])
    cut = len(ids_T) // window * window
    return ids_T[:cut].reshape(-1, window), ids_T[cut:]


def pack_dataset(
    dataset: "datasets.Dataset | datasets.IterableDataset",
    *,
    tokenizer: EmoTokenizer | None = None,
    eos_token_id: int | None = None,
    column: str | None = None,
    window: int = WINDOW,
    drop_last: bool = True,
    num_proc: int | None = None,
    batch_size: int = 256,
) -> "datasets.Dataset | PackedStream":
    """Pack a dataset of documents, one a row, into windows for training.

    The rows are texts or ids, from whatever `datasets.load_dataset` reads: JSONL, parquet, plain text.

    A `Dataset` is packed at once, by `num_proc` processes and with progress bars; the result is the same for
    any number of them, and is cached on disk as that of every `Dataset.map`. An `IterableDataset` is packed
    as it is read, by each worker of a `DataLoader` for its own shards; see `PackedStream`.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): the documents.
        tokenizer (`EmoTokenizer`, *optional*): for a column of texts.
        eos_token_id (`int`, *optional*): for a column of ids: the EOS token that ends each document, added
            where it is missing.
        column (`str`, *optional*): the column; by default `"text"` with a tokenizer, else `"input_ids"`.
        window (`int`, defaults to 4096): tokens of a window.
        drop_last (`bool`, defaults to `True`): drop the tokens after the last full window. Otherwise they are
            a last, shorter window, which `DocumentCollator` pads.
        num_proc (`int`, *optional*): processes, for a `Dataset`.
        batch_size (`int`, defaults to 256): documents that are encoded together.

    Returns:
        `datasets.Dataset` or `PackedStream`: of one column, `input_ids`, int64 NumPy arrays (W,); a `Dataset`
        keeps them as int32.

    Raises:
        ImportError: if `datasets` is not installed.
        TypeError: if `dataset` is neither of the two.
        ValueError: if there are both or neither of `tokenizer` and `eos_token_id`, the column is missing or
            holds another type, a size is impossible, or a `Dataset` does not fill one window.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from transformers_emo import EmoTokenizer
    >>> from transformers_emo.tokenization import pack_dataset
    >>> tokenizer = EmoTokenizer.from_pretrained("model_cards/toy-emo")
    >>> texts = Dataset.from_dict({"text": ["A first document.", "And one more."]})
    >>> packed = pack_dataset(texts, tokenizer=tokenizer, window=4)
    >>> tokenizer.decode(packed[:]["input_ids"].flatten())
    'A first document.<eos>And one'

    ```
    """
    if (tokenizer is None) == (eos_token_id is None):
        raise ValueError("Give either `tokenizer`, for texts, or `eos_token_id`, for ids.")
    check_at_least_one(window=window, batch_size=batch_size)
    column = column or ("input_ids" if tokenizer is None else "text")
    datasets = import_datasets()
    if isinstance(dataset, datasets.IterableDataset):
        return PackedStream(
            dataset,
            tokenizer=tokenizer,
            eos_token_id=eos_token_id,
            column=column,
            window=window,
            drop_last=drop_last,
            batch_size=batch_size,
        )
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"A {type(dataset).__name__} cannot be packed: expected a `Dataset` or an `IterableDataset`. Of "
            "several splits choose one, as in `dataset['train']`."
        )

    check_column(column, dataset.column_names)
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    common = {"batched": True, "batch_size": batch_size, "num_proc": num_proc, "features": features}
    encode = {"tokenizer": tokenizer, "eos_token_id": eos_token_id, "column": column}
    documents = dataset.with_format(None).select_columns([column])
    documents = documents.map(
        _encode_batch,
        fn_kwargs=encode,
        remove_columns=[column],
        desc="Encoding documents",
        **common,
    )
    documents = documents.with_format("arrow")
    ends_D = _ends(documents)
    num_tokens = int(ends_D[-1]) if len(ends_D) else 0
    if drop_last:
        num_tokens -= num_tokens % window
    if not num_tokens:
        raise ValueError(
            f"The {len(documents)} documents do not fill one window of {window} tokens: give more of them, a "
            "smaller `window`, or `drop_last=False`."
        )
    packed = documents.map(
        _windows_that_begin,
        with_indices=True,
        fn_kwargs={"documents": documents, "ends_D": ends_D, "num_tokens": num_tokens, "window": window},
        remove_columns=["input_ids"],
        desc="Packing windows",
        **common,
    )
    return packed.with_format("numpy")


class PackedStream(IterableDataset):
    """The windows of an `IterableDataset` of documents, packed as they are read; made by `pack_dataset`.

    Each shard of the documents is read by one worker of a `DataLoader`. Each worker drops its own last window
    if it is not full (or leaves it to be padded). Give at least as many shards as workers.

    `EmoTrainer` gives each process its own share of the documents, and its checkpoints say where each stands
    (`training.stream_share`). For other loops `state_dict` and `load_state_dict` work as in `datasets`: a
    stream that loads a state continues, bit for bit, after the last window that was given out, and does not
    read the documents before it again. A state belongs to the process that iterates. With workers, use a data
    loader that keeps the state of each (`torchdata.stateful_dataloader`). No state holds the shuffle buffer
    of `IterableDataset.shuffle`: after a shuffle only reading once more is exact.

    Args:
        documents (`datasets.IterableDataset`): the documents.
        tokenizer, eos_token_id, column, window, drop_last, batch_size: as for `pack_dataset`, which checks
            them.

    Raises:
        ValueError: on iterating, if the column is missing or holds another type, or a state of another
            worker was loaded.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from transformers_emo.tokenization import pack_dataset
    >>> documents = Dataset.from_dict({"input_ids": [[5, 6], [7], [8, 8, 8]]}).to_iterable_dataset()
    >>> stream = pack_dataset(documents, eos_token_id=9, window=3)
    >>> windows = iter(stream)
    >>> next(windows)["input_ids"].tolist()
    [5, 6, 9]
    >>> state = stream.state_dict()
    >>> stream = pack_dataset(documents, eos_token_id=9, window=3)
    >>> stream.load_state_dict(state)
    >>> [item["input_ids"].tolist() for item in stream]
    [[7, 9, 8], [8, 8, 9]]

    ```
    """

    def __init__(
        self,
        documents: "datasets.IterableDataset",
        *,
        tokenizer: EmoTokenizer | None,
        eos_token_id: int | None,
        column: str,
        window: int,
        drop_last: bool,
        batch_size: int,
    ):
        self.documents = documents
        self.tokenizer, self.eos_token_id, self.column = tokenizer, eos_token_id, column
        self.window, self.drop_last, self.batch_size = window, drop_last, batch_size
        self._loaded: dict[str, Any] | None = None
        # Where the documents stood before the current batch, the tokens that earlier batches left over, and
        # how many windows of the current batch were given out. So a state is small, and after loading it at
        # most one batch is encoded again.
        self._at: tuple[dict | None, np.ndarray, int] = (None, np.empty(0, dtype=np.int64), 0)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        # A copy for this iteration: a dataset keeps a loaded state in all later epochs.
        documents = self.documents.with_format(None)
        documents.set_epoch(self.documents.epoch)
        read, rest, done = None, np.empty(0, dtype=np.int64), 0
        loaded, self._loaded = self._loaded, None
        if loaded is not None and loaded["epoch"] == self.documents.epoch:
            if loaded["worker"] != _worker():
                raise ValueError(
                    f"The state was made by worker {loaded['worker']} and is loaded by worker {_worker()}: "
                    "load it where the stream is iterated, or load none and skip the earlier batches."
                )
            read, rest, done = (
                loaded["documents"],
                np.asarray(loaded["rest"], dtype=np.int64),
                loaded["windows"],
            )
            if read is not None:
                documents.load_state_dict(read)
        self._at = (read, rest, done)
        examples = iter(documents)
        while batch := list(islice(examples, self.batch_size)):
            check_column(self.column, [name for name in batch[0] if all(name in row for row in batch)])
            ids = _encode([row[self.column] for row in batch], self.tokenizer, self.column)
            windows_NW, new_rest = pack_documents(ids, eos_token_id=self._eos, window=self.window, rest=rest)
            for index in range(done, len(windows_NW)):
                self._at = (read, rest, index + 1)
                yield {"input_ids": windows_NW[index]}
            read, rest, done = documents.state_dict(), new_rest, 0
        if len(rest) and not self.drop_last and not done:
            self._at = (read, rest, 1)
            yield {"input_ids": rest}

    @property
    def _eos(self) -> int:
        return eos_id(self.tokenizer, self.eos_token_id)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle the documents anew, as `datasets.IterableDataset.set_epoch` does.

        Args:
            epoch (`int`): the number of the next epoch.

        Example: `Trainer` and accelerate's data loaders call it.
        """
        self.documents.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to continue after the last window that was given out.

        Returns:
            `dict`: numbers, strings and lists of them.

        Example: see `PackedStream`.
        """
        if self._loaded is not None:
            return self._loaded
        read, rest, done = self._at
        return {
            "documents": read,
            "rest": rest.tolist(),
            "windows": done,
            "epoch": self.documents.epoch,
            "worker": _worker(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next iteration, and only that one, begin where the state was taken.

        Args:
            state_dict (`dict`): from `state_dict` of a stream made in the same way.

        Example: see `PackedStream`.
        """
        self._loaded = state_dict
        self.set_epoch(state_dict["epoch"])


def _encode(values: list, tokenizer: EmoTokenizer | None, column: str) -> list[list[int]]:
    """The ids of documents. With a tokenizer, the values are texts."""
    if tokenizer is None:
        return values
    for value in values:
        if not isinstance(value, str):
            raise ValueError(
                f"The column {column!r} holds a {type(value).__name__}, expected texts: filter such rows "
                "out, or give `eos_token_id` instead of `tokenizer` for a column of ids."
            )
    return tokenizer.encode_documents(values)


def _encode_batch(
    batch: dict[str, list], *, tokenizer: EmoTokenizer | None, eos_token_id: int | None, column: str
) -> dict[str, list[np.ndarray]]:
    """A batch of `Dataset.map`: documents become ids that end in EOS."""
    ids = _encode(batch[column], tokenizer, column)
    ids_T, lengths_D = end_documents(ids, eos_id(tokenizer, eos_token_id))
    return {"input_ids": np.split(ids_T.astype(np.int32), lengths_D.cumsum()[:-1])}


def _ends(documents: "datasets.Dataset") -> np.ndarray:
    """Where each document of an arrow-formatted dataset ends in the row of all tokens: (D,) int64."""
    import pyarrow.compute  # comes with `datasets`, which is optional

    lengths = [
        pyarrow.compute.list_value_length(table["input_ids"]).to_numpy()
        for table in documents.iter(batch_size=100_000)
    ]
    return np.concatenate([np.empty(0, dtype=np.int64), *lengths]).cumsum(dtype=np.int64)


def _windows_that_begin(
    batch,
    indices: list[int],
    *,
    documents: "datasets.Dataset",
    ends_D: np.ndarray,
    num_tokens: int,
    window: int,
):
    """A batch of `Dataset.map`: the windows that begin in these documents.

    A window may end in documents of later batches, which are read here too. So no batch waits for another
    one, and any number of processes gives the same windows.
    """
    import pyarrow  # comes with `datasets`, which is optional

    begin = int(ends_D[indices[0] - 1]) if indices[0] else 0
    first = -(-begin // window) * window
    stop = min(-(-int(ends_D[indices[-1]]) // window) * window, num_tokens)
    bounds = np.append(np.arange(first, stop, window), max(first, stop))
    ids_T = pyarrow.array([], pyarrow.int32())
    if first < stop:
        head, tail = np.searchsorted(ends_D, [first, stop - 1], side="right")
        lists = documents[int(head) : int(tail) + 1]["input_ids"].combine_chunks()
        offset = int(ends_D[head - 1]) if head else 0
        ids_T = lists.flatten().slice(first - offset, stop - first)
    windows = pyarrow.ListArray.from_arrays(pyarrow.array(bounds - first, pyarrow.int32()), ids_T)
    return pyarrow.table({"input_ids": windows})


def _worker() -> str | None:
    """Which worker of a data loader this process is."""
    info = get_worker_info()
    return None if info is None else f"{info.id} of {info.num_workers}"
