"""The error for model files that cannot be used, and showing what such files hold."""

from __future__ import annotations

import re
from typing import Any

_LONGEST_WORD = 500  # characters: a path may be long, and is shown whole
_LONGEST_MESSAGE = 4000
# Characters that are not shown as they are: they would move the cursor, colour the terminal, or hide text.
_UNPRINTABLE = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


def shown(value: Any, longest: int = 200) -> str:
    r"""A value from a file as it can be shown in one line: shortened, and without control characters.

    Args:
        value: a text, or anything else, which is shown as `repr` does.
        longest (`int`, defaults to 200): the most characters that are shown.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.errors import shown
    >>> shown("model\x1b[31m"), shown("a" * 1000, 10)
    ('model\\x1b[31m', 'aaaaa...aaaaa (1000 characters)')

    ```
    """
    text = value if isinstance(value, str) else repr(value)
    return _escaped(_shortened(text, longest)).replace("\n", "\\n")


def tidy(message: str) -> str:
    r"""A message without control characters, in which long words are shortened. Lines stay lines.

    Args:
        message (`str`): the message. It may hold names and values that strangers wrote into a file.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.errors import tidy
    >>> tidy("No tensor \x07" + "a" * 50_000_000 + ": download it again.")[-46:]
    'aaaa: (50000002 characters) download it again.'

    ```
    """
    if len(message) > _LONGEST_WORD:
        message = re.sub(rf"\S{{{_LONGEST_WORD},}}", lambda word: _shortened(word[0], _LONGEST_WORD), message)
    return _escaped(_shortened(message, _LONGEST_MESSAGE))


def _shortened(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]}...{text[-half:]} ({len(text)} characters)"


def _escaped(text: str) -> str:
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class CheckpointError(OSError):
    """A checkpoint is incomplete, damaged or of a kind that cannot be read in part.

    What its message quotes from a file is shortened, and control characters are escaped.

    Example:

    ```python
    >>> from transformers_emo.checkpoints import Checkpoint, CheckpointError
    >>> try:
    ...     Checkpoint.from_folder(tmp_path)
    ... except CheckpointError as error:
    ...     print(str(error)[:34])
    There are no safetensors weights i

    ```
    """

    def __init__(self, *args: Any):
        super().__init__(*(tidy(arg) if isinstance(arg, str) else arg for arg in args))
