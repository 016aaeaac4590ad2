"""Writing a model's folder: it appears under its name only when it is whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..small_files import read_json
from ..source_files import SourceChangedError, SourceFiles
from .durable_files import make_folders, rename_durably, sync_tree
from .folder_lock import lock_folder
from .safetensors_writing import write_json

_PLAN = ".plan.json"
_MAX_PLAN = 256 << 20  # it names every tensor and every file of the source


@contextmanager
def new_folder(
    out: str | os.PathLike,
    *,
    plan: Mapping[str, Any] | None = None,
    hopeless: tuple[type[BaseException], ...] = (),
    sources: Sequence[SourceFiles] = (),
) -> Iterator[Path]:
    """A folder to write to. It gets its name at the end if there was no error, and is removed otherwise.

    Before it gets its name, all its files are brought to the disk: after a power cut it is whole or not
    there. Until then its name is `.<name>.partial`, and only its owner may look into it. It is locked, so
    that two runs cannot write to it at the same time. If an earlier run without a plan was killed, the files
    that it left are removed first.

    Args:
        out (`str` or `os.PathLike`): the folder's name. Its parents are made too.
        plan (`Mapping[str, Any]`, *optional*): JSON data that says what is made from what, such as
            `side_files.identity_of` the source. With a plan a run can be continued: the files that an earlier
            run with the same plan left are kept, and so are the files of this run if it fails.
        hopeless (`tuple[type[BaseException], ...]`, *optional*): errors after which nothing is kept, because
            the same call would fail again.
        sources (`Sequence[SourceFiles]`, *optional*): the state of the folders that are read, noted before
            anything of them was. If one has changed at the end, nothing is kept.

    Yields:
        `Path`: the folder. It is empty, or holds the files that an earlier run with the same plan left.

    Raises:
        FileExistsError: if `out` exists, a run with another plan left files, or the folder of an earlier run
            could be another user's work.
        SourceChangedError: if a source changed meanwhile.
        BlockingIOError: if another run is writing to the folder.
        OSError: if writing fails. The message says what is left on disk and how to continue.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.writing.output_folder import new_folder
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
    make_folders(out.parent)
    partial = out.with_name(f".{out.name}.partial")
    lock = _claim(partial, out)
    try:
        _take_over(partial, out, plan)
        try:
            yield partial
            for source in sources:
                source.check()
            check_new(out)
            (partial / _PLAN).unlink(missing_ok=True)
            partial.chmod(_usual_mode())
            sync_tree(partial)
            rename_durably(partial, out)
        except BaseException as caught:
            if isinstance(caught, OSError) and not partial.exists() and out.is_dir():  # it has its name
                raise _with_a_name_that_may_be_lost(caught, out) from caught
            error = _with_its_cause(caught, sources)
            hopeless = (*hopeless, SourceChangedError)
            kept = plan is not None and not isinstance(error, hopeless) and _holds_work(partial)
            if not kept:
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and not isinstance(error, FileExistsError):
                raise _with_what_is_left(error, out, partial if kept else None) from caught
            raise
    finally:
        if lock is not None:
            os.close(lock)


def _with_its_cause(error: BaseException, sources: Sequence[SourceFiles]) -> BaseException:
    """The error; or that a source changed, which is why what was read of it made no sense."""
    if isinstance(error, OSError | ValueError) and not isinstance(error, FileExistsError):
        try:
            for source in sources:
                source.check()
        except SourceChangedError as changed:
            return changed
    return error


def _usual_mode() -> int:
    """The permissions that a new folder has."""
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o777 & ~mask


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
    told = (type(error) if isinstance(error, CheckpointError) else OSError)(f"{what} {left}")
    told.errno = error.errno
    return told


def _with_a_name_that_may_be_lost(error: OSError, out: Path) -> OSError:
    told = OSError(
        f"{out} is whole, but bringing its name to the disk failed: {error}. A power cut could still take "
        "it: remove it and call again, or call `sync`."
    )
    told.errno = error.errno
    return told


def _claim(partial: Path, out: Path) -> int | None:
    """Make the partial folder and lock it. The system removes the lock when the process ends."""
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise FileExistsError(f"{partial} is needed for writing {out}, but it is no folder: remove it.")
    try:
        partial.mkdir(mode=0o700)
    except FileExistsError:
        _check_ours(partial, out)
    return lock_folder(partial, os.fspath(out))


def _check_ours(partial: Path, out: Path) -> None:
    """Refuse a folder that another user made or may write to: its files would become part of the model."""
    if not hasattr(os, "geteuid"):  # Windows
        return
    found = partial.stat(follow_symlinks=False)
    reason = ""
    if found.st_uid != os.geteuid():
        reason = f"belongs to another user (number {found.st_uid}, you are {os.geteuid()})"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        reason = f"may be written to by other users (mode {stat.S_IMODE(found.st_mode):o})"
    if reason:
        raise FileExistsError(
            f"{partial} is needed for writing {out}, but it {reason}: look at what it holds and remove it, "
            "or name another folder."
        )


def _plan_of(partial: Path) -> dict[str, Any] | None:
    try:
        plan = read_json(partial / _PLAN, _MAX_PLAN)
    except (OSError, ValueError):
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
    >>> from transformers_emo.checkpoints.writing.output_folder import check_new
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
    >>> from transformers_emo.checkpoints.writing.output_folder import check_space
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
