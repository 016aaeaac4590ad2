"""Fine-tuning on answers: the ids that generation sees, and a loss that only the answers have a say in."""

import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from tolerances import assert_same_numbers
from transformers import Trainer, TrainingArguments
from transformers_emo import EmoForCausalLM, EmoTokenizer
from transformers_emo.tokenization import encode_answers
from transformers_emo.tokenization.answers import _cut, _pack_batch
from transformers_emo.training import DocumentCollator, KeepFrozenRows, train_only

TOY = Path(__file__).parents[2] / "model_cards" / "toy-emo"
PAIRS = [
    ("The capital of France is", " Paris."),
    ("2+2=", "4"),
    ("Translate to Japanese: Japan\n", "日本"),
    ("A longer prompt, of which little stays when the length is short:", " a short answer"),
    ("Stop.", "<eos>"),
]
# What the assistant writes, with its end, is marked; as in most templates a line end stands before it.
TEMPLATE = (
    "{% for message in messages %}{{ '[' + message.role + ']\\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + eos_token }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message.content + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "The capital of France?"},
    {"role": "assistant", "content": "Paris, of course."},
    {"role": "user", "content": "And of Italy?"},
    {"role": "assistant", "content": "Rome."},
]
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@pytest.fixture(scope="module", autouse=True)
def no_progress_bars():
    datasets.disable_progress_bars()


@pytest.fixture
def toy():
    return EmoTokenizer.from_pretrained(TOY, chat_template=TEMPLATE)


def pairs_of(pairs):
    prompts, answers = zip(*pairs, strict=True)
    return datasets.Dataset.from_dict({"prompt": list(prompts), "answer": list(answers)})


def chats_of(*chats):
    return datasets.Dataset.from_dict({"messages": list(chats)})


def as_lists(rows):
    return [{name: value.tolist() for name, value in row.items()} for row in rows]


def answers_in(row, tokenizer):
    """The text of each run of labels."""
    labels = np.asarray(row["labels"])
    runs = np.split(labels, np.flatnonzero(np.diff(labels != -100)) + 1)
    return [tokenizer.decode(run) for run in runs if run[0] != -100]


# Prompts and answers


def test_a_prompt_has_the_ids_of_inference_and_the_answer_ends_in_one_eos(toy):
    rows = encode_answers(pairs_of(PAIRS), tokenizer=toy)
    assert rows.column_names == ["input_ids", "labels", "seq_lengths"] and len(rows) == len(PAIRS)
    for row, (prompt, answer) in zip(rows, PAIRS, strict=True):
        ids, labels = row["input_ids"], row["labels"]
        seen = toy(prompt)["input_ids"]
        assert ids[: len(seen)].tolist() == seen and (labels[: len(seen)] == -100).all()
        assert (labels[len(seen) :] == ids[len(seen) :]).all() and (ids == toy.eos_token_id).sum() == 1
        assert toy.decode(ids[len(seen) :]) == answer.removesuffix("<eos>") + "<eos>"
        assert row["seq_lengths"].tolist() == [len(ids)]
    assert {feature.feature.dtype for feature in rows.features.values()} == {"int32"}


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=5), st.integers(1, 30))
@settings(max_examples=30, deadline=None)
def test_rows_are_prompt_then_answer_and_lose_only_what_is_too_much(pairs, max_length):
    toy = EmoTokenizer.from_pretrained(TOY)
    expected = []
    for prompt, answer in pairs:
        answer_ids = toy(answer)["input_ids"] + [toy.eos_token_id]
        prompt_ids = toy(prompt)["input_ids"]
        if len(answer_ids) < max_length:
            prompt_ids = prompt_ids[-(max_length - len(answer_ids)) :]
            labels = [-100] * len(prompt_ids) + answer_ids
            expected.append(
                {"input_ids": prompt_ids + answer_ids, "labels": labels, "seq_lengths": [len(labels)]}
            )
    if expected:
        rows = encode_answers(pairs_of(pairs), tokenizer=toy, max_length=max_length)
        assert as_lists(rows) == expected
    else:
        with pytest.raises(ValueError, match=f"All {len(pairs)} examples would be left out"):
            encode_answers(pairs_of(pairs), tokenizer=toy, max_length=max_length)


def test_no_token_stands_on_both_sides_of_the_boundary(toy):
    separate = [*toy("Th")["input_ids"], *toy("eorem")["input_ids"]]
    assert toy("Theorem")["input_ids"] != separate
    [row] = encode_answers(pairs_of([("Th", "eorem")]), tokenizer=toy)
    assert row["input_ids"].tolist() == [*separate, toy.eos_token_id]


def test_a_tokenizer_that_adds_eos_does_not_end_prompts():
    adding = EmoTokenizer.from_pretrained(TOY, add_eos_token=True)
    assert adding("One")["input_ids"][-1] == adding.eos_token_id
    plain = EmoTokenizer.from_pretrained(TOY)
    of_adding, of_plain = (encode_answers(pairs_of(PAIRS), tokenizer=each) for each in (adding, plain))
    assert as_lists(of_adding) == as_lists(of_plain)


def test_columns_are_chosen_by_name_and_others_are_removed(toy):
    rows = pairs_of(PAIRS).rename_columns({"prompt": "question", "answer": "labels"})
    rows = rows.add_column("id", list(range(len(PAIRS))))
    encoded = encode_answers(rows.with_format("torch"), tokenizer=toy, prompt="question", answer="labels")
    assert as_lists(encoded) == as_lists(encode_answers(pairs_of(PAIRS), tokenizer=toy))


# Chats


def test_every_turn_of_the_assistant_counts_and_nothing_else(toy):
    chat = [*CHAT, {"role": "user", "content": "Thanks."}]
    row, cut = encode_answers(chats_of(CHAT, chat), tokenizer=toy, messages="messages")
    assert answers_in(row, toy) == ["Paris, of course.<eos>", "Rome.<eos>"]
    assert row["input_ids"].tolist() == cut["input_ids"].tolist()  # nothing behind the last answer
    # The ids before each answer are those that generation sees.
    for turn in (2, 4):
        seen = toy.apply_chat_template(CHAT[:turn], add_generation_prompt=True)["input_ids"]
        assert row["input_ids"][: len(seen)].tolist() == seen
        assert row["labels"][len(seen) - 1] == -100 != row["labels"][len(seen)]
    both = toy.apply_chat_template(CHAT, return_assistant_tokens_mask=True)
    assert row["input_ids"].tolist() == both["input_ids"][:-1]  # a line end follows
    assert (row["labels"] != -100).tolist() == [bool(mask) for mask in both["assistant_masks"][:-1]]


def test_an_eos_directly_after_the_marked_part_counts(toy):
    toy.chat_template = TEMPLATE.replace(
        " + eos_token }}{% endgeneration %}", " }}{% endgeneration %}{{ eos_token }}"
    )
    row, _ = encode_answers(chats_of(CHAT, CHAT[:3]), tokenizer=toy, messages="messages")
    assert answers_in(row, toy) == ["Paris, of course.<eos>", "Rome.<eos>"]


def test_an_eos_that_opens_the_next_chat_ends_no_answer(toy):
    toy.chat_template = (
        "{{ eos_token }}{% for message in messages %}"
        "{% generation %}{{ message.content }}{% endgeneration %}{% endfor %}"
    )
    rows = encode_answers(chats_of(CHAT[2:3], CHAT[4:]), tokenizer=toy, messages="messages")
    assert [answers_in(row, toy) for row in rows] == [["Paris, of course."], ["Rome."]]


def test_answers_that_begin_with_a_space_count_where_offsets_leave_spaces_out(toy):
    toy.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    toy.chat_template = (
        "{% for message in messages %}{{ message.role + ':' }}{% if message.role == 'assistant' %}"
        "{% generation %}{{ ' ' + message.content + ' ' }}{% endgeneration %}"
        "{% else %}{{ ' ' + message.content }}{% endif %}{{ '\\n' }}{% endfor %}"
    )
    [row] = encode_answers(chats_of(CHAT), tokenizer=toy, messages="messages")
    assert answers_in(row, toy) == [" Paris, of course. ", " Rome. "]


def test_keys_that_only_some_messages_have_are_not_written(toy):
    toy.chat_template = TEMPLATE.replace(
        "message.content + eos", "(message.name or '') + message.content + eos"
    )
    named = [*CHAT[:4], CHAT[4] | {"name": "Bot: "}]
    [row] = encode_answers(chats_of(named), tokenizer=toy, messages="messages")
    assert answers_in(row, toy) == ["Paris, of course.<eos>", "Bot: Rome.<eos>"]


def test_an_answer_that_lost_its_beginning_is_context_and_no_target(toy):
    [whole] = encode_answers(chats_of(CHAT), tokenizer=toy, messages="messages")
    first = int(np.flatnonzero(whole["labels"] != -100)[0])
    for max_length, expected in [
        (len(whole["labels"]) - first + 1, ["Paris, of course.<eos>", "Rome.<eos>"]),
        (len(whole["labels"]) - first, ["Rome.<eos>"]),  # whole, but with no token before it
        (len(whole["labels"]) - first - 2, ["Rome.<eos>"]),
    ]:
        [row] = encode_answers(chats_of(CHAT), tokenizer=toy, messages="messages", max_length=max_length)
        assert row["input_ids"].tolist() == whole["input_ids"][-max_length:].tolist()
        assert answers_in(row, toy) == expected


@given(
    st.lists(st.lists(st.booleans(), min_size=1, max_size=9).filter(any), min_size=1, max_size=6),
    st.integers(1, 10),
)
def test_cutting_many_examples_at_once_is_cutting_each(examples, max_length):
    expected, token = [], 0
    for is_answer in examples:
        ids = list(range(token, token + len(is_answer)))
        token += len(is_answer)
        while not is_answer[-1]:
            is_answer, ids = is_answer[:-1], ids[:-1]
        is_answer, ids = is_answer[-max_length:], ids[-max_length:]
        labels = [
            token if counts and not all(is_answer[:place]) else -100
            for place, (token, counts) in enumerate(zip(ids, is_answer, strict=True))
        ]
        if set(labels) != {-100}:
            expected.append({"input_ids": ids, "labels": labels, "seq_lengths": [len(ids)]})
    example_T = np.repeat(np.arange(len(examples)), [len(example) for example in examples])
    rows = _cut(np.arange(len(example_T)), example_T, np.concatenate(examples), max_length)
    assert [
        dict(zip(rows, map(np.ndarray.tolist, row), strict=True)) for row in zip(*rows.values(), strict=True)
    ] == expected


# Too long, and wrong


def test_examples_with_too_long_an_answer_are_counted_in_one_warning(toy, caplog):
    pairs = [*PAIRS, ("Count:", " one two three four five six seven eight nine ten"), ("Again:", " word" * 9)]
    with caplog.at_level("WARNING"):
        rows = encode_answers(pairs_of(pairs), tokenizer=toy, max_length=9, batch_size=2)
    assert len(rows) == len(PAIRS) and max(len(row["labels"]) for row in rows) == 9
    assert [record.message.split(":")[0] for record in caplog.records] == ["2 of 7 examples are left out"]
    caplog.clear()
    with caplog.at_level("WARNING"):
        stream = encode_answers(
            pairs_of(pairs).to_iterable_dataset(), tokenizer=toy, max_length=9, batch_size=1
        )
        assert as_lists(stream) == as_lists(rows)
    assert len(caplog.records) == 1 and "`max_length` = 9 tokens or more" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("changes", "options", "error"),
    [
        ({"answer": None}, {}, "Row 3: the column 'answer' holds nothing, expected a text"),
        ({"answer": ""}, {}, "Row 3: the column 'answer' holds an empty text"),
        ({"prompt": ""}, {}, "Row 3: the column 'prompt' holds an empty text"),
        ({"messages": None}, {"messages": "messages"}, "Row 3: the column 'messages' holds nothing"),
        ({"messages": []}, {"messages": "messages"}, "Row 3: .* holds nothing that the assistant writes"),
        ({"messages": CHAT[:2]}, {"messages": "messages"}, "Row 3: .* nothing that the assistant writes"),
        (
            {"messages": [{"role": "assistant", "content": None}]},
            {"messages": "messages"},
            "Row 3: the column 'messages' does not fit the chat template .*content",
        ),
        ({}, {"answer": "number"}, "Row 0: the column 'number' holds a value of type int, expected a text"),
        (
            {},
            {"messages": "prompt"},
            "Row 0: the column 'prompt' holds a value of type str, expected a list of messages",
        ),
        (
            {},
            {"prompt": "messages"},
            "Row 0: the column 'messages' holds a value of type list, expected a text",
        ),
        ({}, {"answer": "completion"}, "no column 'completion', only .* as `answer`"),
        ({}, {"messages": "chat"}, "no column 'chat', only .* as `messages`"),
        ({}, {"max_length": 0}, "`max_length` is 0"),
    ],
)
def test_bad_rows_and_columns_are_named(streaming, changes, options, error, toy):
    good = {"prompt": "One and", "answer": " one", "messages": CHAT, "number": 2}
    rows = datasets.Dataset.from_list([good, good, good, good | changes, good])
    rows = rows.to_iterable_dataset() if streaming else rows
    with pytest.raises(ValueError, match=error):
        list(encode_answers(rows, tokenizer=toy, batch_size=2, **options))


def test_tokenizers_without_what_is_needed_are_refused(toy):
    toy.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"does not mark what the assistant writes.*{% generation %}"):
        encode_answers(chats_of(CHAT), tokenizer=toy, messages="messages")
    toy.chat_template = None
    with pytest.raises(ValueError, match="has no chat template.*set `tokenizer.chat_template`"):
        encode_answers(chats_of(CHAT), tokenizer=toy, messages="messages")
    toy.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        encode_answers(pairs_of(PAIRS), tokenizer=toy)


def test_objects_other_than_datasets_are_refused(toy, monkeypatch):
    with pytest.raises(TypeError, match=r"A DatasetDict .* `dataset\['train'\]`"):
        encode_answers(datasets.DatasetDict(train=pairs_of(PAIRS)), tokenizer=toy)
    with pytest.raises(ValueError, match="no rows"):
        encode_answers(pairs_of(PAIRS).select([]), tokenizer=toy)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="`pip install 'datasets"):
        encode_answers([], tokenizer=toy)


# Datasets and streams


@pytest.mark.parametrize("pack", [False, True])
def test_the_number_of_processes_changes_nothing_and_results_are_cached(pack, toy, tmp_path):
    pairs_of(PAIRS * 5).to_json(tmp_path / "rows.jsonl")
    rows = datasets.load_dataset(
        "json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    options = {"max_length": 16, "batch_size": 4, "pack": pack}
    one = encode_answers(rows, tokenizer=toy, **options)
    two = encode_answers(rows, tokenizer=toy, num_proc=2, **options)
    assert as_lists(one) == as_lists(two) and len(one) > 4
    again = encode_answers(
        rows, tokenizer=EmoTokenizer.from_pretrained(TOY, chat_template=TEMPLATE), **options
    )
    assert one.cache_files == again.cache_files != []
    other = encode_answers(rows, tokenizer=toy, **options | {"max_length": 15})
    assert other.cache_files != one.cache_files


@pytest.mark.parametrize("kind", ["memory", "json", "generator"])
@pytest.mark.parametrize("column", [None, "messages"])
def test_streams_give_the_rows_of_datasets(kind, column, toy, tmp_path):
    rows = chats_of(CHAT, CHAT[:3], CHAT[1:]) if column else pairs_of(PAIRS)
    if kind == "memory":
        stream = rows.to_iterable_dataset()
    elif kind == "json":
        (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        stream = datasets.load_dataset(
            "json", data_files=str(tmp_path / "rows.jsonl"), split="train", streaming=True
        )
    else:
        stream = datasets.IterableDataset.from_generator(lambda: iter(rows.to_list()))
    options = {"tokenizer": toy, "messages": column, "max_length": 12, "batch_size": 2}
    expected = as_lists(encode_answers(rows, **options))
    encoded = encode_answers(stream, **options)
    assert as_lists(encoded) == expected == as_lists(encoded)
    first = next(iter(encoded))
    assert {type(value) for value in first.values()} == {np.ndarray} and first.keys() == expected[0].keys()


def test_a_stream_continues_after_its_last_row(toy):
    rows = pairs_of(PAIRS * 3).to_iterable_dataset()
    stream = encode_answers(rows, tokenizer=toy, max_length=20, pack=True, batch_size=4)
    whole, states = [], []
    for row in stream:
        whole.append(row)
        states.append(json.loads(json.dumps(stream.state_dict())))
    whole = as_lists(whole)
    assert len(whole) > 3
    for count, state in enumerate(states, start=1):
        stream = encode_answers(rows, tokenizer=toy, max_length=20, pack=True, batch_size=4)
        stream.load_state_dict(state)
        assert as_lists(stream) == whole[count:]


# Packed


@given(st.lists(st.integers(1, 7), min_size=1, max_size=20), st.integers(7, 20))
def test_packing_joins_as_many_examples_as_fit(lengths, window):
    ids = [np.full(length, index, dtype=np.int32) for index, length in enumerate(lengths)]
    batch = {"input_ids": ids, "labels": ids, "seq_lengths": [np.array([length]) for length in lengths]}
    packed = _pack_batch(batch, window=window)
    assert np.concatenate(packed["input_ids"]).tolist() == np.concatenate(ids).tolist()
    assert np.concatenate(packed["seq_lengths"]).tolist() == lengths
    totals = [int(row.sum()) for row in packed["seq_lengths"]]
    assert totals == [len(row) for row in packed["input_ids"]] == [len(row) for row in packed["labels"]]
    firsts = [int(row[0]) for row in packed["seq_lengths"]][1:]
    assert max(totals) <= window and all(
        total + first > window for total, first in zip(totals, firsts, strict=False)
    )


def test_no_example_of_a_window_is_predicted_from_the_one_before(toy):
    packed = encode_answers(pairs_of(PAIRS * 2), tokenizer=toy, max_length=24, pack=True)
    assert max(len(row["seq_lengths"]) for row in packed) > 1
    single = encode_answers(pairs_of(PAIRS * 2), tokenizer=toy, max_length=24)
    for name in single.column_names:
        assert np.concatenate(list(packed[name])).tolist() == np.concatenate(list(single[name])).tolist()
    for row in packed:
        begins = row["seq_lengths"].cumsum() - row["seq_lengths"]
        assert (row["labels"][begins] == -100).all()


# Losses and training


def answer_nll(model, row):
    """The negative log-likelihood of each token of the answers of one row, by the plain formula."""
    ids, labels = (torch.as_tensor(row[name]).long() for name in ("input_ids", "labels"))
    log_probs = model(ids[None]).logits[0].double().log_softmax(-1)
    return [-log_probs[place - 1, label] for place, label in enumerate(labels.tolist()) if label != -100]


@torch.no_grad()
@pytest.mark.parametrize("column", [None, "messages"])
def test_the_loss_is_the_mean_cross_entropy_of_answer_tokens(column, toy, make_model):
    model = make_model(vocab_size=4096, eos_token_id=toy.eos_token_id)
    rows = chats_of(CHAT, CHAT[:3]) if column else pairs_of(PAIRS)
    rows = encode_answers(rows, tokenizer=toy, messages=column)
    expected = torch.stack([nll for row in rows for nll in answer_nll(model, row)]).mean()
    for window in (None, 64):  # padded to the longest row, or further
        batch = DocumentCollator(model.config, window=window)(list(rows))
        assert (batch["labels"] == -100).any(dim=1).all()
        assert_same_numbers(model(**batch).loss, expected.float())


def test_padding_and_prompts_do_not_change_the_loss(toy, make_model):
    model = make_model(vocab_size=4096, eos_token_id=toy.eos_token_id)
    batch = DocumentCollator(model.config)(list(encode_answers(pairs_of(PAIRS), tokenizer=toy)))
    outputs = model(**batch)
    outputs.logits.retain_grad()
    outputs.loss.backward()
    predicts = (batch["labels"] != -100)[:, 1:]
    assert (outputs.logits.grad.abs().sum(-1) > 0)[:, :-1].tolist() == predicts.tolist()
    assert not outputs.logits.grad[:, -1].any()
    other = {**batch, "input_ids": batch["input_ids"].where(batch["attention_mask"].bool(), 77)}
    assert_same_numbers(model(**other).loss, outputs.loss)


@torch.no_grad()
def test_examples_of_a_window_have_the_loss_they_have_alone(toy, make_model):
    model = make_model(
        vocab_size=4096, eos_token_id=toy.eos_token_id, document_pool_min=4, document_pool_max=4
    ).train()
    model.config.attention_within_documents = True
    chats = chats_of(
        CHAT, CHAT[:3], CHAT[1:]
    )  # EOS tokens inside: `seq_lengths` must tell the examples apart
    losses = {}
    for pack in (False, True):
        rows = encode_answers(chats, tokenizer=toy, messages="messages", max_length=150, pack=pack)
        batch = DocumentCollator(model.config)(list(rows))
        losses[pack] = model(**batch).ce_loss
    assert len(rows) == 1 and batch["document_ids"].unique().tolist() == [0, 1, 2]
    assert_same_numbers(losses[True], losses[False])


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_loaded_subset_trains_on_answers(streaming, pack, toy, tmp_path):
    subset = [[0, 3, 7, 11, 31], [1, 2, 8, 9, 31], [0, 5, 6, 7, 31], [4, 9, 10, 20, 31]]
    model = EmoForCausalLM.from_pretrained(TOY, expert_subset=subset, attention_within_documents=pack)
    train_only(model, "routed")
    rows = pairs_of(PAIRS * 4)
    rows = encode_answers(
        rows.to_iterable_dataset() if streaming else rows, tokenizer=toy, max_length=64, pack=pack
    )
    calls = []
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    before = {name: value.clone() for name, value in model.named_parameters()}
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, warmup_steps=0.1,
        lr_scheduler_type="linear", remove_unused_columns=False, use_cpu=True, save_strategy="no",
        report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, DocumentCollator(model.config), rows, callbacks=[KeepFrozenRows()])
    result = trainer.train()
    assert result.global_step == len(calls) == 2 and 0 < result.training_loss < 20
    for kwargs in calls:
        assert kwargs["num_items_in_batch"] == (kwargs["labels"] != -100).sum() < kwargs["labels"].numel()
        assert (kwargs["document_ids"].amax() > 0) == pack
    for name, value in model.named_parameters():
        changed = (
            (value != before[name]).flatten(1).any(1) if value.dim() == 3 else (value != before[name]).any()
        )
        if ".mlp.experts." in name:
            assert changed[:-1].any() and not changed[-1], name
        else:
            assert not changed, name
