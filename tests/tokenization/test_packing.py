"""Packing: nothing is lost but the dropped tail, and every document ends in one EOS."""

import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers_emo import EmoTokenizer
from transformers_emo.tokenization import PackedStream, pack_dataset, pack_documents

TOY = Path(__file__).parents[2] / "model_cards" / "toy-emo"
TEXTS = [
    "One document.",
    "",
    "A page that ends in <eos>",
    "Another, a little longer than the first one.",
    "日本",
]
EOS = 9
ids = st.integers(min_value=0, max_value=EOS)
some_documents = st.lists(st.lists(ids, max_size=12), max_size=12)
windows_of = st.integers(min_value=1, max_value=7)


@pytest.fixture(scope="module", autouse=True)
def no_progress_bars():
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def toy():
    return EmoTokenizer.from_pretrained(TOY)


@pytest.fixture
def write_jsonl(tmp_path):
    """Write files of texts, one shard each."""

    def write(*shards):
        for index, texts in enumerate(shards):
            lines = [json.dumps({"text": text, "source": index}) for text in texts]
            (tmp_path / f"{index}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return [str(tmp_path / f"{index}.jsonl") for index in range(len(shards))]

    return write


def ended(documents):
    """Every document with one EOS at its end, by plain loops."""
    joined = []
    for document in documents:
        document = list(document)
        while document and document[-1] == EOS:
            document.pop()
        joined += [*document, EOS]
    return joined


def joined(windows):
    return [token for item in windows for token in np.asarray(item["input_ids"]).tolist()]


def as_lists(windows):
    return [item["input_ids"].tolist() for item in windows]


@given(some_documents, windows_of)
def test_windows_are_the_documents_one_after_the_other(documents, window):
    windows, rest = pack_documents(documents, eos_token_id=EOS, window=window)
    assert windows.dtype == rest.dtype == np.int64 and windows.shape[1] == window and len(rest) < window
    assert windows.flatten().tolist() + rest.tolist() == ended(documents)


@given(some_documents, some_documents, windows_of)
def test_what_is_left_over_begins_the_next_window(first, second, window):
    windows, rest = pack_documents(first, eos_token_id=EOS, window=window)
    more, rest = pack_documents(second, eos_token_id=EOS, window=window, rest=rest)
    at_once, rest_at_once = pack_documents(first + second, eos_token_id=EOS, window=window)
    assert np.concatenate([windows, more]).tolist() == at_once.tolist()
    assert rest.tolist() == rest_at_once.tolist()


@given(
    st.lists(st.lists(ids, max_size=12), min_size=1, max_size=12),
    windows_of,
    st.integers(1, 5),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_datasets_and_streams_lose_nothing_but_the_tail(documents, window, batch_size, drop_last):
    expected = ended(documents)
    if drop_last:
        expected = expected[: len(expected) // window * window]
    rows = datasets.Dataset.from_dict(
        {"tokens": documents}, features=datasets.Features({"tokens": datasets.List(datasets.Value("int64"))})
    )
    options = {"eos_token_id": EOS, "column": "tokens", "window": window}
    options |= {"drop_last": drop_last, "batch_size": batch_size}
    stream = pack_dataset(rows.to_iterable_dataset(), **options)
    assert joined(stream) == expected == joined(stream)
    if expected:
        packed = pack_dataset(rows, **options)
        assert joined(packed) == expected
        assert {len(item["input_ids"]) for item in packed.select(range(len(expected) // window))} <= {window}
        assert as_lists(packed) == as_lists(stream)
    else:
        with pytest.raises(ValueError, match="do not fill one window"):
            pack_dataset(rows, **options)


def test_texts_end_in_one_eos_whatever_they_hold(toy):
    packed = pack_dataset(
        datasets.Dataset.from_dict({"text": TEXTS}), tokenizer=toy, window=5, drop_last=False
    )
    tokens = np.array(joined(packed))
    assert (tokens == toy.eos_token_id).sum() == len(TEXTS)
    documents = np.split(tokens, np.flatnonzero(tokens == toy.eos_token_id) + 1)[:-1]
    assert [toy.decode(document[:-1]) for document in documents] == TEXTS


def test_the_number_of_processes_changes_nothing(toy, write_jsonl, tmp_path):
    texts = datasets.load_dataset(
        "json", data_files=write_jsonl(TEXTS * 5, TEXTS * 3), split="train", cache_dir=str(tmp_path / "cache")
    )
    one = pack_dataset(texts, tokenizer=toy, window=32, batch_size=3)
    two = pack_dataset(texts, tokenizer=toy, window=32, batch_size=3, num_proc=2)
    assert as_lists(one) == as_lists(two) and len(one) > 4
    assert one.column_names == ["input_ids"] and one.features["input_ids"].feature.dtype == "int32"
    again = pack_dataset(texts, tokenizer=toy, window=32, batch_size=3)
    assert one.cache_files == again.cache_files != []


def test_shuffled_and_chosen_documents_are_packed_in_their_order():
    rows = datasets.Dataset.from_dict({"input_ids": [[1], [2, 2], [3, 3, 3], [4]], "other": list("abcd")})
    packed = pack_dataset(rows.select([3, 1, 2]).with_format("torch"), eos_token_id=EOS, window=3)
    assert as_lists(packed) == [[4, EOS, 2], [2, EOS, 3], [3, 3, EOS]]


@pytest.mark.parametrize("kind", ["json", "parquet", "text"])
def test_files_stream_as_they_load(kind, toy, tmp_path):
    rows = datasets.Dataset.from_dict({"text": [text for text in TEXTS if text]})
    if kind == "text":
        (tmp_path / "file").write_text("\n".join(rows["text"]), encoding="utf-8")
    else:
        getattr(rows, f"to_{kind}")(tmp_path / "file")
    stream = datasets.load_dataset(kind, data_files=str(tmp_path / "file"), split="train", streaming=True)
    options = {"tokenizer": toy, "window": 6, "batch_size": 2}
    assert as_lists(pack_dataset(stream, **options)) == as_lists(pack_dataset(rows, **options))


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("kind", ["json", "memory"])
def test_a_stream_continues_bit_for_bit_after_every_window(kind, drop_last, toy, write_jsonl):
    def make():
        if kind == "json":
            stream = datasets.load_dataset("json", data_files=files, split="train", streaming=True)
        else:
            stream = datasets.Dataset.from_dict({"text": TEXTS * 2}).to_iterable_dataset(num_shards=2)
        return pack_dataset(stream, tokenizer=toy, window=7, batch_size=3, drop_last=drop_last)

    files = write_jsonl(TEXTS, TEXTS[::-1])
    states, whole, stream = [make().state_dict()], [], make()
    for item in stream:
        whole.append(item["input_ids"].tolist())
        states.append(json.loads(json.dumps(stream.state_dict())))
    assert len(whole) > 8 and (len(whole[-1]) == 7) == drop_last
    for count, state in enumerate(states):
        stream = make()
        stream.load_state_dict(state)
        assert stream.state_dict() == state
        assert as_lists(stream) == whole[count:]
        assert as_lists(stream) == whole  # a state counts once
        if count + 1 < len(states):  # and what goes on makes the states that the whole made
            stream.load_state_dict(state)
            next(iter(stream))
            again = make()
            again.load_state_dict(stream.state_dict())
            assert as_lists(again) == whole[count + 1 :]


def test_a_state_belongs_to_its_epoch():
    rows = datasets.Dataset.from_dict({"input_ids": [[token] for token in range(8)]})
    documents = rows.to_iterable_dataset(num_shards=8).shuffle(seed=0, buffer_size=1)
    stream = pack_dataset(documents, eos_token_id=EOS, window=3, batch_size=2)
    first = as_lists(stream)
    stream.set_epoch(1)
    second = as_lists(stream)
    assert first != second
    windows = iter(stream)
    next(windows)
    state = stream.state_dict()
    other = pack_dataset(documents, eos_token_id=EOS, window=3, batch_size=2)
    other.set_epoch(0)
    other.load_state_dict(state)
    assert as_lists(other) == second[1:]
    other.load_state_dict(state)
    other.set_epoch(0)
    assert as_lists(other) == first


def test_workers_share_the_shards(toy, write_jsonl):
    files = write_jsonl(TEXTS * 3, TEXTS[::-1] * 3)
    shards = [
        pack_dataset(
            datasets.load_dataset("json", data_files=file, split="train", streaming=True),
            tokenizer=toy,
            window=8,
        )
        for file in files
    ]
    stream = pack_dataset(
        datasets.load_dataset("json", data_files=files, split="train", streaming=True),
        tokenizer=toy,
        window=8,
    )
    seen = as_lists(DataLoader(stream, batch_size=None, num_workers=2))
    assert sorted(seen) == sorted(as_lists(shards[0]) + as_lists(shards[1]))


def test_a_state_belongs_to_its_worker():
    stream = pack_dataset(
        datasets.Dataset.from_dict({"input_ids": [[5, 6]]}).to_iterable_dataset(), eos_token_id=EOS, window=2
    )
    stream.load_state_dict(stream.state_dict() | {"worker": "1 of 2"})
    with pytest.raises(ValueError, match="made by worker 1 of 2 .* load it where the stream is iterated"):
        next(iter(stream))


def test_misuse_is_named(toy):
    rows = datasets.Dataset.from_dict({"text": ["a"], "input_ids": [[1]]})
    with pytest.raises(ValueError, match="`window` is 0"):
        pack_documents([[1]], eos_token_id=EOS, window=0)
    with pytest.raises(ValueError, match=r"Document 1 .* str .* need a `tokenizer`"):
        pack_documents([[1], "text"], eos_token_id=EOS)
    with pytest.raises(ValueError, match="either `tokenizer`"):
        pack_dataset(rows)
    with pytest.raises(ValueError, match="either `tokenizer`"):
        pack_dataset(rows, tokenizer=toy, eos_token_id=EOS)
    with pytest.raises(ValueError, match=r"no column 'body', only \['input_ids', 'text'\]"):
        pack_dataset(rows, tokenizer=toy, column="body")
    with pytest.raises(ValueError, match="no column 'body'"):
        list(pack_dataset(rows.to_iterable_dataset(), tokenizer=toy, column="body"))
    with pytest.raises(ValueError, match=r"column 'input_ids' holds a list, expected texts"):
        pack_dataset(rows, tokenizer=toy, column="input_ids")
    with pytest.raises(ValueError, match="need a `tokenizer`"):
        pack_dataset(rows, eos_token_id=EOS, column="text")
    with pytest.raises(ValueError, match="holds a NoneType"):
        list(
            pack_dataset(
                datasets.Dataset.from_dict({"text": ["a", None]}).to_iterable_dataset(), tokenizer=toy
            )
        )
    with pytest.raises(ValueError, match="The 0 documents do not fill one window"):
        pack_dataset(rows.select([]), eos_token_id=EOS)
    with pytest.raises(TypeError, match=r"A DatasetDict .* `dataset\['train'\]`"):
        pack_dataset(datasets.DatasetDict(train=rows), eos_token_id=EOS)


@pytest.mark.parametrize("wrong", [-3, 2**31, 2**40])
def test_ids_that_no_token_can_have_are_refused(wrong):
    documents = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7], [5, wrong]]})
    with pytest.raises(ValueError, match=f"ids from .*{wrong}.*: expected 0 to 2147483647"):
        pack_dataset(documents, eos_token_id=EOS, window=2)


def test_without_datasets_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="`pip install 'datasets"):
        pack_dataset([], eos_token_id=EOS)


def test_packing_a_stream_gives_a_packed_stream():
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2]]})
    assert isinstance(pack_dataset(rows.to_iterable_dataset(), eos_token_id=EOS), PackedStream)
