"""Text of tokens that come one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HALF = "\ufffd"  # what decoding puts for a part of a character


class TextPieces:
    """Turns tokens into text as they come. A character of several tokens comes when it is whole.

    Args:
        tokenizer: whose tokens they are.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from transformers_emo.analysis.trying.text_pieces import TextPieces
    >>> tokenizer = AutoTokenizer.from_pretrained("model_cards/emo-tiny")
    >>> pieces = TextPieces(tokenizer)
    >>> "".join(pieces.add([token]) for token in tokenizer("größer 漢字").input_ids) + pieces.end()
    'größer 漢字'

    ```
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._told = ""

    def add(self, ids: Sequence[int]) -> str:
        """Take tokens, and give the text that they complete.

        Args:
            ids (`Sequence[int]`): the tokens.
        """
        self._ids += ids
        text = self._decode()
        if text.endswith(_HALF):
            return ""
        piece = text[len(self._told) :]
        self._told = text
        if text.endswith("\n"):  # nothing before a line's end changes what comes behind it
            self._ids, self._told = [], ""
        return piece

    def end(self) -> str:
        """What is left over: a half character, at most."""
        piece = self._decode()[len(self._told) :]
        self._ids, self._told = [], ""
        return piece

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)
