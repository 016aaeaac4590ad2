"""Long files written from beginning to end, which a later run continues where an earlier one was killed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import CheckpointError
from .durable_files import write_whole

_SYNC_BYTES = 512 << 20  # a run that is killed loses at most so much work
_STEP_BYTES = 1 << 22  # copied at once
_AHEAD_BYTES = 1 << 26  # of what is to be read, the system is asked for so much in advance
_HASH_BYTES = 1 << 20  # stays in the processor's cache
# What systems say that cannot copy from file to file by themselves, or not between these two.
_CANNOT_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY}


@dataclass(frozen=True)
class FileSpan:
    """Bytes of another file. The system copies them, where it can: they do not pass through this process.

    Args:
        opened (`Callable[[], AbstractContextManager[int]]`): gives a descriptor of the file, as
            `LocalFiles.opened` does.
        name (`str`): the file, for errors.
        start (`int`): where the bytes begin.
        length (`int`): how many they are.

    Example: see `write_parts`.
    """

    opened: Callable[[], AbstractContextManager[int]]
    name: str
    start: int
    length: int


Piece = memoryview | FileSpan


@dataclass(frozen=True)
class FilePart:
    """Some bytes of a file, such as a tensor.

    Args:
        length (`int`): how many they are.
        pieces (`Callable[[], Iterable[Piece]]`): gives them, piece by piece. A piece is used up before the
            next one is asked for.
        reads (`Callable[[], Iterable[FileSpan]]`, *optional*): what of other files will be read for them. The
            system is asked for it while earlier parts are written.

    Example: see `write_parts`.
    """

    length: int
    pieces: Callable[[], Iterable[Piece]]
    reads: Callable[[], Iterable[FileSpan]] = tuple

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
    digest = hashlib.sha256()
    try:
        # Hashing reads what was written, from the page cache, while the next part is written.
        with ThreadPoolExecutor(1) as hasher:
            position = sum(part.length for part in parts[:written])
            os.ftruncate(descriptor, position)
            hashing = [hasher.submit(_hash, digest, descriptor, 0, position)]
            if position:
                done(position)
            synced = position
            ahead = _ReadingAhead(span for part in parts[written:] for span in part.reads())
            ahead.ask(_AHEAD_BYTES)
            for number, part in enumerate(parts[written:], written + 1):
                start, end = position, position + part.length
                for piece in part.pieces():
                    for count in _write(descriptor, position, piece):
                        position += count
                        ahead.ask(count)
                        done(count)
                if position != end:
                    raise ValueError(
                        f"Part {number} of {path} is {position - start} bytes, expected {part.length}: this "
                        "is a fault of the writer. Please report it."
                    )
                hashing.append(hasher.submit(_hash, digest, descriptor, start, end))
                if position - synced >= _SYNC_BYTES or number == len(parts):
                    os.fsync(descriptor)
                    write_whole(note, json.dumps(number))
                    synced = position
            for job in hashing:
                job.result()
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def remove_notes(folder: Path) -> None:
    """Remove what `write_parts` left beside files that are whole now.

    Args:
        folder (`Path`): the folder of the files.

    Example: see `write_parts`.
    """
    for note in folder.glob("*.written"):
        note.unlink()


class _ReadingAhead:
    """Asks the system for bytes that will be read, so that the disk reads them meanwhile."""

    def __init__(self, spans: Iterator[FileSpan]):
        self._steps = (
            replace(span, start=span.start + at, length=min(_STEP_BYTES, span.length - at))
            for span in spans
            for at in range(0, span.length, _STEP_BYTES)
        )
        self._wanted = 0

    def ask(self, length: int) -> None:
        """Ask for the next bytes, about so many."""
        self._wanted += length
        while self._wanted > 0 and hasattr(os, "posix_fadvise"):
            step = next(self._steps, None)
            if step is None:
                return
            with step.opened() as descriptor:
                os.posix_fadvise(descriptor, step.start, step.length, os.POSIX_FADV_WILLNEED)
            self._wanted -= step.length


def _parts_on_disk(path: Path, note: Path, parts: Sequence[FilePart]) -> int:
    try:
        number = json.loads(note.read_text())
        size = path.stat().st_size
    except (OSError, ValueError):
        return 0
    if type(number) is not int or not 0 <= number <= len(parts):
        return 0
    return number if size >= sum(part.length for part in parts[:number]) else 0


def _write(descriptor: int, position: int, piece: Piece) -> Iterator[int]:
    """Write a piece, step by step, and give the bytes of each step."""
    if isinstance(piece, memoryview):
        while piece:  # a system may take less than it is given
            count = os.pwrite(descriptor, piece, position)
            piece, position = piece[count:], position + count
            yield count
        return
    copied = 0
    with piece.opened() as source:
        while copied < piece.length:
            step = min(_STEP_BYTES, piece.length - copied)
            count = _copy(source, piece.start + copied, descriptor, position, step)
            if count == 0:
                raise CheckpointError(
                    f"{piece.name} ends at byte {piece.start + copied}, expected "
                    f"{piece.start + piece.length}: it was cut short while it was read. Start again when it "
                    "is whole."
                )
            copied, position = copied + count, position + count
            yield count


def _copy(source: int, start: int, target: int, position: int, length: int) -> int:
    """Copy some bytes from file to file; how many were copied, 0 at the end of the source."""
    if hasattr(os, "copy_file_range"):  # on Linux
        try:
            return os.copy_file_range(source, target, length, start, position)
        except OSError as error:
            if error.errno not in _CANNOT_COPY:
                raise
    data = memoryview(os.pread(source, length, start))
    written = 0
    while written < len(data):
        written += os.pwrite(target, data[written:], position + written)
    return written


def _hash(digest: hashlib._Hash, descriptor: int, start: int, end: int) -> None:
    """Go on with a hash: the bytes of a file from `start` to `end`."""
    buffer = memoryview(bytearray(_HASH_BYTES))
    while start < end:
        count = os.preadv(descriptor, [buffer[: min(len(buffer), end - start)]], start)
        if count == 0:
            raise OSError(f"A file of weights ends at byte {start}, expected {end}: check the disk.")
        digest.update(buffer[:count])
        start += count
