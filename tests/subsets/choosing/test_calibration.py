"""Calibration text to batches: which tokens are read, and which count."""

import pytest
import torch
from conftest import TOY
from transformers import AutoTokenizer
from transformers_emo.subsets.choosing.calibration import Example, doubling, encode, make_batches, read_column

CHAT = [
    {"role": "user", "content": "One and one?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Thanks."},
]
TEMPLATE = (
    "{% for message in messages %}{{ message.role + '\\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content + '\\n' }}{% endif %}{% endfor %}"
)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(TOY)


def counted(example, tokenizer):
    return tokenizer.decode([i for i, counts in zip(example.ids, example.counts, strict=True) if counts])


def test_prompts_and_answers_are_told_apart(tokenizer):
    parts = {"all": "One and one is two.", "prompt": "One and one is", "answer": " two."}
    for tokens, text in parts.items():
        [example] = encode(["One and one is"], [" two."], tokenizer, tokens, 256)
        assert tokenizer.decode(example.ids) == "One and one is two."
        assert counted(example, tokenizer) == text


def test_a_long_prompt_is_cut_on_the_left_of_its_answer(tokenizer):
    [example] = encode(["One and one is " * 50], [" two."], tokenizer, "answer", 20)
    assert len(example.ids) == 20 and counted(example, tokenizer) == " two."


def test_chats_go_through_the_template(tokenizer):
    with pytest.raises(ValueError, match="no chat template"):
        encode([CHAT], None, tokenizer, "all", 256)
    tokenizer.chat_template = TEMPLATE
    [example] = encode([CHAT], None, tokenizer, "all", 256)
    assert counted(example, tokenizer) == "user\nOne and one?\nassistant\nTwo.<eos>user\nThanks.\n"
    [example] = encode([CHAT], None, tokenizer, "answer", 256)
    assert counted(example, tokenizer) == "Two.<eos>"
    [example] = encode([CHAT], None, tokenizer, "prompt", 256)
    assert counted(example, tokenizer) == "user\nOne and one?\nassistant\n"


@pytest.mark.parametrize(
    ("texts", "answers", "message"),
    [
        (["a", CHAT], None, "texts and chats mixed"),
        (["a", 3], None, "holds a int"),
        (["a"], ["b", "c"], "has 2 entries for 1 texts"),
        ([CHAT], ["b"], "none for chats"),
    ],
)
def test_what_is_no_text_is_refused(tokenizer, texts, answers, message):
    with pytest.raises(ValueError, match=message):
        encode(texts, answers, tokenizer, "all", 256)


def test_batches_are_cut_by_texts_and_by_tokens():
    examples = [Example([7] * n, [True] * n) for n in (3, 1, 2, 8000, 300, 1)]
    batches = make_batches(examples, 2, "token")
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(2, 3), (1, 2), (1, 8000), (2, 300)]
    assert [int(batch.attention_mask.sum()) for batch in batches] == [4, 2, 8000, 301]
    for batch in batches:
        assert torch.equal(batch.weight, batch.attention_mask.double())


def test_parts_double():
    assert [len(part) for part in doubling(range(11))] == [1, 1, 2, 4, 3]
    assert doubling(range(3), None) == [[0, 1, 2]] and doubling([], None) == doubling([]) == []


def test_rows_and_lines_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"Row 1 of the dataset lacks the column 'text': it has \['txt'\]"):
        read_column([{"text": "a"}, {"txt": "b"}], ["text"])
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n')
    with pytest.raises(ValueError, match="Line 3 of .* is no JSON"):
        read_column(path, ["text"])
    assert read_column(path, ["text"], 1) == [["a"]]
