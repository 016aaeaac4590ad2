"""Encodes prompts with answers, or chats, for fine-tuning with a loss on the answers only.

Shape suffixes: T tokens of all examples one after the other, E examples, P pieces. A piece is a prompt, an
answer, or what a chat template writes between two answers. Each piece is encoded by itself, so that no token
holds both the end of a prompt and the beginning of an answer.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from transformers.utils import logging

from ..imports.transformers_versions import private_names
from .columns import WINDOW, check_at_least_one, check_column, end_documents, eos_id, import_datasets
from .tokenization_emo import EmoTokenizer

with private_names("chats"):
    from transformers.utils.chat_template_utils import render_jinja_template

if TYPE_CHECKING:
    import datasets

logger = logging.get_logger(__name__)

_IGNORED = -100  # the label of a token that does not count
_COLUMNS = ("input_ids", "labels", "seq_lengths")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def encode_answers(
    dataset: "datasets.Dataset | datasets.IterableDataset",
    *,
    tokenizer: EmoTokenizer,
    prompt: str = "prompt",
    answer: str = "answer",
    messages: str | None = None,
    max_length: int = WINDOW,
    pack: bool = False,
    num_proc: int | None = None,
    batch_size: int = 1000,
) -> "datasets.Dataset | datasets.IterableDataset":
    """Encode a dataset for fine-tuning with a loss on the answers only, as the paper fine-tunes subsets.

    A row is a prompt and its answer, or a chat, of which everything that the assistant writes is an answer.

    **Prompts and answers.** The prompt's ids are those of `tokenizer(prompt)`, as in generation. The answer
    is encoded by itself and follows, with one EOS that counts as part of it. An answer that already ends in
    the text of the EOS gets no second one. Texts are taken as they are: the text of a special token
    is that token, and no space is added or removed between the two. EMO's tokens begin with the space before
    a word, so let the answer begin with it and the prompt end without one: `"Answer:"` and `" Paris"`.

    **Chats.** The tokenizer's chat template says what the assistant writes, between `{% generation %}` and
    `{% endgeneration %}`. Every turn counts, with an EOS that directly follows it. What follows the last one
    is left out.

    **Examples of more than `max_length` tokens** are cut on the left. An answer whose beginning is cut off
    does not count, and neither does one without a token before it. An example whose last answer has
    `max_length` tokens or more is left out. One warning says how many were; a stream warns at the first.

    The result trains with `DocumentCollator` and `Trainer`. With `remove_unused_columns=False` an example is
    one document, whatever EOS tokens it holds. Otherwise `Trainer` removes the column `seq_lengths`, and
    documents end at EOS tokens. That changes document pools and attention within documents.

    A `Dataset` is encoded at once, by `num_proc` processes and with progress bars; the result is the same
    for any number of them, and is cached on disk as that of every `Dataset.map`. An `IterableDataset` is
    encoded as it is read. If its columns are not known, its first row is read at once.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): the examples, one a row.
        tokenizer (`EmoTokenizer`): the tokenizer, with a chat template for chats.
        prompt (`str`, defaults to `"prompt"`): the column of prompts, texts.
        answer (`str`, defaults to `"answer"`): the column of answers, texts.
        messages (`str`, *optional*): the column of chats, lists of messages with `role` and `content`,
            instead of prompts and answers.
        max_length (`int`, defaults to 4096): tokens of an example, or of a window with `pack`, at most.
        pack (`bool`, defaults to `False`): join successive examples into one row while they fit, within
            each `batch_size` of them. The model needs `attention_within_documents=True`, or else examples see
            those before them in the row. A batch then holds more examples than rows.
        num_proc (`int`, *optional*): processes, for a `Dataset`.
        batch_size (`int`, defaults to 1000): examples that are encoded together.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: int64 NumPy arrays (kept as int32) `input_ids` (W,);
        `labels` (W,), the ids of answers and -100 elsewhere, always for the first token of an example; and
        `seq_lengths`, the lengths of the examples in the row: one, or several with `pack`.

    Raises:
        ImportError: if `datasets` is not installed.
        TypeError: if `dataset` is neither of the two.
        ValueError: if a column is missing; a prompt, an answer or a chat is empty or of another type
            (for a stream: when it is read); the tokenizer has no EOS token, or no chat template that marks
            what the assistant writes; a size is impossible; or no example of a `Dataset` is short enough.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from transformers_emo import EmoTokenizer
    >>> from transformers_emo.tokenization import encode_answers
    >>> tokenizer = EmoTokenizer.from_pretrained("model_cards/toy-emo")
    >>> rows = Dataset.from_dict({"prompt": ["One and one is"], "answer": [" two."]})
    >>> example = encode_answers(rows, tokenizer=tokenizer)[0]
    >>> tokenizer.decode(example["input_ids"])
    'One and one is two.<eos>'
    >>> tokenizer.decode(example["labels"][example["labels"] != -100])
    ' two.<eos>'

    >>> tokenizer.chat_template = (
    ...     "{% for message in messages %}{{ message.role + '\\n' }}{% if message.role == 'assistant' %}"
    ...     "{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    ...     "{% else %}{{ message.content + '\\n' }}{% endif %}{% endfor %}"
    ... )
    >>> chat = [{"role": "user", "content": "One and one?"}, {"role": "assistant", "content": "Two."}]
    >>> chats = Dataset.from_dict({"messages": [chat]})
    >>> example = encode_answers(chats, tokenizer=tokenizer, messages="messages")[0]
    >>> tokenizer.decode(example["labels"][example["labels"] != -100])
    'Two.<eos>'

    ```
    """
    datasets = import_datasets()
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        raise TypeError(
            f"A {type(dataset).__name__} cannot be encoded: expected a `Dataset` or an `IterableDataset`. Of "
            "several splits choose one, as in `dataset['train']`."
        )
    check_at_least_one(max_length=max_length, batch_size=batch_size)
    eos_id(tokenizer)
    if messages is not None:
        _chat_template(tokenizer)

    streams = isinstance(dataset, datasets.IterableDataset)
    dataset = dataset.with_format(None)
    names = dataset.column_names
    if names is None:
        names = list(next(iter(dataset), {}))
    for argument, column in _columns(prompt, answer, messages).items():
        check_column(column, names, argument)
    features = datasets.Features({name: datasets.List(datasets.Value("int32")) for name in _COLUMNS})
    common = {"batched": True, "batch_size": batch_size, "features": features}
    encoded = dataset.map(
        _encode_batch,
        with_indices=True,
        remove_columns=names,
        fn_kwargs={
            "tokenizer": tokenizer,
            "prompt": prompt,
            "answer": answer,
            "messages": messages,
            "max_length": max_length,
            "warns": streams,
        },
        **common,
        **({} if streams else {"num_proc": num_proc, "desc": "Encoding answers"}),
    )
    if not streams:
        _report_left_out(len(dataset), len(dataset) - len(encoded), max_length)
    encoded = encoded.with_format("numpy")
    if pack:
        # One process packs, since packing only copies. So the number of those that encode changes no batch.
        encoded = encoded.map(
            _pack_batch,
            fn_kwargs={"window": max_length},
            **common,
            **({} if streams else {"desc": "Packing examples"}),
        )
        encoded = encoded.with_format("numpy")
    return encoded


def _columns(prompt: str, answer: str, messages: str | None) -> dict[str, str]:
    """The columns to read, by the argument that names each."""
    return {"prompt": prompt, "answer": answer} if messages is None else {"messages": messages}


def _encode_batch(
    batch: dict[str, list],
    indices: Sequence[int],
    *,
    tokenizer: EmoTokenizer,
    prompt: str,
    answer: str,
    messages: str | None,
    max_length: int,
    warns: bool,
) -> dict[str, list[np.ndarray]]:
    """A batch of `map`: rows become ids and labels. Examples that are too long are left out."""
    if messages is None:
        _check_texts(batch[prompt], prompt, indices)
        _check_texts(batch[answer], answer, indices)
        ids_T, example_T, is_answer_T = _encode_pairs(batch[prompt], batch[answer], tokenizer)
    else:
        ids_T, example_T, is_answer_T = _encode_chats(batch[messages], messages, indices, tokenizer)
    rows = _cut(ids_T, example_T, is_answer_T, max_length)
    if warns and len(rows["labels"]) < len(indices):
        # Each process says it once, without a number: a stream has no end at which to count.
        logger.warning_once(f"A stream holds examples that are left out: {_too_long(max_length)}")
    return rows


def _encode_pairs(
    prompts: list[str], answers: list[str], tokenizer: EmoTokenizer
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each token (T,): its id, the number of its example, and whether it belongs to the answer."""
    prompt_ids = _encode(prompts, tokenizer, add_special_tokens=True)
    if tokenizer.add_eos_token:  # no EOS between a prompt and its answer
        prompt_ids = [ids[:-1] for ids in prompt_ids]
    prompt_T, prompt_lengths_E = _join(prompt_ids)
    answer_T, answer_lengths_E = end_documents(_encode(answers, tokenizer), tokenizer.eos_token_id)
    ids_T = np.concatenate([prompt_T, answer_T])
    example_E = np.arange(len(prompts))
    example_T = np.concatenate(
        [np.repeat(example_E, prompt_lengths_E), np.repeat(example_E, answer_lengths_E)]
    )
    is_answer_T = np.arange(len(ids_T)) >= len(prompt_T)
    order_T = example_T.argsort(kind="stable")  # a prompt stays before its answer
    return ids_T[order_T], example_T[order_T], is_answer_T[order_T]


def _encode_chats(
    chats: list, column: str, indices: Sequence[int], tokenizer: EmoTokenizer
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `_encode_pairs`, for chats.

    `apply_chat_template` can mark the answers too, but it finds them by the characters of each token. Where
    tokens do not count their space (`trim_offsets`), it misses an answer that begins with a space, and all
    that follows. It also counts a token that holds both the end of a prompt and the beginning of an answer.
    """
    template = _chat_template(tokenizer)
    pieces, example_P, is_answer_P = [], [], []
    for example, (chat, row) in enumerate(zip(chats, indices, strict=True)):
        text, spans = _render(chat, row, column, template, tokenizer)
        bounds = [0, *(place for span in spans for place in span), len(text)]
        for number, (begin, end) in enumerate(pairwise(bounds)):
            if begin < end:
                pieces.append(text[begin:end])
                example_P.append(example)
                is_answer_P.append(number % 2 == 1)
    ids_T, lengths_P = _join(_encode(pieces, tokenizer))
    example_T = np.repeat(example_P, lengths_P)
    is_answer_T = np.repeat(is_answer_P, lengths_P)
    # An EOS that the template writes directly after `endgeneration` belongs to the answer too.
    ends_T = (ids_T[1:] == tokenizer.eos_token_id) & is_answer_T[:-1] & (example_T[1:] == example_T[:-1])
    is_answer_T[1:] |= ends_T
    return ids_T, example_T, is_answer_T


def _render(
    chat: Any, row: int, column: str, template: str, tokenizer: EmoTokenizer
) -> tuple[str, list[tuple[int, int]]]:
    """A chat as text, and where in it each answer of the assistant begins and ends."""
    if not isinstance(chat, list) or not all(isinstance(message, dict) for message in chat):
        raise _bad(row, column, f"holds {_kind(chat)}, expected a list of messages")
    # `datasets` fills the keys that only some messages have with `None`, which templates print.
    chat = [{key: value for key, value in message.items() if value is not None} for message in chat]
    tokens: dict[str, Any] = tokenizer.special_tokens_map
    try:
        rendered: Any = render_jinja_template(
            [chat], chat_template=template, return_assistant_tokens_mask=True, **tokens
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise _bad(row, column, f"does not fit the chat template ({error})") from error
    [text], [spans] = rendered
    if not any(begin < end for begin, end in spans):
        raise _bad(row, column, "holds nothing that the assistant writes")
    return text, spans


def _cut(
    ids_T: np.ndarray, example_T: np.ndarray, is_answer_T: np.ndarray, max_length: int
) -> dict[str, list[np.ndarray]]:
    """Cut examples on the left and behind their last answer; leave out those without a whole answer."""
    lengths_E = np.bincount(example_T)
    begins_E = lengths_E.cumsum() - lengths_E
    place_T = np.arange(len(ids_T))
    # An example ends where its last answer ends.
    stops_E = np.maximum.reduceat(np.where(is_answer_T, place_T + 1, 0), begins_E)
    starts_E = np.maximum(begins_E, stops_E - max_length)
    is_kept_T = (starts_E[example_T] <= place_T) & (place_T < stops_E[example_T])
    # An answer that an example now begins with has lost its beginning, or has no token before it.
    context_T = (is_kept_T & ~is_answer_T).cumsum()
    before_E = np.concatenate([[0], context_T])[begins_E]
    counts_T = is_kept_T & is_answer_T & (context_T > before_E[example_T])
    is_left_E = np.maximum.reduceat(counts_T, begins_E)

    is_kept_T &= is_left_E[example_T]
    ids_T = ids_T[is_kept_T].astype(np.int32)
    labels_T = np.where(counts_T[is_kept_T], ids_T, np.int32(_IGNORED))
    lengths_E = (stops_E - starts_E)[is_left_E].astype(np.int32)
    if not len(lengths_E):
        return {name: [] for name in _COLUMNS}
    ends_E = lengths_E.cumsum()[:-1]
    return {
        "input_ids": np.split(ids_T, ends_E),
        "labels": np.split(labels_T, ends_E),
        "seq_lengths": np.split(lengths_E, len(lengths_E)),
    }


def _pack_batch(batch: dict[str, Sequence[np.ndarray]], *, window: int) -> dict[str, list[np.ndarray]]:
    """A batch of `map`: successive rows are joined while they fit into a window."""
    ends_E = np.concatenate([[0], *batch["seq_lengths"]]).cumsum()
    first, groups = 0, []
    while first < len(ends_E) - 1:  # once a window
        last = int(np.searchsorted(ends_E, ends_E[first] + window, side="right")) - 1
        groups.append(slice(first, last))
        first = last
    return {name: [np.concatenate(list(batch[name][group])) for group in groups] for name in _COLUMNS}


def _encode(
    texts: list[str], tokenizer: EmoTokenizer, *, add_special_tokens: bool = False
) -> list[list[int]]:
    return tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        truncation=False,
        padding=False,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]


def _join(ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """All ids one after the other, and how many each list has."""
    arrays = [np.asarray(row, dtype=np.int64) for row in ids]
    return np.concatenate(arrays), np.array([len(array) for array in arrays])


def _chat_template(tokenizer: EmoTokenizer) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            "The tokenizer has no chat template to write `messages` with: set `tokenizer.chat_template`, or "
            "name the columns `prompt` and `answer` instead."
        )
    template = tokenizer.get_chat_template()
    if not _GENERATION.search(template):
        raise ValueError(
            "The tokenizer's chat template does not mark what the assistant writes: in "
            "`tokenizer.chat_template` write `{% generation %}` before an answer and `{% endgeneration %}` "
            "after its end."
        )
    return template


def _check_texts(values: Iterable, column: str, indices: Sequence[int]) -> None:
    for value, row in zip(values, indices, strict=True):
        if not isinstance(value, str):
            raise _bad(row, column, f"holds {_kind(value)}, expected a text")
        if not value:
            raise _bad(row, column, "holds an empty text")


def _bad(row: int, column: str, what: str) -> ValueError:
    return ValueError(f"Row {row}: the column {column!r} {what}. Correct such rows, or filter them out.")


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a value of type {type(value).__name__}"


def _report_left_out(total: int, left_out: int, max_length: int) -> None:
    if left_out == total:
        raise ValueError(
            f"All {total} examples would be left out: {_too_long(max_length)}"
            if total
            else "The dataset has no rows: give one with examples."
        )
    if left_out:
        logger.warning(f"{left_out} of {total} examples are left out: {_too_long(max_length)}")


def _too_long(max_length: int) -> str:
    return f"their last answers have `max_length` = {max_length} tokens or more. Give a larger `max_length`."
