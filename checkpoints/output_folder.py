"""Making the folder of a model: whole under its name, or not there; and what goes with the weights."""

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
    """A folder to write to, which gets its name when all went well and is removed otherwise.

    It is `.<name>.partial` until then, and locked, so that two runs do not write to it at once. What a run
    without a plan left of it, when it was killed, is removed first.

    Args:
        out (`str` or `os.PathLike`): the name; its parents are made too.
        plan (`Mapping[str, Any]`, *optional*): what is made from what, in types of JSON, for runs that can be
            gone on with; see `side_files.identity_of`. What an earlier run with the same plan left is kept
            then, and so is what this one leaves if it fails.
        hopeless (`tuple[type[BaseException], ...]`, *optional*): errors after which nothing is kept, since
            the same run would only fail again.

    Yields:
        `Path`: the folder, empty but for what an earlier run with the same plan left.

    Raises:
        FileExistsError: if `out` exists, or a run with another plan left something.
        BlockingIOError: if another run is writing it.
        OSError: whatever stopped the writing, with what is left and how to go on.

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
                raise _told(error, out, partial if kept else None) from error
            raise
    finally:
        if lock is not None:
            os.close(lock)


def _take_over(partial: Path, out: Path, plan: Mapping[str, Any] | None) -> None:
    """Keep what an earlier run with the same plan left, remove what none can go on with."""
    ours, left = json.loads(json.dumps(plan)), _plan_of(partial)
    if left is not None and left != ours and _holds_work(partial):
        wanted = ours or {}
        differ = sorted(key for key in left.keys() | wanted.keys() if left.get(key) != wanted.get(key))
        raise FileExistsError(
            f"{partial} holds what another job left that was to make {out}: it differs in "
            f"{', '.join(differ)} (other arguments, or a source that has changed since). Repeat that call to "
            "go on with it, or remove the folder to begin anew."
        )
    if left is None or left != ours:
        _empty(partial)
        if plan is not None:  # under another name first: half a plan would lose the work of all runs before
            write_json(partial / f"{_PLAN}.new", dict(plan))
            (partial / f"{_PLAN}.new").rename(partial / _PLAN)


def _holds_work(partial: Path) -> bool:
    return any(path.is_file() and not path.name.startswith(_PLAN) for path in partial.rglob("*"))


def _told(error: OSError, out: Path, kept: Path | None) -> OSError:
    """The same error with what is left."""
    what = str(error)
    if error.errno is not None:  # from the system, and no sentence
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "The disk is full." if full else f"Writing {out} failed: {error}."
    if kept is None:
        left = f"Nothing of {out} is left."
    else:
        left = (
            f"{kept} holds what was finished: mend the cause and call again with the same arguments to go "
            "on, or remove it."
        )
    told = (CheckpointError if isinstance(error, CheckpointError) else OSError)(f"{what} {left}")
    told.errno = error.errno
    return told


def _claim(partial: Path, out: Path) -> int | None:
    """Make the folder in progress and lock it. The lock ends with the process, however that ends."""
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise FileExistsError(f"{partial} is needed for writing {out} and is no folder: remove it.")
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
            pass  # NFS and some others do not lock folders: there it goes on without
        if not _is(lock, partial):
            raise BlockingIOError
    except BlockingIOError as error:
        os.close(lock)
        raise BlockingIOError(
            f"Another run is writing {out}: wait for it, or name another folder."
        ) from error
    return lock


def _is(descriptor: int, path: Path) -> bool:
    """Whether a path still names an open folder: another run may have renamed it meanwhile."""
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
    """See that there is nothing of this name, not even a broken link.

    Args:
        out (`Path`): the folder to be made.

    Raises:
        FileExistsError: if there is.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.output_folder import check_new
    >>> check_new(tmp_path / "model")

    ```
    """
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} exists already: name a folder that does not.")


def check_space(out: Path, needed: int) -> None:
    """See that the disk has room, before anything is written.

    Args:
        out (`Path`): the folder to be made; its parents may not exist yet.
        needed (`int`): bytes.

    Raises:
        OSError: if it has not.

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
