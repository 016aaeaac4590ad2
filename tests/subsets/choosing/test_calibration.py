"""Calibration text to batches: which tokens are read, and which count."""

import json
from itertools import count
from pathlib import Path

import datasets
import pytest
import torch
from conftest import TOY
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers_emo import select_experts
from transformers_emo.subsets.choosing.calibration import CalibrationText, read_column
from transformers_emo.subsets.choosing.calibration_batches import Example, doubling, encode, make_batches

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
def test_texts_that_are_no_texts_are_refused(texts, answers, message):
    with pytest.raises(ValueError, match=message):
        CalibrationText(texts, answers=answers)


def test_batches_are_limited_by_texts_and_by_tokens():
    examples = [Example([7] * n, [True] * n) for n in (3, 1, 2, 8000, 300, 1)]
    batches = make_batches(examples, 2, "token")
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(2, 3), (1, 2), (1, 8000), (2, 300)]
    assert [int(batch.attention_mask.sum()) for batch in batches] == [4, 2, 8000, 301]
    for batch in batches:
        assert torch.equal(batch.weight, batch.attention_mask.double())


def test_parts_double_the_text_taken():
    assert [len(part) for part in doubling(range(11))] == [1, 1, 2, 4, 3]
    assert doubling([]) == []


def test_rows_and_lines_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"Row 1 of the dataset lacks the column 'text': it has \['txt'\]"):
        read_column([{"text": "a"}, {"txt": "b"}], ["text"])
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n')
    with pytest.raises(ValueError, match="Line 3 of .* is no JSON"):
        read_column(path, ["text"])
    assert read_column(path, ["text"], 1) == [["a"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"texts": ["a"], "tokens": "labels"},
            "Unknown tokens 'labels', expected one of all",
        ),
        ({"texts": ["a"], "weight_by": "word"}, "Unknown weight_by 'word'"),
        ({"texts": ["a"], "batch_size": 0}, "`batch_size` is 0, expected an integer from 1"),
        ({"texts": ["a"], "dataset": [{"text": "b"}]}, "there are `texts` and `dataset`"),
        ({"texts": ["a"], "labels": [[1]]}, "`labels` goes with `input_ids`"),
        ({"texts": ["a"], "tokens": "prompt"}, "give `answers`, chats or `labels`"),
        ({"input_ids": [[5, 6]], "tokens": "prompt"}, "give `labels` too"),
        ({"input_ids": [[5, 6]], "attention_mask": [[1]]}, "expected the same"),
        ({"input_ids": [[[5, 6], [7]]]}, "`input_ids` holds no batches of numbers .*: give tensors"),
        ({"input_ids": [[[[5]]]]}, r"a batch of shape \(1, 1, 1\), expected \(B, S\)"),
        ({"input_ids": [5, 6, 7]}, r"a batch of shape \(\), expected \(B, S\): put the ids of one text in"),
        ({"input_ids": 5}, "`input_ids` holds no batches of numbers"),
    ],
)
def test_calibration_text_checks_itself_when_it_is_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        CalibrationText(**arguments)


def test_calibration_text_is_checked_before_a_model_is_looked_for():
    with pytest.raises(ValueError, match="give `answers`"):
        select_experts("user/no-such-model", ["a"], 4, tokens="answer")
    with pytest.raises(ValueError, match="there are none"):
        select_experts("user/no-such-model", num_experts=4)


def test_calibration_text_can_replace_the_arguments_of_select_experts():
    arguments = {"answers": [" two.", " three."], "tokens": "answer", "max_texts": 1}
    texts = ["One and one is", "One and two is"]
    expected = select_experts(TOY, texts, 8, progress=False, **arguments)
    calibration = CalibrationText(texts, **arguments)
    assert calibration.texts == texts[:1] and calibration.answers == [" two."]
    assert select_experts(TOY, calibration, 8, progress=False) == expected
    assert select_experts(TOY, calibration, 8, tokens="all", progress=False) == expected
    with pytest.raises(ValueError, match="`max_length` is given in addition to a `CalibrationText`"):
        select_experts(TOY, calibration, 8, max_length=5)
    with pytest.raises(ValueError, match="`input_ids` is given in addition"):
        select_experts(TOY, calibration, 8, input_ids=torch.tensor([[5, 6]]))


def test_a_dataset_is_checked_like_texts_once_it_is_read(make_model, tokenizer):
    config, rows = make_model().config, [{"text": "a", "answer": "b"}, {"text": 3, "answer": "b"}]
    with pytest.raises(ValueError, match="holds a int"):
        CalibrationText(dataset=rows).batches(config, lambda: tokenizer)
    with pytest.raises(ValueError, match="give `answers`, chats or `labels`"):
        CalibrationText(dataset=rows[:1], tokens="answer").batches(config, lambda: tokenizer)


def test_the_tokenizer_of_the_model_is_looked_for_only_if_it_is_needed(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(TOY)
    not_needed = lambda: pytest.fail("looked for")  # noqa: E731
    for calibration in (
        CalibrationText("1+1", tokenizer=tokenizer),
        CalibrationText(input_ids=[tokenizer("1+1")["input_ids"]]),
    ):
        [[batch]] = calibration.batches(model.config, not_needed)
        assert tokenizer.decode(batch.input_ids[0]) == "1+1"


class TestWhatCanBeReadOnlyOnce:
    """Generators, streams and files give what lists give, and are not empty the second time."""

    TEXTS = ("import os", "Theorem plus", "1+1=2")

    def choose(self, *args, **kwargs):
        return select_experts(TOY, *args, num_experts=8, progress=False, **kwargs)

    @pytest.fixture(scope="class")
    def expected(self):
        return self.choose(list(self.TEXTS))

    def rows(self):
        return ({"text": text, "number": 1} for text in self.TEXTS)

    def stream(self):
        return datasets.Dataset.from_list(list(self.rows())).to_iterable_dataset()

    def files(self, tmp_path):
        (tmp_path / "lines.txt").write_text("\r\n".join(self.TEXTS) + "\r\n", newline="")
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.rows()))
        return tmp_path / "lines.txt", tmp_path / "rows.jsonl"

    def test_texts_may_be_a_generator_a_stream_or_a_file(self, expected, tmp_path):
        lines, rows = self.files(tmp_path)
        with open(lines) as file, open(rows) as of_rows, open(rows, "rb") as binary:
            for kwargs in (
                {"texts": iter(self.TEXTS)},
                {"texts": (text for text in self.TEXTS)},
                {"texts": map(str, self.TEXTS)},
                {"texts": self.stream()},
                {"texts": datasets.Dataset.from_list(list(self.rows()))},
                {"texts": list(self.rows())},
                {"texts": self.rows()},
                {"texts": file},
                {"dataset": self.rows()},
                {"dataset": of_rows},
                {"dataset": binary},
            ):
                subset = self.choose(**kwargs)
                assert subset.experts == expected.experts and subset.num_texts == 3, kwargs

    def test_a_calibration_text_can_be_used_again(self, expected):
        for text in (
            CalibrationText(iter(self.TEXTS)),
            CalibrationText(self.rows()),
            CalibrationText(dataset=self.rows()),
            CalibrationText(dataset=iter(self.stream())),
        ):
            for _ in range(2):
                assert self.choose(text).experts == expected.experts

    def test_what_was_used_up_is_no_text(self):
        texts = iter(self.TEXTS)
        self.choose(texts)
        with pytest.raises(ValueError, match="can be read only once"):
            self.choose(texts)

    def test_no_more_is_taken_than_asked_for(self):
        texts = iter(self.TEXTS)
        assert CalibrationText(texts, answers=("a" for _ in count()), max_texts=2).answers == ["a", "a"]
        assert next(texts) == "1+1=2"
        assert self.choose(f"text {i}" for i in range(3)).num_texts == 3
        assert CalibrationText((str(i) for i in count()), max_texts=2).texts == ["0", "1"]

    def test_chats_of_a_generator(self):
        assert CalibrationText(iter(CHAT)).texts == [CHAT]
        assert CalibrationText(iter(CHAT), max_texts=1).texts == [CHAT]
        assert CalibrationText(iter([CHAT, CHAT])).texts == [CHAT, CHAT]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"texts": {"text": ["a", "b"]}}, "is a dict with \\['text'\\]"),
            ({"texts": Path("file.txt")}, "give a file as `dataset='file.txt'`"),
            ({"texts": 5}, "`texts` is a int, expected texts"),
            ({"texts": [{"text": "a", "answer": "b"}], "answers": ["b"]}, "`answer_column`"),
            ({"texts": iter([b"a"])}, "a bytes"),
        ],
    )
    def test_what_holds_no_texts_is_refused(self, settings, message):
        with pytest.raises(ValueError, match=message):
            CalibrationText(**settings)
