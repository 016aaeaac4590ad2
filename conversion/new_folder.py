"""A folder that appears under its name when it is whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def new_folder(out: str | os.PathLike) -> Iterator[Path]:
    """Make a folder under a temporary name, and give it its own name at the end.

    What a run that was killed left under the temporary name is removed first. The name is locked while the
    folder is being written, so that two runs do not write to it at once.

    Args:
        out (`str` or `os.PathLike`): the folder to make; its parents are made too.

    Yields:
        `Path`: the folder to write to, `.<name>.partial` beside it; empty.

    Raises:
        FileExistsError: if `out` exists.
        BlockingIOError: if another run is writing it.

    Example:

    ```python
    >>> from transformers_emo.conversion.new_folder import new_folder
    >>> with new_folder(tmp_path / "model") as folder:
    ...     _ = (folder / "config.json").write_text("{}")
    >>> [file.name for file in (tmp_path / "model").iterdir()]
    ['config.json']

    ```
    """
    out = Path(out)
    check_is_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    lock = _claim(partial, out)
    try:
        yield partial
        check_is_new(out)
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def check_is_new(out: Path) -> None:
    """Refuse a name that is taken.

    Args:
        out (`Path`): the folder to be made.

    Raises:
        FileExistsError: if there is anything of that name, a broken link too.

    Example: see `new_folder`.
    """
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} exists already: name a folder that does not.")


def _claim(partial: Path, out: Path) -> int | None:
    """Make the temporary folder, empty, and lock it. The lock ends with the process, however it ends."""
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise FileExistsError(f"{partial} is needed for writing {out} and is no folder: remove it.")
    partial.mkdir(exist_ok=True)
    lock = None
    if fcntl is not None:
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is(lock, partial):
                raise BlockingIOError
        except BlockingIOError as error:
            os.close(lock)
            raise BlockingIOError(
                f"Another run is writing {out}: wait for it, or name another folder."
            ) from error
    for left in partial.iterdir():
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    return lock


def _is(descriptor: int, path: Path) -> bool:
    """Whether a path still names an open folder: another run may have renamed it meanwhile."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except OSError:
        return False
