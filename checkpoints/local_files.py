"""Files of a folder as a source of bytes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import CheckpointError

_MOST_OPEN = 256  # files kept open at once: expert shards are thousands, and a process may have 1024


_MAX_READ = 1 << 30  # one read call takes at most 2 GiB on Linux


class LocalFiles:
    """Files of one folder, read with `pread`, so that only the bytes asked for come off the disk.

    What is made into other tensors is read: of a memory map the kernel reads ahead around every fault, 1.6
    times the bytes wanted from a cold disk, and mapped pages count as memory of the process beside the
    tensors made of them. What stays as it is may be mapped: see `LazyTensor`.

    Args:
        folder (`str` or `os.PathLike`): the folder that file names are relative to.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.local_files import LocalFiles
    >>> source = LocalFiles("model_cards/toy-emo")
    >>> buffer = bytearray(8)
    >>> source.read_into("model.safetensors", 0, memoryview(buffer))
    >>> source.close()

    ```
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()

    def size(self, file: str) -> int:
        """Size of `file` in bytes. Raises `CheckpointError` if it cannot be opened."""
        with self.opened(file) as descriptor:
            return os.fstat(descriptor).st_size

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `file` from `start`, or raise `CheckpointError`."""
        filled = 0
        with self.opened(file) as descriptor:
            while filled < len(buffer):
                try:
                    got = os.preadv(descriptor, [buffer[filled : filled + _MAX_READ]], start + filled)
                except OSError as error:
                    raise CheckpointError(
                        f"Reading {self.folder / file} failed at byte {start + filled}: {error}."
                    ) from error
                if got == 0:
                    raise CheckpointError(
                        f"{self.folder / file} ends at byte {start + filled}, expected "
                        f"{start + len(buffer)}: it was cut short while being read."
                    )
                filled += got

    def close(self) -> None:
        """Close the files; they are opened again when needed."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    @contextmanager
    def opened(self, file: str) -> Iterator[int]:
        """The descriptor of `file`, opened for good, or for as long as it is used if many are already."""
        with self._lock:
            descriptor = self._open.get(file)
            keep = descriptor is not None or len(self._open) < _MOST_OPEN
            if descriptor is None:
                path = self.folder / file
                try:
                    descriptor = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise CheckpointError(
                        f"Cannot open the weights file {path}: {error.strerror}."
                    ) from error
                if hasattr(os, "posix_fadvise"):
                    # Experts lie scattered over the file: reading ahead would fetch the ones not wanted.
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
                if keep:
                    self._open[file] = descriptor
        try:
            yield descriptor
        finally:
            if not keep:
                os.close(descriptor)
