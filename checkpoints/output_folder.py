"""Writing a model's folder: it appears under its name only when it is whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .safetensors_writing import write_json

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_PLAN = ".plan.json"


@contextmanager
def new_folder(
    out: str | os.PathLike,
    *,
    plan: Mapping[str, Any] | None = None,
    hopeless: tuple[type[BaseException], ...] = (),
) -> Iterator[Path]:
    """A folder to write to. It gets its name at the end if there was no error, and is removed otherwise.

    Until then its name is `.<name>.partial`. It is locked, so that two runs cannot write to it at the same
    time. If an earlier run without a plan was killed, the files that it left are removed first.

    Args:
        out (`str` or `os.PathLike`): the folder's name. Its parents are made too.
        plan (`Mapping[str, Any]`, *optional*): JSON data that says what is made from what, such as
            `side_files.identity_of` the source. With a plan a run can be continued: the files that an earlier
            run with the same plan left are kept, and so are the files of this run if it fails.
        hopeless (`tuple[type[BaseException], ...]`, *optional*): errors after which nothing is kept, because
            the same call would fail again.

    Yields:
        `Path`: the folder. It is empty, or holds the files that an earlier run with the same plan left.

    Raises:
        FileExistsError: if `out` exists, or a run with another plan left files.
        BlockingIOError: if another run is writing to the folder.
        OSError: if writing fails. The message says what is left on disk and how to continue.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.output_folder import new_folder
    >>> with new_folder(tmp_path / "model") as folder:
    ...     _ = (folder / "config.json").write_text("{}")
    ...     (tmp_path / "model").exists()
    False
    >>> (tmp_path / "model" / "config.json").is_file()
    True

    ```
    """
    out = Path(out)
    check_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    lock = _claim(partial, out)
    try:
        _take_over(partial, out, plan)
        try:
            yield partial
            check_new(out)
            (partial / _PLAN).unlink(missing_ok=True)
            partial.rename(out)
        except BaseException as error:
            kept = plan is not None and not isinstance(error, hopeless) and _holds_work(partial)
            if not kept:
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and not isinstance(error, FileExistsError):
                raise _with_what_is_left(error, out, partial if kept else None) from error
            raise
    finally:
        if lock is not None:
            os.close(lock)


def _take_over(partial: Path, out: Path, plan: Mapping[str, Any] | None) -> None:
    """Keep the files of an earlier run with the same plan, and remove those of a run without one."""
    ours, left = json.loads(json.dumps(plan)), _plan_of(partial)
    if left is not None and left != ours and _holds_work(partial):
        wanted = ours or {}
        differ = sorted(key for key in left.keys() | wanted.keys() if left.get(key) != wanted.get(key))
        raise FileExistsError(
            f"{partial} holds the files of another job for {out}, which differs in {', '.join(differ)} (it "
            "had other arguments, or its source has changed since). Repeat that call to continue it, or "
            "remove the folder to start again."
        )
    if left is None or left != ours:
        _empty(partial)
        if plan is not None:  # renamed when it is whole: with half a plan the earlier work would be lost
            write_json(partial / f"{_PLAN}.new", dict(plan))
            (partial / f"{_PLAN}.new").rename(partial / _PLAN)


def _holds_work(partial: Path) -> bool:
    return any(path.is_file() and not path.name.startswith(_PLAN) for path in partial.rglob("*"))


def _with_what_is_left(error: OSError, out: Path, kept: Path | None) -> OSError:
    """The error with a message that says what is left on disk and what to do."""
    what = str(error)
    if error.errno is not None:  # from the operating system: its message is no sentence
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "The disk is full." if full else f"Writing {out} failed: {error}."
    if kept is None:
        left = f"Nothing of {out} is left."
    else:
        left = (
            f"{kept} holds what was finished: remove the cause and call again with the same arguments to "
            "continue, or remove the folder."
        )
    told = (CheckpointError if isinstance(error, CheckpointError) else OSError)(f"{what} {left}")
    told.errno = error.errno
    return told


def _claim(partial: Path, out: Path) -> int | None:
    """Make the partial folder and lock it. The system removes the lock when the process ends."""
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise FileExistsError(f"{partial} is needed for writing {out}, but it is no folder: remove it.")
    partial.mkdir(exist_ok=True)
    if fcntl is None:
        return None
    lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass  # NFS and some others cannot lock folders: there is no lock then
        if not _is(lock, partial):
            raise BlockingIOError
    except BlockingIOError as error:
        os.close(lock)
        raise BlockingIOError(
            f"Another run is writing {out}: wait for it, or name another folder."
        ) from error
    return lock


def _is(descriptor: int, path: Path) -> bool:
    """Whether a path still names an open folder. Another run may have renamed it meanwhile."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except OSError:
        return False


def _plan_of(partial: Path) -> dict[str, Any] | None:
    try:
        plan = json.loads((partial / _PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return plan if isinstance(plan, dict) else None


def _empty(folder: Path) -> None:
    for left in folder.iterdir():
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def check_new(out: Path) -> None:
    """Check that nothing of this name exists, not even a broken link.

    Args:
        out (`Path`): the folder to be made.

    Raises:
        FileExistsError: if something exists.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.output_folder import check_new
    >>> check_new(tmp_path / "model")

    ```
    """
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} exists already: name a folder that does not exist.")


def check_space(out: Path, needed: int) -> None:
    """Check that the disk has room, before anything is written.

    Args:
        out (`Path`): the folder to be made. Its parents need not exist yet.
        needed (`int`): how many bytes are needed.

    Raises:
        OSError: if there is less room.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.output_folder import check_space
    >>> check_space(tmp_path / "models" / "math", 1000)

    ```
    """
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"{out} will take {needed / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB left: make room, "
            "or name a folder on another disk."
        )
