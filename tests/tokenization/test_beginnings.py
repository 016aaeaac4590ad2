"""The first tokens of texts of any length: those of the whole text, without encoding all of it."""

import random

import pytest
from conftest import TOY
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers_emo.tokenization import beginnings
from transformers_emo.tokenization.beginnings import encode_beginnings


class Counted:
    """A tokenizer, and how many characters each of its calls has encoded."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, []

    def __call__(self, texts, **settings):
        self.calls.append(sum(map(len, texts)))
        return self.tokenizer(texts, **settings)


TOKENIZER = AutoTokenizer.from_pretrained(TOY)


@pytest.fixture
def tokenizer():
    return TOKENIZER


def whole(tokenizer, texts: list[str], max_length: int) -> list[list[int]]:
    return tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]


@pytest.mark.parametrize(
    "text",
    ["word " * 40_000, "x" * 100_000, "\n" * 100_000, "ab\u0301\U0001f600" * 30_000, " 1234567890" * 9_000],
    ids=["words", "one letter", "lines", "marks and pictures", "digits"],
)
@pytest.mark.parametrize("max_length", [1, 7, 300])
def test_of_a_long_text_they_are_those_of_the_whole(tokenizer, text, max_length):
    texts = ["short", text, "", text[1:]]
    found = [ids.tolist() for ids in encode_beginnings(tokenizer, texts, max_length)]
    assert found == whole(tokenizer, texts, max_length)


@settings(max_examples=50)
@given(st.text("ab \n'!0\u00e9\U0001f600", min_size=1, max_size=9), st.integers(0, 2**32))
def test_of_any_text(letters, seed):
    text = "".join(random.Random(seed).choices(letters, k=15_000))
    found = [ids.tolist() for ids in encode_beginnings(TOKENIZER, [text], 9)]
    assert found == whole(TOKENIZER, [text], 9)


def test_a_long_text_is_encoded_only_as_far_as_it_is_needed(tokenizer):
    counted = Counted(tokenizer)
    [ids] = encode_beginnings(counted, ["word " * 1_000_000], 512)
    assert len(ids) == 512 and sum(counted.calls) < 100_000


def test_many_texts_are_encoded_in_groups(tokenizer, monkeypatch):
    monkeypatch.setattr(beginnings, "GROUP", 5_000)
    counted = Counted(tokenizer)
    texts = [f"text number {n}: " + "word " * (n % 50) for n in range(400)]
    found = [ids.tolist() for ids in encode_beginnings(counted, texts, 4096)]
    assert found == whole(tokenizer, texts, 4096)
    assert max(counted.calls) <= 5_000 and len(counted.calls) > 3


def test_texts_are_read_as_they_are_needed(tokenizer, monkeypatch):
    monkeypatch.setattr(beginnings, "GROUP", 10)
    read = []
    texts = (read.append(n) or "some words" for n in range(1000))
    encoded = encode_beginnings(tokenizer, texts, 16)
    next(encoded)
    assert len(read) < 5
