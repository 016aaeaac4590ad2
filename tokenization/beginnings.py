"""Token ids of many texts, or of the beginnings of long ones, with little memory.

A tokenizer holds about forty bytes for each character that it encodes at once. So texts are encoded in groups
of about a million characters, and of a text that is far longer than what is kept of it, only the beginning.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np

GROUP = 1 << 20
"""Characters that are encoded at once, but for a single text that is longer."""
_CHARACTERS = 32  # of a token, at first: few texts have so many

Item = TypeVar("Item")


def in_groups(items: Iterable[Item], characters: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Cut texts into groups that can be encoded at once.

    Args:
        items (`Iterable`): the texts, or pairs of them.
        characters (`Callable`): how many characters an item has.

    Returns:
        `Iterator[list]`: groups of at most `GROUP` characters, or of one item.

    Example:

    ```python
    >>> from transformers_emo.tokenization.beginnings import in_groups
    >>> [len(group) for group in in_groups(["a" * 600_000] * 3, len)]
    [1, 1, 1]

    ```
    """
    group: list[Item] = []
    size = 0
    for item in items:
        more = characters(item)
        if group and size + more > GROUP:
            yield group
            group, size = [], 0
        group.append(item)
        size += more
    if group:
        yield group


def encode_beginnings(tokenizer: Any, texts: Iterable[str], max_length: int) -> Iterator[np.ndarray]:
    """The first tokens of each text, as the tokenizer gives them with `truncation=True`.

    Args:
        tokenizer: a tokenizer of Transformers.
        texts (`Iterable[str]`): the texts, read as they are needed.
        max_length (`int`): how many tokens to keep of each.

    Returns:
        `Iterator[np.ndarray]`: int32 ids of each text, in order.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from transformers_emo.tokenization.beginnings import encode_beginnings
    >>> tokenizer = AutoTokenizer.from_pretrained("model_cards/toy-emo")
    >>> [len(ids) for ids in encode_beginnings(tokenizer, ["import os", "a " * 1_000_000], 4)]
    [2, 4]

    ```
    """
    beginnings = (_beginning(tokenizer, text, max_length) for text in texts)
    for group in in_groups(beginnings, len):
        for ids in tokenizer(group, truncation=True, max_length=max_length)["input_ids"]:
            yield np.array(ids, dtype=np.int32)


def _beginning(tokenizer: Any, text: str, max_length: int) -> str:
    """So much of a text that its first tokens are those of the whole text.

    Where a text is cut, tokens differ near the cut. So it is cut far behind the tokens that are kept, at two
    places: what is the same for both does not depend on the cut.
    """
    size = max(_CHARACTERS * max_length, 1 << 12)
    while 2 * size < len(text):
        cut = [text[:size], text[: 2 * size]]
        one, two = tokenizer(cut, truncation=True, max_length=max_length)["input_ids"]
        if one == two and len(one) == max_length:
            return cut[1]
        size *= 2
    return text
