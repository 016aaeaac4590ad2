"""A cache for parts of large files of the Hub, beside the ordinary cache.

A file that is wanted in part has a folder in the cache of its repository,
`models--<user>--<name>/emo-ranges/<etag>/`:

- `data`: a sparse file of the file's full size. It holds the bytes that were fetched.
- `ranges`: which bytes these are, a line `start end` for each piece. A line is added when its piece is on
disk.
- `about.json`: the file's name, and the commits in which it was seen.

Several processes may fill a file at the same time: they write the same bytes to the same places. If a process
is killed, the pieces that it had not recorded are fetched again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import constants

from ..byte_ranges import Range, merge_ranges, subtract_ranges, total_length
from ..errors import CheckpointError

_FOLDER = "emo-ranges"
_MAX_CALL = 1 << 30  # one call reads or writes at most 2 GiB on Linux
_TRIES = 20
_T = TypeVar("_T")
_sync = getattr(os, "fdatasync", os.fsync)


class PartialFile:
    """A file of which only some bytes have been fetched.

    Args:
        folder (`Path`): the folder for its parts. It is made if it does not exist.
        size (`int`): how many bytes the whole file has. Parts of a file with another size are thrown away.

    Raises:
        CheckpointError: if the folder cannot be written.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.hub.part_cache import PartialFile
    >>> with PartialFile(tmp_path / "part", 100) as part:
    ...     part.write(10, b"abc")
    ...     part.record(10, 13)
    >>> with PartialFile(tmp_path / "part", 100) as part:
    ...     part.missing([(0, 20)])
    [(0, 10), (13, 20)]

    ```
    """

    def __init__(self, folder: Path, size: int):
        self.folder, self.size = folder, size
        self._lock = threading.Lock()
        try:
            self._data, self._journal = _again_if_cleared(lambda: _open(folder, size))
        except (OSError, OverflowError) as error:
            raise CheckpointError(
                f"Cannot keep a part of a file of {size} bytes in {folder}: {error}. Make room there, or set "
                "another cache with `cache_dir` or HF_HUB_CACHE."
            ) from error
        self.ranges = self._read_journal()

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def is_of(self, etag: str | None, size: int | None) -> bool:
        """Whether these are parts of the file with this etag and size."""
        return etag is not None and size == self.size and self.folder.name == _folder_name(etag)

    def missing(self, ranges: list[Range]) -> list[Range]:
        """The bytes of some ranges that have not been fetched."""
        with self._lock:
            return subtract_ranges(ranges, self.ranges)

    def write(self, start: int, data: bytes) -> None:
        """Write bytes to their place. They count as fetched once `record` is called for them."""
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(self._data, view[:_MAX_CALL], start)
                view, start = view[written:], start + written
        except OSError as error:  # a full disk
            raise CheckpointError(
                f"Writing to {self.folder} failed: {error.strerror or error}. Make room on the disk and call "
                "again."
            ) from error

    def record(self, start: int, end: int) -> None:
        """Note that a range has been written. It is on disk then, and survives a power cut."""
        try:
            _sync(self._data)
            os.write(self._journal, b"%d %d\n" % (start, end))
        except OSError as error:
            raise CheckpointError(
                f"Writing to {self.folder} failed: {error.strerror or error}. Make room on the disk and call "
                "again."
            ) from error
        with self._lock:
            self.ranges = merge_ranges([*self.ranges, (start, end)])

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `start`, which must have been fetched."""
        filled = 0
        while filled < len(buffer):
            got = os.preadv(self._data, [buffer[filled : filled + _MAX_CALL]], start + filled)
            if got == 0:
                raise CheckpointError(f"{self.folder} was cut short: clear it with `emo cache clear`.")
            filled += got

    def close(self) -> None:
        """Close the files."""
        os.close(self._data)
        os.close(self._journal)

    def _read_journal(self) -> list[Range]:
        with os.fdopen(os.dup(self._journal), "rb") as journal:
            journal.seek(0)
            text = journal.read()
        if text and not text.endswith(b"\n"):
            os.write(self._journal, b"\n")  # a killed process left half a line
        return _ranges(text, self.size)


@dataclass(frozen=True)
class CachedPart:
    """A file of the Hub of which a part is in the cache.

    Args:
        repo_id (`str`): its repository.
        file (`str`): its name there.
        commits (`tuple[str, ...]`): the commits in which it was seen.
        size (`int`): how many bytes the whole file has.
        present (`int`): how many of them are in the cache.
        folder (`Path`): the folder that holds them.

    Example: see `cached_parts`.
    """

    repo_id: str
    file: str
    commits: tuple[str, ...]
    size: int
    present: int
    folder: Path


def cache_root(cache_dir: str | os.PathLike | None = None) -> Path:
    """The folder of the Hub's cache: where huggingface_hub keeps whole files, and parts are kept beside them.

    If HF_HOME or XDG_CACHE_HOME is relative, or nothing says where the user's home is, huggingface_hub's path
    is relative. It is made absolute here: who changes the working folder later still reads what was opened.

    Args:
        cache_dir (`str` or `os.PathLike`, *optional*): the cache; `HF_HUB_CACHE` by default.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.hub.part_cache import cache_root
    >>> cache_root("cache").is_absolute()
    True

    ```
    """
    return Path(cache_dir or constants.HF_HUB_CACHE).absolute()


def part_folder(repo_folder: Path, etag: str) -> Path:
    """The folder for parts of a file.

    Args:
        repo_folder (`Path`): the repository's folder in the cache.
        etag (`str`): the file's etag, as the server says. The result is inside `repo_folder` for any string.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from transformers_emo.checkpoints.hub.part_cache import part_folder
    >>> part_folder(Path("models--a--b"), "0" * 40).as_posix()[:29]
    'models--a--b/emo-ranges/00000'

    ```
    """
    return repo_folder / _FOLDER / _folder_name(etag)


def _folder_name(etag: str) -> str:
    is_hash = re.fullmatch(r"[0-9a-f]{40,64}", etag)
    return etag if is_hash else hashlib.sha256(etag.encode()).hexdigest()


def write_about(folder: Path, file: str, commit: str, size: int) -> None:
    """Write down of which file a folder holds parts.

    Args:
        folder (`Path`): from `part_folder`.
        file (`str`): the file's name in its repository.
        commit (`str`): a commit that has the file.
        size (`int`): how many bytes the file has.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.hub.part_cache import find_part, part_folder, write_about
    >>> folder = part_folder(tmp_path, "0" * 40)
    >>> write_about(folder, "model.safetensors", "c0ffee", 100)
    >>> find_part(tmp_path, "model.safetensors", "c0ffee").size
    100

    ```
    """
    known = _read_about(folder)
    commits = [] if known is None or known[0] != file else known[1]
    if commit in commits:
        return
    partial = folder / f"about.{os.getpid()}.{threading.get_ident()}.partial"
    about = {"file": file, "commits": [*commits, commit], "size": size}

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(about) + "\n", encoding="utf-8")
        partial.replace(folder / "about.json")

    _again_if_cleared(write)


def find_part(repo_folder: Path, file: str, commit: str) -> CachedPart | None:
    """Find the cached part of a file in a commit, without asking the Hub.

    Args:
        repo_folder (`Path`): the repository's folder in the cache.
        file (`str`): the file's name in the repository.
        commit (`str`): the commit.

    Example: see `write_about`.
    """
    for part in _parts(repo_folder):
        if part.file == file and commit in part.commits:
            return part
    return None


def cached_parts(cache_dir: str | os.PathLike | None = None) -> list[CachedPart]:
    """All files of the Hub of which parts are in the cache.

    Args:
        cache_dir (`str` or `os.PathLike`, *optional*): the cache; `HF_HUB_CACHE` by default.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.hub.part_cache import cached_parts
    >>> cached_parts(tmp_path)
    []

    ```
    """
    root = cache_root(cache_dir)
    parts = [part for folder in root.glob("models--*") for part in _parts(folder)]
    return sorted(parts, key=lambda part: (part.repo_id, part.file, part.folder))


def clear_parts(repo_id: str | None = None, cache_dir: str | os.PathLike | None = None) -> int:
    """Delete all parts of files from the cache. Whole files stay.

    Args:
        repo_id (`str`, *optional*): delete those of this repository only; of all by default.
        cache_dir (`str` or `os.PathLike`, *optional*): the cache; `HF_HUB_CACHE` by default.

    Returns:
        `int`: how many bytes were deleted.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.hub.part_cache import clear_parts
    >>> clear_parts("user/model", tmp_path)
    0

    ```
    """
    root = cache_root(cache_dir)
    folders = (folder for folder in root.glob("models--*") if repo_id in (None, _repo_id(folder)))
    return sum(map(clear_repo, folders))


def clear_repo(repo_folder: Path) -> int:
    """Delete all parts of a repository's files from the cache.

    Other processes may load from them or fill them at this moment. They keep the files that they have opened.

    Args:
        repo_folder (`Path`): the repository's folder in the cache.

    Returns:
        `int`: how many bytes were deleted.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.hub.part_cache import clear_repo, part_folder, write_about
    >>> write_about(part_folder(tmp_path, "0" * 40), "model.safetensors", "c0ffee", 100)
    >>> clear_repo(tmp_path), list((tmp_path / "emo-ranges").iterdir())
    (0, [])

    ```
    """
    present = {part.folder: part.present for part in _parts(repo_folder)}
    freed = 0
    for folder in sorted((repo_folder / _FOLDER).glob("*")):
        cleared = folder
        if not folder.name.startswith("."):
            # Renamed first: a process that comes meanwhile makes a new folder and does not use this one.
            cleared = folder.with_name(f".{os.getpid()}.{threading.get_ident()}.{folder.name}")
            try:
                folder.rename(cleared)
            except FileNotFoundError:  # another process clears too
                continue
        shutil.rmtree(cleared, ignore_errors=True)
        if not cleared.exists():
            freed += present.get(folder, 0)
    return freed


def _repo_id(repo_folder: Path) -> str:
    return "/".join(repo_folder.name.split("--")[1:])


def _open(folder: Path, size: int) -> tuple[int, int]:
    """Open the data and the journal. Both are in the same folder, even if it is replaced at this moment."""
    folder.mkdir(parents=True, exist_ok=True)
    inside = os.open(folder, os.O_RDONLY)
    try:
        data = os.open("data", os.O_RDWR | os.O_CREAT, 0o666, dir_fd=inside)
        try:
            if os.fstat(data).st_size != size:
                with suppress(FileNotFoundError):
                    os.unlink("ranges", dir_fd=inside)
                # Nothing is erased: another process may have set the size and written data meanwhile.
                os.ftruncate(data, size)
            return data, os.open("ranges", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666, dir_fd=inside)
        except BaseException:
            os.close(data)
            raise
    finally:
        os.close(inside)


def _again_if_cleared(make: Callable[[], _T]) -> _T:
    """Make something in a folder. Try again if another process removes the folder meanwhile."""
    for _ in range(_TRIES):
        with suppress(FileNotFoundError):
            return make()
    return make()


def _ranges(journal: bytes, size: int) -> list[Range]:
    ranges = []
    for line in journal.split(b"\n")[:-1]:
        match = re.fullmatch(rb"(\d{1,19}) (\d{1,19})", line)
        if match and int(match[1]) < int(match[2]) <= size:
            ranges.append((int(match[1]), int(match[2])))
    return merge_ranges(ranges)


def _parts(repo_folder: Path) -> list[CachedPart]:
    found = []
    for folder in sorted((repo_folder / _FOLDER).glob("*")):
        about = None if folder.name.startswith(".") else _read_about(folder)  # a folder that is being cleared
        if about is not None:
            file, commits, size = about
            present = 0
            with suppress(OSError):  # nothing fetched yet, or cleared at this moment
                if (folder / "data").stat().st_size == size:
                    present = total_length(_ranges((folder / "ranges").read_bytes(), size))
            found.append(CachedPart(_repo_id(repo_folder), file, tuple(commits), size, present, folder))
    return found


def _read_about(folder: Path) -> tuple[str, list[str], int] | None:
    """Name, commits and size from `about.json`; `None` if the file is missing or damaged."""
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        file, commits, size = about["file"], about["commits"], about["size"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    fits = isinstance(file, str) and isinstance(commits, list) and type(size) is int and size >= 0
    fits = fits and all(isinstance(commit, str) for commit in commits)
    return (file, commits, size) if fits else None
