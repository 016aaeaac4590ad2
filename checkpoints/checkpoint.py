"""Reading part of a safetensors checkpoint: where each tensor lies, and its bytes without the rest of the
file.

There are three parts. A `Checkpoint` knows from the headers where tensors lie. A `LazyTensor` is a parameter
of the network, made of pieces of files. A `Source` gives the bytes. `wanted_ranges` says which ranges of
which files some lazy tensors need, so that a source can fetch them from the Hub beforehand.

The safetensors format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .distributed_files import DistributedFiles, blocks_of_processes
from .errors import CheckpointError
from .lazy_tensor import LazyTensor
from .local_files import LocalFiles, file_inside
from .safetensors_header import Source, TensorSpan, read_header, read_index

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


class Checkpoint:
    """A safetensors checkpoint of one or more files, of which the headers have been read.

    Args:
        source (`Source`): gives the bytes.
        tensors (`dict[str, TensorSpan]`): where each tensor lies.
        elsewhere (`frozenset[str]`, *optional*): names of further tensors, in files that were not opened.

    Example:

    ```python
    >>> from transformers_emo.checkpoints import Checkpoint
    >>> checkpoint = Checkpoint.from_folder("model_cards/toy-emo")
    >>> checkpoint.tensors["model.layers.0.mlp.gate.weight"].shape
    (32, 128)

    ```
    """

    def __init__(
        self, source: Source, tensors: dict[str, TensorSpan], elsewhere: frozenset[str] = frozenset()
    ):
        self.source = source
        self.tensors = tensors
        self.elsewhere = elsewhere

    @classmethod
    def from_folder(cls, folder: str | os.PathLike, *, variant: str | None = None) -> Checkpoint:
        """Read the headers of a model's folder: one file, shards with an index, or the blocks of processes.

        The last is what `save_pretrained(distributed_checkpoint=True)` writes; see `DistributedFiles`.

        Args:
            folder (`str` or `os.PathLike`): the folder.
            variant (`str`, *optional*): as in `from_pretrained`: `model.<variant>.safetensors`.

        Raises:
            CheckpointError: if there are no safetensors weights, the index is damaged or names a file outside
                the folder, or a file is missing, cut short or damaged.

        Example: see the class.
        """
        folder = Path(folder)
        weights, index_name = weight_files(variant)
        index = file_inside(folder, index_name)
        if (folder / weights).is_file():
            return cls.from_files(folder, [weights])
        if index.is_file():
            weight_map = read_index(index)
            return cls.from_index(weight_map, set(weight_map.values()), LocalFiles(folder))
        if blocks_of_processes(folder):
            blocks = DistributedFiles(folder)
            return cls(blocks, blocks.tensors)
        if not folder.is_dir():
            raise CheckpointError(f"There is no folder '{folder}' (seen from {os.getcwd()}): check the path.")
        pickled = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLE_SUFFIXES)
        if pickled:
            raise CheckpointError(
                f"The weights in {folder} are pickled ({pickled[0]}), which cannot be read in part and can "
                "run code: convert them to safetensors first."
            )
        raise CheckpointError(
            f"There are no safetensors weights in {folder}: expected {weights} or {index.name}. Name a "
            "model's folder."
        )

    @classmethod
    def from_files(
        cls, folder: str | os.PathLike, files: Iterable[str], source: Source | None = None
    ) -> Checkpoint:
        """Read the headers of some files.

        Args:
            folder (`str` or `os.PathLike`): the folder that they are in.
            files (`Iterable[str]`): their names, relative to the folder.
            source (`Source`, *optional*): gives their bytes; by default the files on disk.

        Raises:
            CheckpointError: if one is missing, cut short or damaged, or two hold the same tensor.

        Example:

        ```python
        >>> from transformers_emo.checkpoints import Checkpoint
        >>> len(Checkpoint.from_files("model_cards/toy-emo", ["model.safetensors"]).tensors)
        415

        ```
        """
        source = source or LocalFiles(folder)
        tensors: dict[str, TensorSpan] = {}
        try:
            for file in files:
                for name, span in read_header(source, file).items():
                    if name in tensors:
                        raise CheckpointError(
                            f"{name} is in {tensors[name].file} and again in {file}: expected it once. "
                            "Download the model again."
                        )
                    tensors[name] = span
        except CheckpointError:
            source.close()
            raise
        return cls(source, tensors)

    @classmethod
    def from_index(cls, weight_map: dict[str, str], files: Iterable[str], source: Source) -> Checkpoint:
        """Read the headers of some or all of the files that an index names.

        Args:
            weight_map (`dict[str, str]`): the index: tensor names and the files they are in.
            files (`Iterable[str]`): the files to open. Of the tensors in other files only the names are
                known.
            source (`Source`): gives the bytes of files.

        Raises:
            CheckpointError: if a file is missing, cut short or damaged, or lacks a tensor that the index
                names.

        Example:

        ```python
        >>> from transformers_emo.checkpoints.checkpoint import Checkpoint
        >>> from transformers_emo.checkpoints.local_files import LocalFiles
        >>> files = LocalFiles("model_cards/toy-emo")
        >>> whole = Checkpoint.from_files(files.folder, ["model.safetensors"], files)
        >>> weight_map = {name: span.file for name, span in whole.tensors.items()}
        >>> Checkpoint.from_index(weight_map | {"x": "x.safetensors"}, ["model.safetensors"], files).elsewhere
        frozenset({'x'})

        ```
        """
        wanted = sorted(set(files))
        checkpoint = cls.from_files("", wanted, source)
        elsewhere = set()
        for name, file in weight_map.items():
            if file not in wanted:
                elsewhere.add(name)
            elif name not in checkpoint.tensors or checkpoint.tensors[name].file != file:
                source.close()
                raise CheckpointError(
                    f"The index says that {name} is in {file}, but it is not: download the files again."
                )
        return cls(source, checkpoint.tensors, frozenset(elsewhere))

    def lazy(self, names: Sequence[str], *, shape: Sequence[int] | None = None) -> LazyTensor:
        """Some tensors, one after the other, as one lazy tensor.

        Args:
            names (`Sequence[str]`): the names of tensors of one dtype.
            shape (`Sequence[int]`, *optional*): the shape of the whole. It is needed for more than one
                tensor.

        Raises:
            CheckpointError: if a tensor is missing, the dtypes differ or the shape does not fit.

        Example: see `LazyTensor`.
        """
        missing = [name for name in names if name not in self.tensors]
        if missing:
            raise CheckpointError(
                f"The checkpoint lacks {len(missing)} tensors that the model needs, such as {missing[0]}: "
                "download it again, with the config.json that belongs to it."
            )
        pieces = [self.tensors[name] for name in names]
        return self.from_pieces(pieces, shape or pieces[0].shape)

    def from_pieces(self, pieces: Sequence[TensorSpan], shape: Sequence[int]) -> LazyTensor:
        """A lazy tensor made of parts of the checkpoint's tensors.

        Args:
            pieces (`Sequence[TensorSpan]`): the parts, of one dtype.
            shape (`Sequence[int]`): the shape of the whole.

        Raises:
            CheckpointError: if the dtypes differ or the parts do not add up to the shape.

        Example:

        ```python
        >>> from transformers_emo.checkpoints import Checkpoint
        >>> checkpoint = Checkpoint.from_folder("model_cards/toy-emo")
        >>> norm = checkpoint.tensors["model.norm.weight"]
        >>> checkpoint.from_pieces([norm, norm], (2, 128))[...].shape
        torch.Size([2, 128])

        ```
        """
        dtypes = {piece.dtype for piece in pieces}
        size = sum(piece.end - piece.start for piece in pieces)
        if len(dtypes) != 1 or size != math.prod(shape) * pieces[0].dtype.itemsize:
            raise CheckpointError(
                f"Tensors of {size} bytes and dtypes {sorted(map(str, dtypes))} do not make up one of shape "
                f"{tuple(shape)}: config.json and the weights are of different models. Download both again."
            )
        return LazyTensor(self.source, pieces, pieces[0].dtype, shape)


def weight_files(variant: str | None = None) -> tuple[str, str]:
    """The names that a model's files of weights have: of a single file, and of the index of several.

    Args:
        variant (`str`, *optional*): as in `from_pretrained`.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.checkpoint import weight_files
    >>> weight_files("fp16")
    ('model.fp16.safetensors', 'model.safetensors.index.fp16.json')

    ```
    """
    infix = "" if variant is None else f".{variant}"
    single = SAFE_WEIGHTS_NAME.replace(".safetensors", f"{infix}.safetensors")
    return single, SAFE_WEIGHTS_INDEX_NAME.replace(".index", f".index{infix}")


def rows_of(span: TensorSpan, rows: Sequence[int]) -> list[TensorSpan]:
    """Some rows of a tensor's first dimension as parts of it. Rows that follow each other are one part.

    Args:
        span (`TensorSpan`): the tensor.
        rows (`Sequence[int]`): ascending row numbers.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.checkpoints.checkpoint import TensorSpan, rows_of
    >>> span = TensorSpan("model.safetensors", 100, 140, torch.float32, (5, 2))
    >>> [(part.start, part.end) for part in rows_of(span, [0, 1, 3])]
    [(100, 116), (124, 132)]

    ```
    """
    row_bytes = (span.end - span.start) // max(span.shape[0], 1)
    parts: list[TensorSpan] = []
    for row in rows:
        start = span.start + row * row_bytes
        if parts and parts[-1].end == start:
            start = parts.pop().start
        end = span.start + (row + 1) * row_bytes
        parts.append(
            TensorSpan(span.file, start, end, span.dtype, ((end - start) // row_bytes, *span.shape[1:]))
        )
    return parts
