"""Errors of commands as one line: what happened, and what to do."""

from __future__ import annotations

import errno
import os
import re

# How libraries in other languages tell what the system said, and how PyTorch tells that it could not write.
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
_UNWRITTEN = re.compile(r"PytorchStreamWriter failed|inline_container\.cc.* unexpected pos")

_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


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
    if (system := _behind(error)) is not None:
        return _of_the_system(system)
    if _UNWRITTEN.search(str(error)):
        return "A file could not be written to its end: make room, if the disk is full, and call again."
    name = type(error).__name__
    return (
        f"{name}: {error}. The model's config, its tokenizer or an option may be impossible: check them. "
        "`emo --traceback ...` shows where it comes from."
    )


def _behind(error: Exception) -> OSError | None:
    """The error of a disk that led to an error of another library, if it is known."""
    if found := _SYSTEM_ERROR.search(str(error)):
        number = int(found[1])
        return OSError(number, os.strerror(number))
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _OF_DISKS:
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def _of_the_system(error: OSError) -> str:
    name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else None
    if error.errno == errno.ENOENT and name is not None:
        return f"There is no file or folder {name!r} (seen from {os.getcwd()}): check the path."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "The disk is full: make room and call again."
    if error.errno == errno.EFBIG:
        return "A file is larger than the system allows here: see `ulimit -f`, or write to another disk."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and name is not None:
        return f"{name!r} may not be read or written ({error.strerror}): change its rights, or name another."
    of = "" if name is None else f": {name!r}"
    return f"{error.strerror}{of}. Give another path, or remove the cause and call again."
