"""Reading small files that strangers may have made: no longer than a limit, and nothing that blocks."""

from __future__ import annotations

import errno
import json
import os
import stat
from typing import Any

from .errors import shown

MAX_JSON_BYTES = 8 << 20


class NotRegularError(OSError):
    """Something has the name of a file and is none: a pipe, a device or a folder.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.small_files import NotRegularError, open_regular
    >>> try:
    ...     open_regular("/dev/zero")
    ... except NotRegularError as error:
    ...     print(error.strerror[:9])
    it is a d

    ```
    """


def open_regular(path: str | os.PathLike) -> int:
    """Open a file for reading. A pipe or device is refused without waiting for it.

    Args:
        path (`str` or `os.PathLike`): the file. Links are followed.

    Returns:
        `int`: the descriptor.

    Raises:
        NotRegularError: if it is no file.
        OSError: if it cannot be opened.

    Example: see `NotRegularError`.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kinds = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"))
        kind = next((name for is_kind, name in kinds if is_kind(mode)), "device")
        number = errno.EISDIR if kind == "folder" else errno.EINVAL
        raise NotRegularError(number, f"it is a {kind}, expected a file", os.fspath(path))
    return descriptor


def read_small(path: str | os.PathLike, most: int = MAX_JSON_BYTES) -> bytes:
    """Read a file of limited length.

    Args:
        path (`str` or `os.PathLike`): the file.
        most (`int`, defaults to 8 MiB): the most bytes that it may have.

    Raises:
        ValueError: if it is longer.
        OSError: if it cannot be read, or is no file.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.small_files import read_small
    >>> _ = (tmp_path / "a").write_text("12345")
    >>> read_small(tmp_path / "a")
    b'12345'
    >>> read_small(tmp_path / "a", 4)
    Traceback (most recent call last):
    ValueError: it has more than 4 bytes, the limit

    ```
    """
    with open(open_regular(path), "rb") as file:
        # Python makes room for as much as it is asked for.
        data = file.read(min(os.fstat(file.fileno()).st_size, most) + 1)
    if len(data) > most:
        raise ValueError(f"it has more than {most} bytes, the limit")
    return data


def parse_json(text: str | bytes) -> Any:
    """Read JSON in which no object names a key twice.

    Args:
        text (`str` or `bytes`): the JSON.

    Raises:
        ValueError: if it is none, is nested too deeply, or has a key twice: programs differ in which they
            take.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.small_files import parse_json
    >>> parse_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: it has the key 'a' twice in one object, expected it once

    ```
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: str | os.PathLike, most: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file of limited length in which no object names a key twice.

    Args:
        path (`str` or `os.PathLike`): the file.
        most (`int`, defaults to 8 MiB): the most bytes that it may have.

    Raises:
        ValueError: if it is longer, or no such JSON.
        OSError: if it cannot be read, or is no file.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.small_files import read_json
    >>> _ = (tmp_path / "a.json").write_text('{"a": 1}')
    >>> read_json(tmp_path / "a.json")
    {'a': 1}

    ```
    """
    return parse_json(read_small(path, most))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        seen: set[str] = set()
        twice = next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it has the key '{shown(twice)}' twice in one object, expected it once")
    return found
