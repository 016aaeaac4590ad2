"""Taking a subset out of a checkpoint as a model of its own, without building either: bytes are copied."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ...checkpoints.lazy_tensor import LazyTensor
from ...checkpoints.side_files import GENERATION_CONFIG, TOKENIZER_FILES, copy_side_files, side_files
from ...checkpoints.source_files import SourceFiles
from ...checkpoints.writing.output_folder import check_new, check_space, new_folder
from ...checkpoints.writing.safetensors_writing import (
    divide,
    floating_dtype,
    header_of,
    length_of,
    size_in_bytes,
    write_index,
)
from ...configuration import EmoConfig
from ...quantization.packed_config import PackedConfig
from ...quantization.packed_files import QuantisedPart
from ..expert_subset import ExpertSubset
from ..loading.model_source import ModelSource
from ..loading.weights_check import check_whole
from .disk_layout import layouts_of, on_disk, to_be_quantised
from .expert_tensors import released_tensors

_BUFFER_BYTES = 1 << 24  # whole numbers of every dtype


def extract_subset(
    model: str | os.PathLike,
    subset: Any,
    out: str | os.PathLike,
    *,
    max_shard_size: int | str = "5GB",
    dtype: str | torch.dtype | None = None,
    quantization_config: PackedConfig | None = None,
    progress: bool = True,
    **hub_kwargs: Any,
) -> EmoConfig:
    """Write a subset of a model as a stand-alone model.

    The result is bit for bit what `from_pretrained(model, expert_subset=subset, dtype=dtype)` and then
    `save_pretrained(out)` write. But no model is built: the bytes of the kept experts and of their router
    rows are copied from file to file, with a few MB of memory. The tokenizer and the generation config are
    copied too. The folder gets its name when it is complete.

    Args:
        model (`str` or `os.PathLike`): folder or Hub repository; full, or a subset itself.
        subset: anything that `ExpertSubset.of` takes, such as the name of one in the model's `subsets/`.
        out (`str` or `os.PathLike`): the folder to make; it must not exist.
        max_shard_size (`int` or `str`, defaults to `"5GB"`): bytes of one file at most, if tensors allow.
        dtype (`str` or `torch.dtype`, *optional*): convert the weights to it, such as `"bfloat16"`; by
            default every tensor keeps its own.
        quantization_config (`PackedConfig`, *optional*): quantise the weights, as `from_pretrained` does.
            A model that is in few bits already stays so without.
        progress (`bool`, defaults to `True`): show a progress bar.
        hub_kwargs: `revision`, `token`, `cache_dir` and so on, as for `from_pretrained`.

    Returns:
        `EmoConfig`: the config of the model written.

    Raises:
        SubsetError: if the subset does not fit the model.
        CheckpointError: if the checkpoint is damaged, incomplete, no safetensors, or quantised in a way that
            is not read.
        ValueError: if `quantization_config` does not fit the model, `dtype` is not a floating-point dtype,
            or `max_shard_size` is not a size.
        FileExistsError: if `out` exists.
        OSError: if the disk has no room for it.
        SourceChangedError: if the folder of the model changed meanwhile. Nothing is written then.

    Example:

    ```python
    >>> from transformers_emo import EmoForCausalLM, extract_subset
    >>> config = extract_subset("model_cards/toy-emo", [[0, 1, 31]] * 4, tmp_path / "small", progress=False)
    >>> EmoForCausalLM.from_pretrained(tmp_path / "small").config.retained_experts[0]
    [0, 1, 31]

    ```
    """
    out = Path(out)
    check_new(out)
    shard_bytes = size_in_bytes(max_shard_size)
    cast_to = None if dtype is None else floating_dtype(dtype)
    before = SourceFiles.of(model, subfolder=hub_kwargs.get("subfolder"))
    with ModelSource.open(model, **hub_kwargs) as source:
        kept = source.keep(ExpertSubset.of(subset, *source.library))
        parameters: dict[str, Any] = source.parameters(kept.local)
        small, before_packing = source.config_of(kept), parameters
        check_whole(parameters, small, os.fspath(model))
        packing = source.packing
        if packing is None and quantization_config is not None:
            packing = quantization_config.for_model(small)
            parameters = to_be_quantised(parameters, packing, cast_to)
        elif quantization_config not in (None, packing):
            assert packing is not None
            raise ValueError(
                f"{os.fspath(model)} is in {packing.bits} bits already (group_size {packing.group_size}), "
                "and `quantization_config` asks for something else: leave it out, or give the unquantised "
                "model."
            )
        if packing is not None:
            small.quantization_config = packing.to_dict()
        tensors = on_disk(released_tensors(parameters))
        if cast_to is not None:
            small.dtype = cast_to
        elif small.dtype is None:
            small.dtype = next(iter(tensors.values())).dtype
        for tensor in tensors.values():
            if isinstance(tensor, LazyTensor):
                tensor.cast_to = cast_to if tensor.dtype.is_floating_point else None
        check_space(out, sum(map(length_of, layouts_of(tensors).values())))
        companions = side_files(model, (GENERATION_CONFIG, *TOKENIZER_FILES), **source.hub_kwargs)
        source.fetch(tensors.values(), progress=progress)
        source.warn_if_chosen_elsewhere(kept, before_packing)
        with new_folder(out, sources=[before]) as work:
            _write(tensors, work, shard_bytes, progress)
            small.save_pretrained(work)
            copy_side_files(model, companions, work, **source.hub_kwargs)
    return small


def _write(tensors: Mapping[str, Any], folder: Path, shard_bytes: int, progress: bool) -> None:
    layouts = layouts_of(tensors)
    shards = divide(((name, length_of(layout)) for name, layout in layouts.items()), shard_bytes)
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    total = sum(length_of((tensor.dtype, tensor.shape)) for tensor in tensors.values())
    with tqdm(
        total=total, desc="Extracting", unit="B", unit_scale=True, disable=not progress, delay=1
    ) as bar:
        for file, names in shards.items():
            with open(folder / file, "xb", buffering=0) as to:
                _write_all(to, memoryview(header_of({name: layouts[name] for name in names})))
                for name in names:
                    if isinstance(tensors[name], QuantisedPart):
                        _write_all(to, _bytes_of(tensors[name].read()))
                        bar.update(length_of(layouts[name]))
                        continue
                    for piece in tensors[name].pieces:
                        for start in range(piece.start, piece.end, _BUFFER_BYTES):
                            part = buffer[: min(_BUFFER_BYTES, piece.end - start)]
                            tensors[name].source.read_into(piece.file, start, part)
                            _write_all(to, _converted(part, tensors[name]))
                            bar.update(len(part))
    write_index(folder, shards, layouts)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def _converted(part: memoryview, tensor: LazyTensor) -> memoryview:
    """Some of the bytes of a tensor, whole numbers of it, in the dtype they are written in."""
    if tensor.cast_to in (None, tensor.dtype):
        return part
    numbers = torch.frombuffer(part, dtype=tensor.dtype).to(tensor.cast_to)
    return memoryview(numbers.view(torch.uint8).numpy().data)


def _write_all(to, data: memoryview) -> None:
    """An unbuffered file may take less than it is given."""
    while data:
        data = data[to.write(data) :]
