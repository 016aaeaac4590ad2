"""Errors of commands as one line: what happened, and what to do."""

from __future__ import annotations

import errno
import os


def error_text(error: Exception) -> str:
    """What to tell of an error that ended a command.

    Args:
        error (`Exception`): any; those of this package say what to do by themselves.

    Returns:
        `str`: for people.

    Example:

    ```python
    >>> from transformers_emo.error_text import error_text
    >>> error_text(FileNotFoundError(2, "No such file or directory", "/nope.yaml"))
    "There is no file or folder '/nope.yaml' (seen from ...): check the path."

    ```
    """
    if isinstance(error, UnicodeEncodeError):
        return (
            f"A path or text holds {error.object[error.start : error.end]!r}, half of a character. UTF-8 "
            "cannot hold it: correct it."
        )
    if isinstance(error, UnicodeDecodeError):
        return (
            f"A file is not UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x}): convert it."
        )
    if isinstance(error, RecursionError):
        return "A file or a chat template is nested too deeply to be read: correct it."
    if isinstance(error, OSError) and error.errno is not None and str(error).startswith("[Errno"):
        return _of_the_system(error)
    module = type(error).__module__
    if module.startswith("jinja2"):
        return f"The tokenizer's chat template fails: {error}. Correct it, or give texts instead of chats."
    if isinstance(error, (ValueError, OSError, ImportError)):
        return str(error)
    name = type(error).__name__
    return (
        f"{name}: {error}. The model's config, its tokenizer or an option may be impossible: check them. "
        "`emo --traceback ...` shows where it comes from."
    )


def _of_the_system(error: OSError) -> str:
    name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else None
    if error.errno == errno.ENOENT and name is not None:
        return f"There is no file or folder {name!r} (seen from {os.getcwd()}): check the path."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "The disk is full: make room and call again."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and name is not None:
        return f"{name!r} may not be read or written ({error.strerror}): change its rights, or name another."
    of = "" if name is None else f" {name!r}"
    return f"{error.strerror}:{of}. Give another path, or remove the cause and call again."
