"""The files of a folder as a source of bytes."""

from __future__ import annotations

import mmap
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import CheckpointError
from .small_files import open_regular, read_json

_MOST_OPEN = 256  # files kept open: there may be thousands of expert shards, and a process may open 1024
_PAGE = mmap.PAGESIZE
_READ_AHEAD = 128 << 10  # for one call Linux may read only the beginning, but at least so many bytes
_MAX_READ = 1 << 30  # one read call takes at most 2 GiB on Linux


def file_inside(folder: str | os.PathLike, name: str | os.PathLike) -> Path:
    """The path of a file of a folder. It is refused if a link leads out of the folder.

    The folder itself may be a link. So may files in a snapshot of the Hub's cache, which has the contents of
    all snapshots of a repository in one place beside them.

    Args:
        folder (`str` or `os.PathLike`): the folder.
        name (`str` or `os.PathLike`): the file's path in it. The file need not exist.

    Raises:
        CheckpointError: if a link leads out of the folder.

    Example:

    ```python
    >>> from transformers_emo import CheckpointError
    >>> from transformers_emo.checkpoints.local_files import file_inside
    >>> file_inside("model_cards/toy-emo", "config.json").name
    'config.json'
    >>> (tmp_path / "config.json").symlink_to("/etc/hostname")
    >>> try:
    ...     file_inside(tmp_path, "config.json")
    ... except CheckpointError as error:
    ...     print("is a link out of its folder" in str(error))
    True

    ```
    """
    path, root = Path(folder, name), Path(os.path.realpath(folder))
    target = Path(os.path.realpath(path))
    if target.is_relative_to(root):
        return path
    for parent in root.parents:
        is_cache = parent.name == "snapshots" and re.match(r"(models|datasets|spaces)--", parent.parent.name)
        if is_cache and target.is_relative_to(os.path.realpath(parent.parent / "blobs")):
            return path
    raise CheckpointError(
        f"{path} is a link out of its folder, to {target}: refused. If you trust it, put the file itself "
        "there (`cp -L` copies what links lead to)."
    )


def check_json_inside(folder: str | os.PathLike, name: str) -> None:
    """Check a JSON file of a folder that others will read: what they take may not depend on who they are.

    Args:
        folder (`str` or `os.PathLike`): the folder.
        name (`str`): the file's name. The file need not exist.

    Raises:
        CheckpointError: if a link leads out of the folder, it is no file, longer than 8 MiB or no JSON, or an
            object in it has a key twice.

    Example:

    ```python
    >>> from transformers_emo import CheckpointError
    >>> from transformers_emo.checkpoints.local_files import check_json_inside
    >>> _ = (tmp_path / "twice.json").write_text('{"num_experts": 4, "num_experts": 8}')
    >>> try:
    ...     check_json_inside(tmp_path, "twice.json")
    ... except CheckpointError as error:
    ...     print("has the key 'num_experts' twice" in str(error))
    True

    ```
    """
    path = file_inside(folder, name)
    try:
        read_json(path)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Cannot read {path}: {error}. Download it again, or correct it.") from error


class LocalFiles:
    """The files of one folder, read with `pread`, so that only the wanted bytes come off the disk.

    A memory map would be worse for tensors that are made of what is read. The kernel reads ahead around every
    page fault: 1.6 times the wanted bytes, from a disk of which nothing is in memory yet. And mapped pages
    count as memory of the process, in addition to the tensors. Tensors that stay as they are in the file may
    be mapped: see `LazyTensor`.

    Args:
        folder (`str` or `os.PathLike`): the folder. Names of files are relative to it.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.local_files import LocalFiles
    >>> source = LocalFiles("model_cards/toy-emo")
    >>> buffer = bytearray(8)
    >>> source.read_into("model.safetensors", 0, memoryview(buffer))
    >>> source.close()

    ```
    """

    can_map = True  # names of files are those on the disk

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()

    def size(self, file: str) -> int:
        """The size of a file in bytes. Raises `CheckpointError` if it cannot be opened."""
        with self.opened(file) as descriptor:
            return os.fstat(descriptor).st_size

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of a file from `start`. Raises `CheckpointError` if it cannot."""
        filled = 0
        with self.opened(file) as descriptor:
            while filled < len(buffer):
                try:
                    got = os.preadv(descriptor, [buffer[filled : filled + _MAX_READ]], start + filled)
                except OSError as error:
                    raise CheckpointError(
                        f"Reading {self.folder / file} failed at byte {start + filled}: {error}. Check the "
                        "disk, or download the file again."
                    ) from error
                if got == 0:
                    raise CheckpointError(
                        f"{self.folder / file} ends at byte {start + filled}, expected "
                        f"{start + len(buffer)}: it was cut short while it was read. Load "
                        "it again when it is whole."
                    )
                filled += got

    def read_strided(self, file: str, start: int, stride: int, run: int, buffer: memoryview) -> None:
        """Fill `buffer` with runs of bytes, each `stride` after the one before; as `read_into`."""
        end = start + (len(buffer) // run - 1) * stride + run
        with self.opened(file) as descriptor:
            if stride - run < _PAGE and hasattr(os, "posix_fadvise"):
                # Every page is needed: reading ahead in order is far faster than page by page.
                for ahead in range(start, end, _READ_AHEAD):
                    size = min(_READ_AHEAD, end - ahead)
                    os.posix_fadvise(descriptor, ahead, size, os.POSIX_FADV_WILLNEED)
            place = 0
            for offset in range(start, end, stride):
                part = buffer[place : place + run]
                try:
                    whole = os.preadv(descriptor, [part], offset) == run
                except OSError:
                    whole = False
                if not whole:
                    self.read_into(file, offset, part)  # a long run, or an error that it words
                place += run

    def close(self) -> None:
        """Close the files. They are opened again when they are needed."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    @contextmanager
    def opened(self, file: str) -> Iterator[int]:
        """The descriptor of a file. It stays open, or if many are open already, is closed at the end."""
        with self._lock:
            descriptor = self._open.get(file)
            keep = descriptor is not None or len(self._open) < _MOST_OPEN
            if descriptor is None:
                path = file_inside(self.folder, file)
                try:
                    descriptor = open_regular(path)
                except OSError as error:
                    raise CheckpointError(
                        f"Cannot open the weights file {path}: {error.strerror}. Download it again, or "
                        "correct its permissions."
                    ) from error
                if hasattr(os, "posix_fadvise"):
                    # Experts lie scattered over the file: reading ahead would fetch others too.
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
                if keep:
                    self._open[file] = descriptor
        try:
            yield descriptor
        finally:
            if not keep:
                os.close(descriptor)
