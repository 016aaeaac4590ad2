"""Keeping hidden states between layers: in memory up to a limit, and on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Hashable
from typing import Any

import torch


class HiddenStates:
    """Tensors by key. Those that do not fit into memory are in a temporary file.

    Args:
        limit (`float`): the most bytes to hold in memory.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.subsets.choosing.hidden_states import HiddenStates
    >>> states = HiddenStates(limit=0)
    >>> states["a"] = torch.arange(3, dtype=torch.bfloat16)
    >>> states.pop("a")
    tensor([0., 1., 2.], dtype=torch.bfloat16)

    ```
    """

    def __init__(self, limit: float):
        self.limit = limit
        self._held: dict[Hashable, torch.Tensor] = {}
        self._bytes = 0
        self._file: Any = None
        self._places: dict[Hashable, tuple[int, torch.dtype, torch.Size]] = {}
        self._free: dict[int, list[int]] = {}  # places in the file that are free again, by size
        self._end = 0

    def __setitem__(self, key: Hashable, tensor: torch.Tensor) -> None:
        self._drop(key)
        tensor = tensor.cpu().contiguous()
        if self._bytes + tensor.nbytes <= self.limit:
            self._held[key] = tensor
            self._bytes += tensor.nbytes
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  (it is removed with this object)
        if self._free.get(tensor.nbytes):
            place = self._free[tensor.nbytes].pop()
        else:
            place, self._end = self._end, self._end + tensor.nbytes
        self._file.seek(place)
        self._file.write(_bytes_of(tensor))
        self._places[key] = (place, tensor.dtype, tensor.shape)

    def __getitem__(self, key: Hashable) -> torch.Tensor:
        if key in self._held:
            return self._held[key]
        place, dtype, shape = self._places[key]
        tensor = torch.empty(shape, dtype=dtype)
        self._file.seek(place)
        if self._file.readinto(_bytes_of(tensor)) != tensor.nbytes:
            raise OSError("The temporary file of hidden states was cut short: start again.")
        return tensor

    def pop(self, key: Hashable) -> torch.Tensor:
        """Remove a tensor and return it."""
        tensor = self[key]
        self._drop(key)
        return tensor

    def _drop(self, key: Hashable) -> None:
        if key in self._held:
            self._bytes -= self._held.pop(key).nbytes
        elif key in self._places:
            place, dtype, shape = self._places.pop(key)
            self._free.setdefault(shape.numel() * dtype.itemsize, []).append(place)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
