"""Calibration text as batches of token ids, in which each token has a weight.

Shape suffixes: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from ...imports.optional_packages import import_optional
from ...tokenization.beginnings import encode_beginnings, in_groups

# A batch with padding holds no more tokens than this, but for a single text that does. At EMO's width
# activations stay below half a gigabyte then.
_MAX_BATCH_TOKENS = 8192
_IGNORED = -100  # the label of a token that does not count


@dataclass(frozen=True)
class Batch:
    """Token ids of several texts, padded on the right.

    Args:
        input_ids (`torch.Tensor`): (B, S) the token ids.
        attention_mask (`torch.Tensor`): (B, S), bool: true for text, false for padding.
        weight (`torch.Tensor`): (B, S), float64: how much each token counts.

    Example: see `make_batches`.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    weight: torch.Tensor


@dataclass(frozen=True)
class Example:
    """One text as token ids.

    Args:
        ids (`Sequence[int]` or `np.ndarray`): the token ids.
        counts (`Sequence[bool]` or `np.ndarray`): for each token whether it counts.
    """

    ids: Sequence[int] | np.ndarray
    counts: Sequence[bool] | np.ndarray


def encode(
    texts: Sequence, answers: Sequence[str] | None, tokenizer: Any, tokens: str, max_length: int
) -> list[Example]:
    """Encode texts, prompts with answers, or chats. Empty ones are left out.

    Args:
        texts (`Sequence`): texts, prompts, or chats (lists of messages with `role` and `content`), all of one
            kind.
        answers (`Sequence[str]`, *optional*): an answer to each prompt.
        tokenizer: the tokenizer. Chats need one with a chat template.
        tokens (`str`): which tokens count: `"all"`, `"prompt"` or `"answer"`. Texts alone have no parts: all
            of their tokens count.
        max_length (`int`): cut to so many tokens: prompts with answers and chats on the left, texts on the
            right.

    Raises:
        ValueError: if the texts are chats and the tokenizer has no chat template.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from transformers_emo.subsets.choosing.calibration_batches import encode
    >>> tokenizer = AutoTokenizer.from_pretrained("model_cards/toy-emo")
    >>> [example] = encode(["1+1="], ["2"], tokenizer, "answer", 256)
    >>> tokenizer.decode([i for i, counts in zip(example.ids, example.counts) if counts])
    '2'

    ```
    """
    if answers is not None:
        return _encode_answers(texts, answers, tokenizer, tokens, max_length)
    if texts and not isinstance(texts[0], str):
        return _encode_chats(texts, tokenizer, tokens, max_length)
    encoded = encode_beginnings(tokenizer, (text for text in texts if text), max_length)
    return [Example(ids, np.ones(len(ids), dtype=bool)) for ids in encoded if len(ids)]


def _encode_answers(texts, answers, tokenizer, tokens, max_length) -> list[Example]:
    # Prompt and answer are encoded apart, as the model meets them. So no token holds the end of a prompt and
    # the beginning of its answer.
    examples = []
    pairs = zip(texts, answers, strict=True)
    for group in in_groups(pairs, lambda pair: len(pair[0]) + len(pair[1])):
        prompts = tokenizer([prompt for prompt, _ in group])["input_ids"]
        if getattr(tokenizer, "add_eos_token", False):  # the prompt does not end here: its answer follows
            prompts = [ids[:-1] for ids in prompts]
        endings = tokenizer([answer for _, answer in group], add_special_tokens=False)["input_ids"]
        for prompt, answer in zip(prompts, endings, strict=True):
            counts = [tokens != "answer"] * len(prompt) + [tokens != "prompt"] * len(answer)
            examples.append(_last(prompt + answer, counts, max_length))
    return [example for example in examples if len(example.ids)]


def _last(ids: list[int], counts: list[bool], max_length: int) -> Example:
    return Example(np.array(ids[-max_length:], dtype=np.int32), np.array(counts[-max_length:], dtype=bool))


def _encode_chats(chats, tokenizer, tokens, max_length) -> list[Example]:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("The tokenizer has no chat template: set `tokenizer.chat_template`, or give texts.")
    chats = [list(chat) for chat in chats if chat]
    if tokens == "all":
        encoded = (tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"] for chat in chats)
        return [_last(ids, [True] * len(ids), max_length) for ids in encoded]
    datasets = import_optional("datasets", "Telling prompts and answers of chats apart needs")
    from ...tokenization import encode_answers  # imported here: only chats need jinja2, which it imports

    rows = datasets.Dataset.from_list([{"messages": chat} for chat in chats]).to_iterable_dataset()
    examples = []
    for row in encode_answers(rows, tokenizer=tokenizer, messages="messages", max_length=max_length):
        is_answer = (row["labels"] != _IGNORED).tolist()
        counts = is_answer if tokens == "answer" else [not answer for answer in is_answer]
        examples.append(Example(row["input_ids"].tolist(), counts))
    return examples


def make_batches(examples: Sequence[Example], batch_size: int, weight_by: str) -> list[Batch]:
    """Put texts together into batches, padded on the right.

    Args:
        examples (`Sequence[Example]`): the texts.
        batch_size (`int`): the most texts in a batch. Where texts are long there are fewer.
        weight_by (`str`): `"token"`: every token counts 1; `"text"`: every text does.

    Example:

    ```python
    >>> from transformers_emo.subsets.choosing.calibration_batches import Example, make_batches
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
        # Padded here and not by the tokenizer, which may have no padding token.
        ids_BS, counts_BS, mask_BS = (
            pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True)
            for dtype, rows in (
                (torch.int64, [example.ids for example in group]),
                (torch.bool, [example.counts for example in group]),
                (torch.bool, [[True] * len(example.ids) for example in group]),
            )
        )
        batches.append(Batch(ids_BS, mask_BS, _weights(counts_BS, weight_by)))
    return batches


def ready_batches(
    input_ids: Sequence[torch.Tensor],
    attention_mask: Sequence[torch.Tensor] | None = None,
    labels: Sequence[torch.Tensor] | None = None,
    tokens: str = "all",
    weight_by: str = "token",
) -> list[Batch]:
    """Make batches of token ids, masks and labels that fit each other.

    Args:
        input_ids (`Sequence[torch.Tensor]`): batches (B, S) of token ids.
        attention_mask (`Sequence[torch.Tensor]`, *optional*): for each batch a mask (B, S), 0 for padding.
        labels (`Sequence[torch.Tensor]`, *optional*): for each batch labels (B, S), -100 for a token that is
            no answer.
        tokens (`str`, defaults to `"all"`): which tokens count: `"all"`, or by the labels `"prompt"` or
            `"answer"`.
        weight_by (`str`, defaults to `"token"`): as for `make_batches`.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.subsets.choosing.calibration_batches import ready_batches
    >>> [batch] = ready_batches([torch.tensor([[5, 6, 0]])], [torch.tensor([[1, 1, 0]])])
    >>> batch.weight.tolist()
    [[1.0, 1.0, 0.0]]

    ```
    """
    batches = []
    for number, ids_BS in enumerate(input_ids):
        mask_BS = torch.ones_like(ids_BS) if attention_mask is None else attention_mask[number]
        mask_BS = counts_BS = mask_BS.bool()
        if tokens != "all" and labels is not None:
            answer_BS = labels[number] != _IGNORED
            counts_BS = mask_BS & (answer_BS if tokens == "answer" else ~answer_BS)
        batches.append(Batch(ids_BS.long(), mask_BS, _weights(counts_BS, weight_by)))
    return batches


def doubling(items: Sequence) -> list[list]:
    """Cut a sequence into parts of 1, 1, 2, 4, 8 ... items: each part doubles what was taken before.

    Args:
        items (`Sequence`): the sequence.

    Example:

    ```python
    >>> from transformers_emo.subsets.choosing.calibration_batches import doubling
    >>> doubling("abcdef")
    [['a'], ['b'], ['c', 'd'], ['e', 'f']]

    ```
    """
    parts: list[list] = []
    start, stop = 0, 1
    while start < len(items):
        parts.append(list(items[start:stop]))
        start, stop = stop, 2 * stop
    return parts


def check_ids(batches: Sequence[Batch], vocab_size: int) -> None:
    """Check that the model has an embedding for every token.

    Args:
        batches (`Sequence[Batch]`): calibration text.
        vocab_size (`int`): the size of the model's vocabulary. Token ids are below it.

    Raises:
        ValueError: if a token id is out of range.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.subsets.choosing.calibration_batches import check_ids, ready_batches
    >>> check_ids(ready_batches([torch.tensor([[5, 6]])]), 7)

    ```
    """
    for batch in batches:
        outside = (batch.input_ids < 0) | (batch.input_ids >= vocab_size)
        if outside.any():
            raise ValueError(
                f"There is no token {int(batch.input_ids[outside][0])}: the model has ids from 0 to "
                f"{vocab_size - 1}. Encode the text with the model's own tokenizer."
            )


def _weights(counts_BS: torch.Tensor, weight_by: str) -> torch.Tensor:
    weight_BS = counts_BS.double()
    if weight_by == "text":
        weight_BS = weight_BS / weight_BS.sum(-1, keepdim=True).clamp(min=1)
    return weight_BS
