"""One run at a time writes to a folder, and the error for the second one says who the first one is."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import shown
from .durable_files import make_folders

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

NOTE = ".writer.json"  # in a locked folder: who holds the lock
_MOST_NOTE = 4096  # bytes


def lock_folder(folder: Path, what: str) -> int | None:
    """Lock a folder until the descriptor is closed or the process ends.

    Args:
        folder (`Path`): the folder, which exists.
        what (`str`): what is written, for the error.

    Returns:
        `int`, *optional*: a descriptor, to be closed. `None` on systems without such locks.

    Raises:
        BlockingIOError: if another run holds the lock, or the folder is gone. The message
            says who holds a lock of `locked_folder`.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.writing.folder_lock import lock_folder, locked_folder
    >>> with locked_folder(tmp_path):
    ...     try:
    ...         lock_folder(tmp_path, "results")
    ...     except BlockingIOError as error:
    ...         print(str(error).startswith("Another run is writing results (process "))
    True

    ```
    """
    if fcntl is None:
        return None
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass  # NFS and some others cannot lock folders: there is no lock then
        if not _is(lock, folder):
            raise BlockingIOError
    except BlockingIOError as error:
        holder = _holder(lock)
        os.close(lock)
        raise BlockingIOError(
            f"Another run is writing {what}{holder}: wait for it, or name another folder."
        ) from error
    except BaseException:
        os.close(lock)
        raise
    return lock


@contextmanager
def locked_folder(folder: str | os.PathLike) -> Iterator[None]:
    """Make a folder if need be, and keep others from writing to it within the block.

    A folder that was made and is still empty at the end is removed.

    Args:
        folder (`str` or `os.PathLike`): the folder.

    Raises:
        BlockingIOError: if another run writes to it.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.writing.folder_lock import locked_folder
    >>> with locked_folder(tmp_path / "results"):
    ...     (tmp_path / "results").is_dir()
    True
    >>> (tmp_path / "results").exists()  # nothing was written
    False

    ```
    """
    folder = Path(os.path.realpath(folder))
    is_new = not folder.exists()
    make_folders(folder)
    lock = lock_folder(folder, os.fspath(folder))
    if lock is not None:
        _leave_note(lock)
    try:
        yield
    finally:
        if lock is not None:
            with suppress(OSError):
                (folder / NOTE).unlink()
            with suppress(OSError):  # it holds something
                if is_new:
                    folder.rmdir()
            os.close(lock)


def _leave_note(lock: int) -> None:
    note = {"process": os.getpid(), "machine": socket.gethostname(), "since": time.strftime("%F %T")}
    with suppress(OSError):  # a full disk: the lock holds without the note
        os.unlink(NOTE, dir_fd=lock)
    with suppress(OSError):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with open(os.open(NOTE, flags, 0o644, dir_fd=lock), "w", encoding="utf-8") as file:
            json.dump(note, file)


def _holder(lock: int) -> str:
    """Who holds a lock, as words in brackets; empty if it is not known."""
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        with open(os.open(NOTE, flags, dir_fd=lock), "rb") as file:
            note = json.loads(file.read(_MOST_NOTE))
        process, machine, since = (shown(note[name]) for name in ("process", "machine", "since"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f" (process {process} on {machine}, since {since})"


def _is(descriptor: int, path: Path) -> bool:
    """Whether a path still names an open folder. Another run may have renamed it meanwhile."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except OSError:
        return False
