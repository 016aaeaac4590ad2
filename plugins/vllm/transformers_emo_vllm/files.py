"""A model's files: a folder, or a repository of the Hub, of which only the files that are needed are
fetched."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .choice import LIBRARY, ExpertChoiceError, Subset, library_file, no_subset, read_subset

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LARGEST_HEADER = 100_000_000  # bytes, as in the safetensors library


class WeightsError(ValueError):
    """A model's files are damaged, or are not those of its config.

    Example:

    ```python
    >>> from transformers_emo_vllm.files import WeightsError
    >>> issubclass(WeightsError, ValueError)
    True

    ```
    """


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model.

    Args:
        place (`str`): folder or repository.
        revision (`str`, *optional*): for a repository.
        cache (`str`, *optional*): where downloads go; the Hub's cache by default.

    Example:

    ```python
    >>> from transformers_emo_vllm.files import ModelFiles
    >>> (tmp_path / "subsets").mkdir()
    >>> (tmp_path / "subsets" / "math.json").write_text('{"experts": [[0]]}')
    18
    >>> ModelFiles(str(tmp_path)).library()
    {'math': PosixPath('...math.json')}

    ```
    """

    place: str
    revision: str | None = None
    cache: str | None = None

    def find(self, file: str) -> Path | None:
        """Where a file is on this machine, fetched if need be; `None` if the model has none such."""
        if os.path.isdir(self.place):
            path = Path(self.place, file)
            return path if path.is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return Path(hf_hub_download(self.place, file, revision=self.revision, cache_dir=self.cache))
        except EntryNotFoundError:
            return None

    def library(self) -> dict[str, Path]:
        """The files of the model's subsets, by name."""
        folder = Path(self.place, LIBRARY)
        if not os.path.isdir(self.place):
            from huggingface_hub import snapshot_download

            try:
                whole = snapshot_download(
                    self.place,
                    revision=self.revision,
                    cache_dir=self.cache,
                    allow_patterns=f"{LIBRARY}/*.json",
                )
            except OSError:  # offline, and not in the cache
                return {}
            folder = Path(whole, LIBRARY)
        paths = sorted(folder.glob("*.json")) if folder.is_dir() else []
        return {path.stem: path for path in paths if library_file(path.stem)}

    def subset(self, name: str) -> Subset:
        """The subset of a name, or of a file.

        Raises:
            ExpertChoiceError: if there is none.
        """
        if os.path.isfile(name):
            return read_subset(name)
        library = self.library()
        if name.removesuffix(".json") not in library:
            raise no_subset(name, list(library))
        return read_subset(library[name.removesuffix(".json")])

    def tensor_files(self) -> dict[str, str]:
        """For each tensor the file that it is in.

        Raises:
            WeightsError: if the model has no safetensors files, or its index is damaged or names files
            elsewhere.
        """
        index = self.find(INDEX)
        if index is None:
            single = self.find(SINGLE)
            if single is None:
                raise WeightsError(
                    f"{self.place} has neither {INDEX} nor {SINGLE}: weights of other kinds are not read."
                )
            return dict.fromkeys(TensorFile(single).tensors, SINGLE)
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
                raise ValueError("`weight_map` must map names to files")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise WeightsError(f"{index} is damaged ({error}): download it again.") from error
        for file in set(names.values()):
            if Path(file).is_absolute() or ".." in Path(file).parts or not file.endswith(".safetensors"):
                raise WeightsError(f"{index} names the file {file!r}: expected safetensors files beside it.")
        return names


class TensorFile:
    """A safetensors file, of which only the bytes asked for are read.

    Args:
        path (`Path`): the file.

    Attributes:
        tensors (`dict[str, tuple]`): for each tensor its dtype, shape, and first and last byte.
        bytes_read (`int`): how many bytes were read of it so far.

    Raises:
        WeightsError: if the file is damaged.

    Example:

    ```python
    >>> import torch
    >>> from safetensors.torch import save_file
    >>> from transformers_emo_vllm.files import TensorFile
    >>> save_file({"a": torch.arange(4.0)}, tmp_path / "m.safetensors")
    >>> TensorFile(tmp_path / "m.safetensors").read("a", 1, 3)
    tensor([1., 2.])

    ```
    """

    def __init__(self, path: Path):
        self.path = path
        self.bytes_read = 0
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by `close`)
        size = os.fstat(self._file.fileno()).st_size
        (length,) = struct.unpack("<Q", self._bytes(0, 8)) if size >= 8 else (1 << 62,)
        if length > min(size - 8, _LARGEST_HEADER):
            raise WeightsError(f"{path} is damaged or no safetensors file: download it again.")
        try:
            header = json.loads(bytes(self._bytes(8, length)).decode("utf-8"))
            header.pop("__metadata__", None)
            self.tensors = {name: self._entry(entry, 8 + length, size) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise WeightsError(f"{path} has a damaged header ({error}): download it again.") from error

    @staticmethod
    def _entry(entry: dict, data: int, size: int) -> tuple[torch.dtype | str, tuple[int, ...], int, int]:
        shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
        if (
            not all(type(n) is int and n >= 0 for n in (*shape, start, end))
            or data + end > size
            or end < start
        ):
            raise ValueError(f"shape {shape} and bytes {start} to {end} do not fit a file of {size} bytes")
        dtype = _DTYPES.get(entry["dtype"], entry["dtype"])
        if isinstance(dtype, torch.dtype) and end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"bytes {start} to {end} do not fit shape {shape} of {dtype}")
        return dtype, shape, data + start, data + end

    def _bytes(self, start: int, length: int) -> bytearray:
        buffer = bytearray(length)
        view, done = memoryview(buffer), 0
        while done < length:
            got = os.preadv(self._file.fileno(), [view[done:]], start + done)
            if got == 0:
                raise WeightsError(f"{self.path} ends too early: download it again.")
            done += got
        self.bytes_read += length
        return buffer

    def read(self, name: str, first: int | None = None, last: int | None = None) -> torch.Tensor:
        """A tensor, or its rows from `first` up to `last`.

        Raises:
            WeightsError: if its numbers are of a kind that no plain EMO has, or the rows are not there.
        """
        dtype, shape, start, end = self.tensors[name]
        if not isinstance(dtype, torch.dtype):
            raise WeightsError(
                f"{name} in {self.path} is of type {dtype}, expected one of {', '.join(_DTYPES)}: quantised "
                "weights are not served."
            )
        if first is not None and last is not None:
            if not shape or not 0 <= first <= last <= shape[0]:
                raise WeightsError(
                    f"{name} in {self.path} has the shape {shape}: there are no rows {first} to {last}."
                )
            row = math.prod(shape[1:]) * dtype.itemsize
            start, end, shape = start + first * row, start + last * row, (last - first, *shape[1:])
        if start == end:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._bytes(start, end - start), dtype=dtype).view(shape)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def subset_of(value: object, files: ModelFiles) -> Subset:
    """A subset given at the start of a server: a name, a file, or JSON data.

    Args:
        value: the name or path, `{"experts": [[...], ...]}`, or one list of ids a layer.
        files (`ModelFiles`): the model's.

    Raises:
        ExpertChoiceError: if it is none of these, or there is no such subset.

    Example:

    ```python
    >>> from transformers_emo_vllm.files import ModelFiles, subset_of
    >>> subset_of([[0, 3]], ModelFiles(str(tmp_path))).experts
    ((0, 3),)

    ```
    """
    from .choice import checked_ids

    if isinstance(value, str):
        return files.subset(value)
    if isinstance(value, dict) and "experts" in value:
        sizes = value.get("root_experts_per_layer")
        return Subset(
            checked_ids(value["experts"], "`expert_subset`"),
            None if sizes is None else tuple(sizes),
            value.get("drop_shared") is True,
            value.get("local_ids") is True,
        )
    if isinstance(value, Sequence):
        return Subset(checked_ids(value, "`expert_subset`"))
    raise ExpertChoiceError(
        f"`expert_subset` is {value!r:.80}, expected the name of a subset, a file or its data."
    )
