"""Files that are on disk when a call returns, and are still whole after a power cut.

A system keeps what is written in memory for some seconds. A rename can reach the disk before the contents of
the file: after a power cut the file is there and empty. So contents are synchronised first. Then the file
gets its name, and then the folder that holds the name is synchronised.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

# What systems say that cannot synchronise a folder, or a special file.
_CANNOT = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EACCES, errno.EPERM}


def sync_tree(folder: str | os.PathLike[str]) -> None:
    """Bring all files and folders inside a folder to the disk, and then the folder itself.

    Args:
        folder (`str` or `os.PathLike`): the folder. Links in it are not followed.

    Raises:
        OSError: if the disk fails or is full.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.writing.durable_files import sync_tree
    >>> _ = (tmp_path / "config.json").write_text("{}")
    >>> sync_tree(tmp_path)

    ```
    """
    for place, _, names in os.walk(os.fspath(folder), topdown=False):
        for name in names:
            path = os.path.join(place, name)
            if not os.path.islink(path) and os.path.isfile(path):
                _sync(path)
        sync_folder(place)


def sync_folder(folder: str | os.PathLike) -> None:
    """Bring the names in a folder to the disk. Where the system cannot do that, nothing happens.

    Args:
        folder (`str` or `os.PathLike`): the folder.

    Raises:
        OSError: if the disk fails or is full.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.writing.durable_files import sync_folder
    >>> sync_folder(tmp_path)

    ```
    """
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise


def make_folders(folder: str | os.PathLike) -> None:
    """Make a folder and its parents, and bring their names to the disk.

    Args:
        folder (`str` or `os.PathLike`): the folder. It may exist.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.writing.durable_files import make_folders
    >>> make_folders(tmp_path / "a" / "b")
    >>> (tmp_path / "a" / "b").is_dir()
    True

    ```
    """
    folder = Path(folder)
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in reversed(missing):
        sync_folder(place.parent)


def rename_durably(old: str | os.PathLike, new: str | os.PathLike) -> None:
    """Rename a file or folder whose contents are on disk, and bring the new name to the disk too.

    Args:
        old (`str` or `os.PathLike`): the name until now.
        new (`str` or `os.PathLike`): the new name, in the same folder. A file of that name is replaced.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.writing.durable_files import rename_durably
    >>> _ = (tmp_path / "old.txt").write_text("text")
    >>> rename_durably(tmp_path / "old.txt", tmp_path / "new.txt")
    >>> (tmp_path / "new.txt").read_text()
    'text'

    ```
    """
    os.replace(old, new)
    sync_folder(Path(new).parent)


def write_whole(path: str | os.PathLike, data: str | bytes) -> None:
    """Write a file that appears under its name when it is whole. A file that is there already is replaced.

    Args:
        path (`str` or `os.PathLike`): the file. Its folder is made if it does not exist.
        data (`str` or `bytes`): its contents. Text is written as UTF-8.

    Raises:
        OSError: if it cannot be written. A file of that name stays as it was.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.writing.durable_files import write_whole
    >>> write_whole(tmp_path / "new" / "table.md", "| a |")
    >>> (tmp_path / "new" / "table.md").read_text()
    '| a |'

    ```
    """
    path = Path(path)
    make_folders(path.parent)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)  # what an earlier process of this number left
        # Not through a link that others may have put there.
        descriptor = os.open(
            partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666
        )
        with open(descriptor, "wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        rename_durably(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _sync(path: str | os.PathLike) -> None:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
