"""Copying parts of a training checkpoint into files of the released layout, in several threads.

If the bytes of a part stay the same, the kernel copies them from file to file, as `cp` does. Other parts are
converted in memory. Each thread uses the same memory again: the system would clear new memory page by page
for every tensor, which takes longer than transposing it.
"""

from __future__ import annotations

import errno
import math
import os
import threading
from collections.abc import Callable

import torch

from ...checkpoints import CheckpointError
from .distributed_checkpoint import DistributedCheckpoint, StoredTensor
from .layout import TensorPart

_BLOCK_BYTES = 32 << 20
# The errors of a kernel that cannot copy between two files by itself.
_CANNOT = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}


class PartWriter:
    """Writes tensors of the released layout from a training checkpoint. Several threads may use it.

    Args:
        checkpoint (`DistributedCheckpoint`): the training checkpoint.
        dtype (`torch.dtype`): the dtype to write tensors in.

    Example:

    ```python
    >>> import torch, torch.distributed.checkpoint as dcp
    >>> from transformers_emo.conversion import DistributedCheckpoint
    >>> from transformers_emo.conversion.olmo_core.layout import TensorPart
    >>> from transformers_emo.conversion.olmo_core.part_writer import PartWriter
    >>> dcp.save({"w": torch.arange(6.0).view(3, 2)}, checkpoint_id=str(tmp_path / "step"), no_dist=True)
    Metadata(...)
    >>> writer = PartWriter(DistributedCheckpoint(tmp_path / "step"), torch.float32)
    >>> with open(tmp_path / "out", "wb") as out:
    ...     writer.write(TensorPart("t", (2, 2), "w", 1, 3, transposed=True), out.fileno(), 0)
    >>> writer.close()
    >>> torch.frombuffer(bytearray((tmp_path / "out").read_bytes()), dtype=torch.float32)
    tensor([2., 4., 3., 5.])

    ```
    """

    def __init__(self, checkpoint: DistributedCheckpoint, dtype: torch.dtype):
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._memory = threading.local()
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()

    def write(self, part: TensorPart, descriptor: int, offset: int) -> None:
        """Write a part to its place in an open file.

        Args:
            part (`TensorPart`): the part.
            descriptor (`int`): the descriptor of a file that is open for writing.
            offset (`int`): the byte of the file at which the part begins.

        Raises:
            CheckpointError: if the part cannot be read.
            OSError: if it cannot be written.

        Example: see the class.
        """
        tensor = self._checkpoint[part.source]
        if part.transposed:
            self._write_transposed(tensor, part, descriptor, offset)
            return
        ranges = tensor.ranges(part.start, part.stop) if tensor.dtype is self._dtype else None
        if ranges is not None and all(
            _copy_in_kernel(self._descriptor(file), descriptor, start, offset + done, length)
            for file, start, length, done in ranges
        ):
            return
        self._write_rows(tensor, part, descriptor, offset)

    def close(self) -> None:
        """Close the training checkpoint's files that were opened for copying."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _write_rows(self, tensor: StoredTensor, part: TensorPart, descriptor: int, offset: int) -> None:
        row = math.prod(tensor.shape[1:])
        step = max(1, _BLOCK_BYTES // (4 * row))
        for first in range(part.start, part.stop, step):
            last = min(first + step, part.stop)
            rows = self._rows(tensor, first, last)
            _write(descriptor, rows, offset + (first - part.start) * row * rows.itemsize)

    def _write_transposed(self, tensor: StoredTensor, part: TensorPart, descriptor: int, offset: int) -> None:
        rows = self._rows(tensor, part.start, part.stop)
        columns = self._take("transposed", part.shape, self._dtype)
        columns.copy_(rows.T)
        _write(descriptor, columns, offset)

    def _rows(self, tensor: StoredTensor, first: int, last: int) -> torch.Tensor:
        """Rows in the wanted dtype, in memory of this thread."""
        shape = (last - first, *tensor.shape[1:])
        rows = tensor.rows(first, last, out=self._take("read", shape, tensor.dtype))
        return rows if rows.dtype is self._dtype else self._take("cast", shape, self._dtype).copy_(rows)

    def _take(self, use: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in memory that this thread keeps for one use. Its contents are old."""
        size = math.prod(shape) * dtype.itemsize
        memory = getattr(self._memory, use, None)
        if memory is None or len(memory) < size:
            memory = torch.empty(size, dtype=torch.uint8)
            setattr(self._memory, use, memory)
        return memory[:size].view(dtype).view(shape)

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._open:
                self._open[file] = os.open(self._checkpoint.folder / file, os.O_RDONLY)
            return self._open[file]


def _copy_in_kernel(source: int, target: int, start: int, offset: int, length: int) -> bool:
    """Let the kernel copy bytes between files. `False` if it cannot."""
    copy: Callable[..., int] | None = getattr(os, "copy_file_range", None)
    if copy is None:
        return False
    while length:
        try:
            copied = copy(source, target, length, start, offset)
        except OSError as error:
            if error.errno in _CANNOT:
                return False
            raise
        if copied == 0:
            raise CheckpointError(
                f"A file of the training checkpoint ends at byte {start}: it was cut short. Copy it again."
            )
        start, offset, length = start + copied, offset + copied, length - copied
    return True


def _write(descriptor: int, tensor: torch.Tensor, offset: int) -> None:
    data = memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
