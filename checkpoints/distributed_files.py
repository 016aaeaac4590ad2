"""A folder that several processes saved together, read as if one had.

`save_pretrained(distributed_checkpoint=True)` writes such folders. Each process has written a file with its
blocks of the tensors. The file's metadata say where in its tensor each block begins. Here the blocks are put
together into one safetensors file that is not on the disk: whoever reads a part of it gets the bytes from the
files that have them, and other bytes are not read.

The layout is that of PyTorch's `HuggingFaceStorageWriter`.
"""

from __future__ import annotations

import json
import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from .errors import CheckpointError
from .local_files import LocalFiles
from .safetensors_header import DTYPE_NAMES, TensorSpan, read_header, read_metadata
from .small_files import parse_json

_NAME = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_WHOLE = "model.safetensors"  # the name of the file that is not there


def blocks_of_processes(folder: str | os.PathLike) -> list[str]:
    """The files of a folder that hold the blocks of processes.

    Args:
        folder (`str` or `os.PathLike`): the folder.

    Returns:
        `list[str]`: their names, sorted; empty for any other folder.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.distributed_files import blocks_of_processes
    >>> blocks_of_processes("model_cards/toy-emo")
    []

    ```
    """
    return sorted(
        path.name for path in Path(folder).glob("shard-*.safetensors") if _NAME.fullmatch(path.name)
    )


@dataclass(frozen=True)
class _Tensor:
    """A tensor made of blocks, which divide it as a grid: in each dimension they begin at `starts`."""

    shape: tuple[int, ...]
    starts: list[list[int]]
    blocks: dict[tuple[int, ...], TensorSpan]

    def runs(self, begin: int, end: int) -> Iterator[tuple[str, int, int]]:
        """Where elements `begin` to `end` lie, in order: file, first byte and number of bytes."""
        # The last dimension that is divided: of what lies behind it, each block has everything.
        cut = max((number for number, starts in enumerate(self.starts) if len(starts) > 1), default=0)
        inner = math.prod(self.shape[cut + 1 :])
        row = self.shape[cut] * inner if self.shape else 1
        itemsize = next(iter(self.blocks.values())).dtype.itemsize
        while begin < end:
            outer, place = divmod(begin, row)
            index: list[int] = []  # in the dimensions before the cut
            for size in reversed(self.shape[:cut]):
                outer, number = divmod(outer, size)
                index.insert(0, number)
            if self.shape:
                index.append(place // inner)
            where = tuple(
                bisect_right(starts, number) - 1 for starts, number in zip(self.starts, index, strict=False)
            )
            where += (0,) * (len(self.starts) - len(where))
            block = self.blocks[where]
            element = 0
            for number, starts, part, size in zip(index, self.starts, where, block.shape, strict=False):
                element = element * size + number - starts[part]
            stop, length = begin + 1, 1
            if self.shape:
                element = element * inner + place % inner
                last = self.starts[cut][where[cut]] + block.shape[cut]  # of the block, in the cut dimension
                stop = min(end, begin - place + last * inner)
                length = stop - begin
            yield block.file, block.start + element * itemsize, length * itemsize
            begin = stop


class DistributedFiles(LocalFiles):
    """The blocks of all processes as a source of bytes, with one file that holds every tensor whole.

    Args:
        folder (`str` or `os.PathLike`): the folder.

    Attributes:
        tensors (`dict[str, TensorSpan]`): where in that file each tensor lies.

    Raises:
        CheckpointError: if a file is damaged, or blocks are missing.

    Example: `Checkpoint.from_folder` opens such a folder as any other.
    """

    can_map = False

    def __init__(self, folder: str | os.PathLike):
        super().__init__(folder)
        self.tensors: dict[str, TensorSpan] = {}
        self._places: list[int] = []  # where each tensor begins in the whole file
        self._contents: list[_Tensor] = []
        found: dict[str, list[tuple[tuple[int, ...], TensorSpan]]] = {}
        for file in blocks_of_processes(folder):
            files = LocalFiles(folder)
            spans = read_header(files, file)
            offsets = _offsets(files, file)
            files.close()
            for name, span in spans.items():
                found.setdefault(name, []).append((offsets.get(name, (0,) * len(span.shape)), span))
        entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        parts: dict[str, tuple[_Tensor, int, int]] = {}
        place = 0
        for name in sorted(found):
            tensor, dtype = _put_together(name, found[name]), found[name][0][1].dtype
            end = place + math.prod(tensor.shape) * dtype.itemsize
            entries[name] = {
                "dtype": DTYPE_NAMES[dtype], "shape": tensor.shape, "data_offsets": [place, end]
            }  # fmt: skip
            parts[name] = (tensor, place, end)
            place = end
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        self._header = len(header).to_bytes(8, "little") + header
        begin = len(self._header)
        self._size = begin + place
        for name, (tensor, start, end) in parts.items():
            dtype = found[name][0][1].dtype
            self.tensors[name] = TensorSpan(_WHOLE, begin + start, begin + end, dtype, tensor.shape)
            if start < end:
                self._places.append(begin + start)
                self._contents.append(tensor)

    def size(self, file: str) -> int:
        """The size of a file in bytes."""
        return self._size if file == _WHOLE else super().size(file)

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of a file from `start`. Raises `CheckpointError` if it cannot."""
        if file != _WHOLE:
            return super().read_into(file, start, buffer)
        done = max(min(len(self._header) - start, len(buffer)), 0)
        buffer[:done] = self._header[start : start + done]
        while done < len(buffer):
            number = bisect_right(self._places, start + done) - 1
            tensor, place = self._contents[number], self._places[number]
            itemsize = next(iter(tensor.blocks.values())).dtype.itemsize
            first = start + done - place
            last = min(math.prod(tensor.shape) * itemsize, start + len(buffer) - place)
            # Whole elements, of which those at the ends may be wanted in part.
            begin, end = first // itemsize, -(-last // itemsize)
            position = begin * itemsize
            for name, offset, length in tensor.runs(begin, end):
                skipped = max(first - position, 0)
                length = min(position + length, last) - position - skipped
                super().read_into(name, offset + skipped, buffer[done : done + length])
                done += length
                position += skipped + length

    def read_strided(self, file: str, start: int, stride: int, run: int, buffer: memoryview) -> None:
        """Fill `buffer` with runs of bytes, each `stride` after the one before; as `read_into`."""
        for number in range(len(buffer) // run):
            self.read_into(file, start + number * stride, buffer[number * run : (number + 1) * run])

    @contextmanager
    def opened(self, file: str) -> Iterator[int]:
        """The descriptor of a file on the disk. Raises `CheckpointError` for the one that is not there."""
        if file == _WHOLE:
            raise CheckpointError(
                f"The tensors of {self.folder} are in the blocks of several processes, and this wants them "
                "whole: load the model and save it again."
            )
        with super().opened(file) as descriptor:
            yield descriptor


def _offsets(files: LocalFiles, file: str) -> dict[str, tuple[int, ...]]:
    """Where in their tensors the blocks of a file begin."""
    try:
        said = parse_json(read_metadata(files, file)["DCP_SHARDING_INFO"])
        offsets = {name: tuple(entry["saved_offsets"]) for name, entry in said.items()}
        if not all(type(n) is int and 0 <= n < 1 << 63 for place in offsets.values() for n in place):
            raise ValueError("offsets must be integers from 0 to 2^63")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{files.folder / file} does not say where its blocks belong ({type(error).__name__}: {error}): "
            "copy the folder again."
        ) from error
    return offsets


def _put_together(name: str, blocks: list[tuple[tuple[int, ...], TensorSpan]]) -> _Tensor:
    """The tensor that some blocks are of. They must divide it as a grid, without a gap."""
    rank = len(blocks[0][0])
    same = {(len(offsets), len(span.shape), span.dtype) for offsets, span in blocks}
    whole = len(same) == 1 and len(blocks[0][1].shape) == rank
    shape: list[int] = []
    starts: list[list[int]] = []
    filled = [(offsets, span) for offsets, span in blocks if math.prod(span.shape)] or blocks[:1]
    for dimension in range(rank if whole else 0):
        parts = sorted({(offsets[dimension], span.shape[dimension]) for offsets, span in filled})
        starts.append([start for start, _ in parts])
        ends = [start + size for start, size in parts]
        whole = whole and starts[-1] == [0, *ends[:-1]]
        shape.append(ends[-1])
    at = [{start: number for number, start in enumerate(places)} for places in starts]
    grid = {}
    if whole:
        for offsets, span in filled:
            grid[tuple(at[d][start] for d, start in enumerate(offsets))] = span
        cells = product(*(range(len(places)) for places in starts))
        whole = len(grid) == len(filled) and all(cell in grid for cell in cells)
    if not whole:
        raise CheckpointError(
            f"The {len(blocks)} blocks of {name} do not make up one tensor: expected those of all processes. "
            f"A file may be missing beside {blocks[0][1].file}: copy the folder again."
        )
    return _Tensor(tuple(shape), starts, grid)
