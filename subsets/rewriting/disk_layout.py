"""The tensors of a network as they will be on disk: which there are, their dtypes and their shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...checkpoints.writing.safetensors_writing import Layout
from ...quantization.packed_config import PackedConfig
from ...quantization.packed_files import QuantisedWhileRead


def to_be_quantised(
    parameters: dict[str, Any], packing: PackedConfig, dtype: torch.dtype | None
) -> dict[str, Any]:
    """The parameters of a network, of which those that a packing takes are quantised while they are read.

    Args:
        parameters (`dict[str, LazyTensor]`): from `lazy_parameters`.
        packing (`PackedConfig`): how they are packed.
        dtype (`torch.dtype`, *optional*): the dtype of their scales; that on disk by default.

    Raises:
        ValueError: if the group size does not divide a weight's inputs.

    Example: see `extract_subset`.
    """
    packed = {
        name: QuantisedWhileRead(tensor, packing, name)
        for name, tensor in parameters.items()
        if packing.converts(name)
    }
    for tensor in packed.values():
        tensor.cast_to = dtype
        packing.group_of(tensor.shape[-1])
    return parameters | packed


def on_disk(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors, packed ones in the parts that they are on disk.

    Args:
        tensors (`Mapping[str, LazyTensor]`): from `released_tensors`.

    Example: see `extract_subset`.
    """
    parts: dict[str, Any] = {}
    for name, tensor in tensors.items():
        parts |= dict(tensor.on_disk(name)) if hasattr(tensor, "on_disk") else {name: tensor}
    return parts


def layouts_of(tensors: Mapping[str, Any]) -> dict[str, Layout]:
    """Dtypes and shapes as they are written.

    Args:
        tensors (`Mapping[str, LazyTensor]`): from `on_disk`.

    Example: see `extract_subset`.
    """
    return {name: (tensor.cast_to or tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
