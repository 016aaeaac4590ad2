"""Shares of a stream: each document by one process, and resumed without encoding anything again."""

import json

import pytest
import torch
from conftest import tiny_model
from datasets import Dataset
from torch.utils.data import DataLoader
from training_runs import DRAWN, make_documents, make_trainer, run_resumed
from transformers_emo.tokenization import pack_dataset, packing
from transformers_emo.training.stream_share import POSITION, PositionCollator, StreamShare

WINDOW = 8


def new_stream(number: int = 40, shards: int = 4):
    documents = Dataset.from_dict({"input_ids": make_documents(number)}).to_iterable_dataset(
        num_shards=shards
    )
    return pack_dataset(documents, eos_token_id=1, window=WINDOW, batch_size=4)


def collate(windows):
    return {"input_ids": torch.tensor([window["input_ids"].tolist() for window in windows])}


def batches_of(share, number: int, *, workers: int = 0, batch_size: int = 2) -> list[dict]:
    loader = DataLoader(
        share, batch_size=batch_size, collate_fn=PositionCollator(collate), num_workers=workers
    )
    found = []
    for batch in loader:
        found.append(batch)
        if len(found) == number:
            return found
    raise AssertionError("a share has no end")


def note(share, batches) -> None:
    """As the trainer does with batches that it trains on."""
    for batch in batches:
        position = batch[POSITION]
        share.positions[position.worker] = position


class TestShares:
    @pytest.mark.parametrize(("ranks", "shards"), [(2, 4), (4, 4), (2, 3), (3, 1)])
    def test_processes_have_all_windows_between_them_once(self, ranks, shards):
        """One epoch of each: its tokens are those of its own documents."""
        documents = [tuple(document) for document in make_documents(40)]
        read = []
        for rank in range(ranks):
            share = StreamShare(new_stream(shards=shards), rank=rank, ranks=ranks)
            read.append([tuple(row["input_ids"]) for row in share.stream.documents])
        assert sorted(row for rows in read for row in rows) == sorted(documents)
        assert max(map(len, read)) - min(map(len, read)) <= 1 or shards % ranks

    def test_a_process_encodes_its_own_documents_only(self, monkeypatch):
        encoded, encode = [], packing._encode
        monkeypatch.setattr(
            packing, "_encode", lambda values, *args: encoded.extend(values) or encode(values, *args)
        )
        share = StreamShare(new_stream(), rank=1, ranks=2)
        windows = sum(len(document) + 1 for document in make_documents(40)) // WINDOW
        batches_of(share, windows // 4)
        assert len({tuple(values) for values in encoded}) <= 20

    def test_it_goes_on_with_the_next_epoch(self):
        share = StreamShare(new_stream(4), rank=0, ranks=1)
        tokens = sum(len(document) + 1 for document in make_documents(4))
        first = tokens // WINDOW
        windows = [batch["input_ids"] for batch in batches_of(share, 2 * first, batch_size=1)]
        assert all(torch.equal(windows[i], windows[i + first]) for i in range(first))
        assert share.stream.documents.epoch == 0  # the caller's stays

    def test_nothing_to_read_is_said(self):
        share = StreamShare(new_stream(2, shards=2), rank=0, ranks=2)
        share.stream.window = 1000
        with pytest.raises(ValueError, match="Worker 0 of process 0 has not one window of 1000 tokens"):
            next(iter(share))


class TestResuming:
    @pytest.mark.parametrize("workers", [0, 2, 3])
    @pytest.mark.parametrize("given", [1, 5, 8, 30])
    def test_it_goes_on_with_the_very_next_batch(self, workers, given):
        share = StreamShare(new_stream(), rank=0, ranks=1, workers=workers)
        whole = batches_of(share, given + 7, workers=workers)
        note(share, whole[:given])
        state = json.loads(json.dumps(share.state_dict()))

        resumed = StreamShare(new_stream(), rank=0, ranks=1, workers=workers)
        resumed.load_state_dict(state, windows=2 * given)
        found = batches_of(resumed, given + 7, workers=workers)
        assert all(batch == {POSITION: None} for batch in found[:given])
        for one, two in zip(whole[given:], found[given:], strict=True):
            assert torch.equal(one["input_ids"], two["input_ids"])

    def test_nothing_is_encoded_again(self, monkeypatch):
        share = StreamShare(new_stream(), rank=0, ranks=1)
        note(share, batches_of(share, 20))
        encoded, encode = [], packing._encode
        monkeypatch.setattr(
            packing, "_encode", lambda values, *args: encoded.extend(values) or encode(values, *args)
        )
        resumed = StreamShare(new_stream(), rank=0, ranks=1)
        resumed.load_state_dict(share.state_dict(), windows=40)
        batches_of(resumed, 21)
        assert len(encoded) <= 8  # the batch of documents that it stood in, and the next

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"workers": 2}, "workers: 2, expected 0"),
            ({"windows": 30}, "windows trained on: 30, expected 10"),
            ({"ranks": 2}, "ranks: 2, expected 1"),
        ],
    )
    def test_another_division_is_refused(self, change, message):
        share = StreamShare(new_stream(), rank=0, ranks=1)
        note(share, batches_of(share, 5))
        windows = change.pop("windows", 10)
        other = StreamShare(new_stream(), **{"rank": 0, "ranks": 1} | change)
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(share.state_dict(), windows=windows)

    def test_a_shuffle_buffer_is_in_no_state(self):
        """Then `Trainer` skips the windows before by reading them once more, which is exact."""
        stream = new_stream()
        stream.documents = stream.documents.shuffle(seed=0, buffer_size=3)
        share = StreamShare(stream, rank=0, ranks=1)
        note(share, batches_of(share, 3))
        assert share.state_dict() is None

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_trainer_resumes_bit_for_bit(self, tmp_path, workers):
        changes = {"dataloader_num_workers": workers, "remove_unused_columns": False}
        runs = run_resumed(tmp_path, new_stream, **changes)
        whole, resumed = runs["whole"], runs["resumed"]
        for name, weight in whole["weights"].items():
            assert torch.equal(resumed["weights"][name], weight), name
        assert len(resumed["batches"]) == 4 and whole["pool_sizes"][6:] == resumed["pool_sizes"]
        for one, two in zip(whole["batches"][6:], resumed["batches"], strict=True):
            assert torch.equal(one["input_ids"], two["input_ids"])
        assert (tmp_path / "whole" / "checkpoint-3" / "stream_share_0.json").is_file()


def test_there_are_no_more_workers_than_shards(tmp_path):
    trainer = make_trainer(
        tiny_model(**DRAWN), tmp_path, new_stream(shards=2), max_steps=1, dataloader_num_workers=5
    )
    assert trainer.get_train_dataloader().num_workers == 2
