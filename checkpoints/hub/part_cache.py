"""Parts of large files of the Hub, kept on disk beside the ordinary cache.

A file that is wanted in part lies in the cache folder of its repository, as
`models--<user>--<name>/emo-ranges/<etag>/`:

- `data`: a sparse file of the file's full size, filled where bytes have come;
- `ranges`: which ones, a line `start end` for each piece, added once the piece is on the disk;
- `about.json`: the file's name, and the commits it was seen in.

Processes may fill the same file at once: all of them write the same bytes to the same place. What a killed
process had not recorded is fetched again.
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
    """A file of which only some bytes are there.

    Args:
        folder (`Path`): where it is kept; made if need be.
        size (`int`): bytes of the whole file. What was kept of a file of another size is thrown away.

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
                f"Cannot keep a part of a file of {size} bytes in {folder}: {error}."
            ) from error
        self.ranges = self._read_journal()

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def is_of(self, etag: str | None, size: int | None) -> bool:
        """Whether this is where parts of a file with this etag and size are kept."""
        return etag is not None and size == self.size and self.folder.name == _folder_name(etag)

    def missing(self, ranges: list[Range]) -> list[Range]:
        """What of these ranges is not there."""
        with self._lock:
            return subtract_ranges(ranges, self.ranges)

    def write(self, start: int, data: bytes) -> None:
        """Put bytes in their place. They count as there once `record` says so."""
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(self._data, view[:_MAX_CALL], start)
                view, start = view[written:], start + written
        except OSError as error:  # a full disk
            raise CheckpointError(f"Writing to {self.folder} failed: {error.strerror or error}.") from error

    def record(self, start: int, end: int) -> None:
        """Note that a range has been written, once the disk has it: true after a power cut too."""
        try:
            _sync(self._data)
            os.write(self._journal, b"%d %d\n" % (start, end))
        except OSError as error:
            raise CheckpointError(f"Writing to {self.folder} failed: {error.strerror or error}.") from error
        with self._lock:
            self.ranges = merge_ranges([*self.ranges, (start, end)])

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `start`, which are there."""
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
    """A file of the Hub that is kept in part.

    Args:
        repo_id (`str`): its repository.
        file (`str`): its name there.
        commits (`tuple[str, ...]`): the commits it was seen in.
        size (`int`): bytes of the whole file.
        present (`int`): bytes of it that are there.
        folder (`Path`): where they are kept.

    Example: see `cached_parts`.
    """

    repo_id: str
    file: str
    commits: tuple[str, ...]
    size: int
    present: int
    folder: Path


def part_folder(repo_folder: Path, etag: str) -> Path:
    """Where parts of a file are kept.

    Args:
        repo_folder (`Path`): the repository's folder in the cache.
        etag (`str`): the file's identity, from the server: whatever it is, the result is in `repo_folder`.

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
    """Note what a folder keeps a part of.

    Args:
        folder (`Path`): from `part_folder`.
        file (`str`): the file's name in its repository.
        commit (`str`): a commit it is in.
        size (`int`): its bytes.

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
    """What is kept of a file of a commit, found without asking the Hub.

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
    """All files of the Hub of which parts are kept.

    Args:
        cache_dir (`str` or `os.PathLike`, *optional*): the cache; `HF_HUB_CACHE` by default.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.hub.part_cache import cached_parts
    >>> cached_parts(tmp_path)
    []

    ```
    """
    root = Path(cache_dir or constants.HF_HUB_CACHE)
    parts = [part for folder in root.glob("models--*") for part in _parts(folder)]
    return sorted(parts, key=lambda part: (part.repo_id, part.file, part.folder))


def clear_parts(repo_id: str | None = None, cache_dir: str | os.PathLike | None = None) -> int:
    """Throw away what is kept of files in part; whole files stay.

    Args:
        repo_id (`str`, *optional*): only of this repository; of all by default.
        cache_dir (`str` or `os.PathLike`, *optional*): the cache; `HF_HUB_CACHE` by default.

    Returns:
        `int`: the bytes thrown away.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.hub.part_cache import clear_parts
    >>> clear_parts("user/model", tmp_path)
    0

    ```
    """
    root = Path(cache_dir or constants.HF_HUB_CACHE)
    folders = (folder for folder in root.glob("models--*") if repo_id in (None, _repo_id(folder)))
    return sum(map(clear_repo, folders))


def clear_repo(repo_folder: Path) -> int:
    """Throw away what is kept of a repository's files in part, even if others load from it or fill it now.

    They keep what they have opened.

    Args:
        repo_folder (`Path`): the repository's folder in the cache.

    Returns:
        `int`: the bytes thrown away.

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
            # Under another name first: who comes meanwhile begins a folder that is not being emptied.
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
    """Data and journal, both of one folder, even if it is cleared meanwhile and another takes its name."""
    folder.mkdir(parents=True, exist_ok=True)
    inside = os.open(folder, os.O_RDONLY)
    try:
        data = os.open("data", os.O_RDWR | os.O_CREAT, 0o666, dir_fd=inside)
        try:
            if os.fstat(data).st_size != size:
                with suppress(FileNotFoundError):
                    os.unlink("ranges", dir_fd=inside)
                # Nothing is wiped: another process may have given it its size, and filled it, since.
                os.ftruncate(data, size)
            return data, os.open("ranges", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666, dir_fd=inside)
        except BaseException:
            os.close(data)
            raise
    finally:
        os.close(inside)


def _again_if_cleared(make: Callable[[], _T]) -> _T:
    """What makes something in a folder, once more if the folder goes meanwhile."""
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
        about = None if folder.name.startswith(".") else _read_about(folder)  # those are being cleared
        if about is not None:
            file, commits, size = about
            present = 0
            with suppress(OSError):  # none yet, or cleared at this moment
                if (folder / "data").stat().st_size == size:
                    present = total_length(_ranges((folder / "ranges").read_bytes(), size))
            found.append(CachedPart(_repo_id(repo_folder), file, tuple(commits), size, present, folder))
    return found


def _read_about(folder: Path) -> tuple[str, list[str], int] | None:
    """Name, commits and size from `about.json`; `None` if it is not there or not whole."""
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        file, commits, size = about["file"], about["commits"], about["size"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    fits = isinstance(file, str) and isinstance(commits, list) and type(size) is int and size >= 0
    fits = fits and all(isinstance(commit, str) for commit in commits)
    return (file, commits, size) if fits else None
