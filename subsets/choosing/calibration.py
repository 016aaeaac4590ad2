"""Calibration text: what experts are chosen on, as batches of token ids in which each token has a weight.

Shape suffixes: B batch, S sequence.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ...checkpoints.hub.names import folder_or_repo
from ...imports.optional_packages import import_optional

# Above this many tokens with padding a batch gets no further text: activations stay below half a gigabyte at
# EMO's width.
_MAX_BATCH_TOKENS = 8192
_IGNORED = -100  # the label of a token that does not count
TOKENS = ("all", "prompt", "answer")


@dataclass(frozen=True)
class Batch:
    """Token ids (B, S), whether each is text and not padding (B, S, bool), and what it counts (B, S,
    float64)."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    weight: torch.Tensor


@dataclass(frozen=True)
class Example:
    """One calibration text: its ids, and for each whether it counts."""

    ids: list[int]
    counts: list[bool]


def read_column(
    dataset: Iterable[dict] | str | os.PathLike,
    columns: Sequence[str],
    limit: int | None = None,
    *,
    progress: bool = False,
) -> list[list[Any]]:
    """Columns of a dataset or a JSONL file.

    Args:
        dataset (iterable of `dict`, `str` or `os.PathLike`): the rows, such as a `datasets.Dataset`, also a
            streamed one; or a file with a JSON object in each line.
        columns (`Sequence[str]`): the columns to read.
        limit (`int`, *optional*): read so many rows at most.
        progress (`bool`, defaults to `False`): show a progress bar, if it takes longer than two seconds.

    Returns:
        `list[list[Any]]`: the values of each column.

    Raises:
        ValueError: if a row lacks a column, or a line of the file is no JSON object.
        OSError: if the file cannot be read.

    Example:

    ```python
    >>> from transformers_emo.subsets.choosing.calibration import read_column
    >>> read_column([{"text": "a"}, {"text": "b"}], ["text"], limit=1)
    [['a']]

    ```
    """
    rows: Iterable = _json_lines(Path(dataset)) if isinstance(dataset, str | os.PathLike) else dataset
    values: list[list[Any]] = [[] for _ in columns]
    # A streamed dataset may come slowly, and may be longer than anybody waits for.
    rows = tqdm(islice(rows, limit), desc="Reading texts", unit="text", delay=2, disable=not progress)
    for number, row in enumerate(rows):
        for column, column_values in zip(columns, values, strict=True):
            if not isinstance(row, dict) or column not in row:
                found = sorted(row) if isinstance(row, dict) else f"a {type(row).__name__}"
                raise ValueError(f"Row {number} of the dataset lacks the column {column!r}: it has {found}.")
            column_values.append(row[column])
    return values


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"Line {number} of {path} is no JSON: {error}.") from error


def encode(
    texts: Sequence, answers: Sequence[str] | None, tokenizer: Any, tokens: str, max_length: int
) -> list[Example]:
    """Encode texts, prompts with answers, or chats; empty ones are left out.

    Args:
        texts (`Sequence`): texts, prompts, or chats: lists of messages with `role` and `content`.
        answers (`Sequence[str]`, *optional*): an answer to each prompt.
        tokenizer: the tokenizer, with a chat template for chats.
        tokens (`str`): `"all"`, `"prompt"` or `"answer"`: which tokens count.
        max_length (`int`): cut texts to so many tokens, prompts with answers and chats on the left.

    Raises:
        ValueError: if there are not as many answers as texts, something is no text and no chat, or parts are
            asked for that cannot be told apart.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from transformers_emo.subsets.choosing.calibration import encode
    >>> tokenizer = AutoTokenizer.from_pretrained("model_cards/toy-emo")
    >>> [example] = encode(["1+1="], ["2"], tokenizer, "answer", 256)
    >>> tokenizer.decode([i for i, counts in zip(example.ids, example.counts) if counts])
    '2'

    ```
    """
    is_chat = [not isinstance(text, str) for text in texts]
    wrong = next((t for t in texts if not isinstance(t, str) and not _is_chat(t)), None)
    if wrong is not None or len(set(is_chat)) > 1:
        kind = "texts and chats mixed" if wrong is None else f"a {type(wrong).__name__}"
        raise ValueError(f"`texts` holds {kind}: expected texts, or chats (lists of messages) only.")
    if answers is not None:
        if any(is_chat) or len(answers) != len(texts) or not all(isinstance(a, str) for a in answers):
            raise ValueError(
                f"`answers` has {len(answers)} entries for {len(texts)} texts: expected one text for each "
                "prompt, and none for chats."
            )
        return _encode_answers(texts, answers, tokenizer, tokens, max_length)
    if any(is_chat):
        return _encode_chats(texts, tokenizer, tokens, max_length)
    if tokens != "all":
        raise ValueError(f"`tokens` is {tokens!r}: give `answers`, chats or `labels` to tell them apart.")
    texts = [text for text in texts if text]
    encoded = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"] if texts else []
    return [Example(ids, [True] * len(ids)) for ids in encoded if ids]


def _is_chat(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(message, dict) for message in value)


def _encode_answers(texts, answers, tokenizer, tokens, max_length) -> list[Example]:
    # Each part by itself, as the model meets them: no token holds the end of a prompt and the beginning of
    # its answer.
    prompts = tokenizer(list(texts))["input_ids"] if texts else []
    if getattr(tokenizer, "add_eos_token", False):  # which would end a prompt before its answer
        prompts = [ids[:-1] for ids in prompts]
    endings = tokenizer(list(answers), add_special_tokens=False)["input_ids"] if answers else []
    examples = []
    for prompt, answer in zip(prompts, endings, strict=True):
        counts = [tokens != "answer"] * len(prompt) + [tokens != "prompt"] * len(answer)
        examples.append(Example((prompt + answer)[-max_length:], counts[-max_length:]))
    return [example for example in examples if example.ids]


def _encode_chats(chats, tokenizer, tokens, max_length) -> list[Example]:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("The tokenizer has no chat template: set `tokenizer.chat_template`, or give texts.")
    chats = [list(chat) for chat in chats if chat]
    if tokens == "all":
        encoded = [tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"] for chat in chats]
        return [Example(ids[-max_length:], [True] * len(ids[-max_length:])) for ids in encoded]
    datasets = import_optional("datasets", "Telling prompts and answers of chats apart needs")
    from ...tokenization import encode_answers

    rows = datasets.Dataset.from_list([{"messages": chat} for chat in chats]).to_iterable_dataset()
    examples = []
    for row in encode_answers(rows, tokenizer=tokenizer, messages="messages", max_length=max_length):
        is_answer = (row["labels"] != _IGNORED).tolist()
        counts = is_answer if tokens == "answer" else [not answer for answer in is_answer]
        examples.append(Example(row["input_ids"].tolist(), counts))
    return examples


def tokenizer_of(source: str | os.PathLike | None, **hub_kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Args:
        source (`str` or `os.PathLike`, *optional*): folder or Hub repository of the model.
        hub_kwargs: `revision`, `token`, `cache_dir` and so on, as for `from_pretrained`.

    Raises:
        ValueError: if there is none.

    Example:

    ```python
    >>> from transformers_emo.subsets.choosing.calibration import tokenizer_of
    >>> tokenizer_of("model_cards/toy-emo").decode([5])
    '%'

    ```
    """
    if not source:
        raise ValueError("The model was not loaded from anywhere: give the `tokenizer` too.")
    try:
        with folder_or_repo(source):
            return AutoTokenizer.from_pretrained(source, **hub_kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no tokenizer in {os.fspath(source)} ({error}): give the `tokenizer` too."
        ) from error


def make_batches(examples: Sequence[Example], batch_size: int, weight_by: str) -> list[Batch]:
    """Pad examples into batches, on the right.

    Args:
        examples (`Sequence[Example]`): the texts.
        batch_size (`int`): texts in a batch at most; fewer where they are long.
        weight_by (`str`): `"token"`: every token counts 1; `"text"`: every text does.

    Example:

    ```python
    >>> from transformers_emo.subsets.choosing.calibration import Example, make_batches
    >>> [batch] = make_batches([Example([5, 6], [True, True]), Example([7], [True])], 8, "text")
    >>> batch.weight.tolist()
    [[0.5, 0.5], [1.0, 0.0]]

    ```
    """
    groups: list[list[Example]] = []
    longest = 0
    for example in examples:
        longest = max(longest, len(example.ids))
        if not groups or len(groups[-1]) == batch_size or longest * (len(groups[-1]) + 1) > _MAX_BATCH_TOKENS:
            groups.append([])
            longest = len(example.ids)
        groups[-1].append(example)
    batches = []
    for group in groups:
        # Padded here, not by the tokenizer: one without a padding token serves as well.
        ids_BS, counts_BS, mask_BS = (
            pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
            for rows in (
                [example.ids for example in group],
                [example.counts for example in group],
                [[True] * len(example.ids) for example in group],
            )
        )
        batches.append(Batch(ids_BS, mask_BS, _weights(counts_BS, weight_by)))
    return batches


def ready_batches(
    input_ids: Any, attention_mask: Any, labels: Any, tokens: str, weight_by: str
) -> list[Batch]:
    """Batches from ids, masks and labels, lists or tensors, of several batches or of one.

    Args:
        input_ids: batches (B, S) of token ids.
        attention_mask (*optional*): for each of them a mask (B, S), 0 for padding.
        labels (*optional*): for each of them labels (B, S), -100 for tokens that are no answer.
        tokens (`str`): `"all"`, `"prompt"` or `"answer"`: which tokens count, by the labels.
        weight_by (`str`): as for `make_batches`.

    Raises:
        ValueError: if shapes differ, or parts are asked for without labels.

    Example:

    ```python
    >>> from transformers_emo.subsets.choosing.calibration import ready_batches
    >>> [batch] = ready_batches([[5, 6, 0]], [[1, 1, 0]], None, "all", "token")
    >>> batch.weight.tolist()
    [[1.0, 1.0, 0.0]]

    ```
    """
    ids = _as_batches(input_ids)
    masks = (
        [torch.ones_like(batch) for batch in ids] if attention_mask is None else _as_batches(attention_mask)
    )
    answers = None if labels is None else [batch != _IGNORED for batch in _as_batches(labels)]
    for name, others in (("attention_mask", masks), ("labels", answers)):
        if others is not None and [batch.shape for batch in ids] != [other.shape for other in others]:
            raise ValueError(
                f"`input_ids` has batches of shape {[tuple(b.shape) for b in ids]} and `{name}` of shape "
                f"{[tuple(o.shape) for o in others]}: expected the same."
            )
    if tokens != "all" and answers is None:
        raise ValueError(f"`tokens` is {tokens!r}: give `labels` too, to tell prompts and answers apart.")
    batches = []
    for number, (ids_BS, mask_BS) in enumerate(zip(ids, masks, strict=True)):
        mask_BS = mask_BS.bool()
        counts_BS = mask_BS
        if tokens != "all" and answers is not None:
            counts_BS = mask_BS & (answers[number] if tokens == "answer" else ~answers[number])
        batches.append(Batch(ids_BS.long(), mask_BS, _weights(counts_BS, weight_by)))
    return batches


def doubling(items: Sequence, wanted: Any = True) -> list[list]:
    """Cut a sequence into parts of 1, 1, 2, 4, 8 ... items, so that their sums double.

    Args:
        items (`Sequence`): the sequence.
        wanted (*optional*): `None` leaves it in one part.

    Example:

    ```python
    >>> from transformers_emo.subsets.choosing.calibration import doubling
    >>> doubling("abcdef")
    [['a'], ['b'], ['c', 'd'], ['e', 'f']]

    ```
    """
    parts: list[list] = []
    start, stop = 0, 1 if wanted is not None else len(items)
    while start < len(items):
        parts.append(list(items[start:stop]))
        start, stop = stop, 2 * stop
    return parts


def check_ids(batches: Sequence[Batch], vocab_size: int) -> None:
    """See that the model has an embedding of every token.

    Args:
        batches (`Sequence[Batch]`): calibration text.
        vocab_size (`int`): token ids are below it.

    Raises:
        ValueError: if it has not.

    Example:

    ```python
    >>> from transformers_emo.subsets.choosing.calibration import check_ids, ready_batches
    >>> check_ids(ready_batches([[5, 6]], None, None, "all", "token"), 7)

    ```
    """
    for batch in batches:
        outside = (batch.input_ids < 0) | (batch.input_ids >= vocab_size)
        if outside.any():
            raise ValueError(
                f"There is no token {int(batch.input_ids[outside][0])}: the model has ids from 0 to "
                f"{vocab_size - 1}. Is the tokenizer that of the model?"
            )


def _as_batches(value: Any) -> list[torch.Tensor]:
    """Tensors (B, S), from lists or tensors of several batches or of one."""
    value = [value] if isinstance(value, torch.Tensor) and value.dim() == 2 else value
    return [torch.atleast_2d(torch.as_tensor(batch)).cpu() for batch in value]


def _weights(counts_BS: torch.Tensor, weight_by: str) -> torch.Tensor:
    weight_BS = counts_BS.double()
    if weight_by == "text":
        weight_BS = weight_BS / weight_BS.sum(-1, keepdim=True).clamp(min=1)
    return weight_BS
