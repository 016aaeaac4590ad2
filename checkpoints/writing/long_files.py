"""Long files written from beginning to end, which a later run continues where an earlier one was killed."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .durable_files import write_whole

_SYNC_BYTES = 512 << 20  # a run that is killed loses at most so much work
_READ_BYTES = 1 << 22
_HASHED_BEHIND = 2  # pieces that wait to be hashed


@dataclass(frozen=True)
class FilePart:
    """Some bytes of a file, such as a tensor.

    Args:
        length (`int`): how many they are.
        pieces (`Callable[[], Iterable[memoryview]]`): gives them, piece by piece. A piece is used up before
            the next but one is asked for, so two buffers are enough.

    Example: see `write_parts`.
    """

    length: int
    pieces: Callable[[], Iterable[memoryview]]

    @classmethod
    def of(cls, data: bytes) -> FilePart:
        """A part that is in memory."""
        return cls(len(data), lambda: [memoryview(data)])


def write_parts(path: Path, parts: Sequence[FilePart], *, done: Callable[[int], object] | None = None) -> str:
    """Write a file part by part. Parts that an earlier run brought to the disk are not written again.

    Beside the file, `<name>.written` says how many parts are on the disk. It stays when the file is whole, so
    that a further call has nothing to do; `remove_notes` removes it.

    Args:
        path (`Path`): the file.
        parts (`Sequence[FilePart]`): all parts. They must be those of the earlier run.
        done (`Callable[[int], object]`, *optional*): called with numbers of bytes as they are written or
            found.

    Returns:
        `str`: the SHA-256 of the file.

    Raises:
        ValueError: if a part gives more or fewer bytes than its length.
        OSError: if the file cannot be written.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.writing.long_files import FilePart, remove_notes, write_parts
    >>> _ = write_parts(tmp_path / "long", [FilePart.of(b"head"), FilePart.of(b"tail")], done=print)
    4
    4
    >>> (tmp_path / "long").read_bytes()
    b'headtail'
    >>> remove_notes(tmp_path)
    >>> [path.name for path in tmp_path.iterdir()]
    ['long']

    ```
    """
    done = done or (lambda length: None)
    note = path.with_name(f"{path.name}.written")
    written = _parts_on_disk(path, note, parts)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    with open(descriptor, "r+b", buffering=0) as file, ThreadPoolExecutor(1) as hasher:
        file.truncate(sum(part.length for part in parts[:written]))
        digest = hashlib.sha256()
        for found in _contents(descriptor):
            digest.update(found)
            done(len(found))
        file.seek(0, os.SEEK_END)
        unsynced = 0
        hashing: deque[Future] = deque()
        for number, part in enumerate(parts[written:], written + 1):
            left = part.length
            for piece in part.pieces():
                left -= len(piece)
                hashing.append(hasher.submit(digest.update, piece))
                _write_all(descriptor, piece)
                if len(hashing) >= _HASHED_BEHIND:
                    hashing.popleft().result()
                done(len(piece))
            if left:
                raise ValueError(
                    f"Part {number} of {path} is {part.length - left} bytes, expected {part.length}: this is "
                    "a fault of the writer. Please report it."
                )
            unsynced += part.length
            if unsynced >= _SYNC_BYTES or number == len(parts):
                os.fsync(descriptor)
                write_whole(note, json.dumps(number))
                unsynced = 0
        for job in hashing:
            job.result()
    return digest.hexdigest()


def remove_notes(folder: Path) -> None:
    """Remove what `write_parts` left beside files that are whole now.

    Args:
        folder (`Path`): the folder of the files.

    Example: see `write_parts`.
    """
    for note in folder.glob("*.written"):
        note.unlink()


def _parts_on_disk(path: Path, note: Path, parts: Sequence[FilePart]) -> int:
    try:
        number = json.loads(note.read_text())
        size = path.stat().st_size
    except (OSError, ValueError):
        return 0
    if type(number) is not int or not 0 <= number <= len(parts):
        return 0
    return number if size >= sum(part.length for part in parts[:number]) else 0


def _contents(descriptor: int) -> Iterator[bytes]:
    position = 0
    while data := os.pread(descriptor, _READ_BYTES, position):
        position += len(data)
        yield data


def _write_all(descriptor: int, data: memoryview) -> None:
    """A system may take less than it is given."""
    while data:
        data = data[os.write(descriptor, data) :]
