"""The sizes of a model and of its subsets, in every number of bits, from the headers of its files alone."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.hub.names import is_hub_repo, pinned
from ..checkpoints.hub.opening import open_headers
from ..checkpoints.hub.repository import HubFiles
from ..checkpoints.local_files import check_json_inside
from ..checkpoints.writing.safetensors_writing import length_of, size_in_bytes, written_bytes
from ..configuration import EmoConfig
from ..modeling_emo.weight_names import STACKED_EXPERTS
from ..quantization.packed_config import PackedConfig, packing_of
from ..quantization.packed_files import LazyPacked, PackedCheckpoint, QuantisedWhileRead
from ..subsets.expert_subset import ExpertSubset
from ..subsets.loading.wanted_tensors import lazy_parameters
from ..subsets.loading.weights_check import check_sizes, check_whole
from ..subsets.numbering import present_experts
from ..subsets.reduced_config import local_experts, subset_config
from ..subsets.rewriting.disk_layout import layouts_of, on_disk, to_be_quantised
from ..subsets.rewriting.expert_tensors import released_tensors

_SHARD = size_in_bytes("5GB")  # as `extract_subset` and `emo extract` write by default


@dataclass(frozen=True)
class Size:
    """What a model, or a subset of its experts, takes.

    Args:
        experts (`list[int]`): how many experts each layer keeps, 0 in a dense layer.
        bits (`int`): of a packed weight: 8 or 4; otherwise those of the model's dtype.
        parameters (`int`): numbers in the weights.
        read_bytes (`int`): bytes of weights that are read or fetched to load it, headers left out.
        file_bytes (`int`): the files of weights that `extract_subset` writes, to the byte. `save_pretrained`
            writes the same tensors in another order, and headers that differ by less than a thousandth.
        memory_bytes (`int`): the parameters in memory.

    Example: see `ModelSizes`.
    """

    experts: list[int]
    bits: int
    parameters: int
    read_bytes: int
    file_bytes: int
    memory_bytes: int


class ModelSizes:
    """The sizes of a model, known from its config and from the headers of its files.

    Args:
        config (`EmoConfig`): the model's config.
        checkpoint (`Checkpoint`): its weights, as their headers say.
        label (`str`, *optional*): what the model is called in messages.

    Raises:
        CheckpointError: if config and weights differ, or the weights are quantised in a way that is not read.

    Example:

    ```python
    >>> from transformers_emo.planning import ModelSizes
    >>> sizes = ModelSizes.open("model_cards/emo-tiny")
    >>> sizes.of(16).parameters, sizes.of(16, bits=4).file_bytes
    (2892928, 2805304)

    ```
    """

    def __init__(self, config: EmoConfig, checkpoint: Checkpoint, label: str = "The model"):
        self.config = config
        self.label = label
        self.packing = packing_of(config, label)
        if self.packing is not None and not isinstance(checkpoint, PackedCheckpoint):
            checkpoint = PackedCheckpoint(checkpoint, self.packing)
        self.checkpoint = checkpoint
        check_sizes(checkpoint.tensors, config)

    @classmethod
    def open(cls, model: str | os.PathLike, **hub_kwargs: Any) -> Self:
        """The sizes of a folder or a repository. Of a repository only headers are fetched.

        Args:
            model (`str` or `os.PathLike`): the folder or Hub repository, in any layout that is loaded.
            hub_kwargs: `revision`, `token`, `cache_dir` and so on, as for `from_pretrained`.

        Raises:
            OSError: if there is neither such a folder nor such a repository.
            CheckpointError: if the weights are damaged, or quantised in a way that is not read.
        """
        hub_kwargs = pinned(model, hub_kwargs)
        config = EmoConfig.from_pretrained(model, **hub_kwargs)
        if is_hub_repo(model):
            checkpoint = open_headers(HubFiles(os.fspath(model), hub_kwargs))
        else:
            folder = Path(model, hub_kwargs.get("subfolder") or "")
            check_json_inside(folder, "config.json")
            checkpoint = Checkpoint.from_folder(folder)
        try:
            return cls(config, checkpoint, os.fspath(model))
        finally:
            checkpoint.source.close()  # headers are all that is read

    @cached_property
    def dtype(self) -> torch.dtype:
        """`torch.dtype`: what `from_pretrained` loads the model in."""
        if isinstance(self.config.dtype, torch.dtype):
            return self.config.dtype
        dtypes = (span.dtype for span in self.checkpoint.tensors.values())
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)

    @property
    def bits(self) -> list[int]:
        """`list[int]`: in how many bits the model can be had: its own, and 8 and 4 if it is not packed."""
        own = self.dtype.itemsize * 8
        return [self.packing.bits] if self.packing is not None else [own, 8, 4]

    def of(self, experts: int | ExpertSubset | None = None, bits: int | None = None) -> Size:
        """What a part of the model takes.

        Args:
            experts (`int` or `ExpertSubset`, *optional*): how many experts a layer, or which; all by default.
            bits (`int`, *optional*): 8 or 4 to quantise it as `PackedConfig` does; by default it stays as it
                is.

        Raises:
            ValueError: if there is no such size: too few experts, bits that the model cannot have.
            SubsetError: if the subset does not fit the model.
        """
        config, kept = self.config, None
        if experts is not None:
            subset = subset_of(config, experts) if isinstance(experts, int) else experts.for_model(config)
            config, kept = subset_config(config, subset), local_experts(subset, config)
        parameters: dict[str, Any] = lazy_parameters(self.checkpoint, self.config, kept, sizes_checked=True)
        check_whole(parameters, config, self.label)
        packing = self._packing(config, bits)
        read = sum(piece.end - piece.start for tensor in parameters.values() for piece in tensor.pieces)
        if packing is not None and self.packing is None:
            parameters = to_be_quantised(parameters, packing, None)
        files = written_bytes(layouts_of(on_disk(released_tensors(parameters))), _SHARD)
        return Size(
            experts=[layer.num_experts for layer in config.layer_experts],
            bits=self.dtype.itemsize * 8 if packing is None else packing.bits,
            parameters=sum(math.prod(tensor.shape) for tensor in parameters.values()),
            read_bytes=read,
            file_bytes=files,
            memory_bytes=sum(self._memory(tensor) for tensor in parameters.values()),
        )

    def _packing(self, config: EmoConfig, bits: int | None) -> PackedConfig | None:
        if bits in (None, self.bits[0]):
            return self.packing
        if bits not in self.bits:
            raise ValueError(
                f"{self.label} cannot be had in {bits!r} bits: expected one of {self.bits}. A model that is "
                "packed already stays as it is."
            )
        assert bits is not None
        return PackedConfig(bits).for_model(config)

    def _memory(self, tensor: Any) -> int:
        if not isinstance(tensor, LazyPacked | QuantisedWhileRead):
            dtype = self.dtype if tensor.dtype.is_floating_point else tensor.dtype
            return length_of((dtype, tuple(tensor.shape)))
        packing, numbers = tensor.packing, math.prod(tensor.shape)
        groups = numbers // packing.group_of(tensor.shape[-1])
        zeros = 0 if packing.symmetric else groups  # in memory each is a byte
        return numbers * packing.bits // 8 + groups * self.dtype.itemsize + zeros

    # What the parts of a model take.

    @cached_property
    def expert_bytes(self) -> int:
        """`int`: memory of one routed expert in the model's dtype; 0 if all layers are dense."""
        if all(layer.is_dense for layer in self.config.layer_experts):
            return 0
        return 3 * self.config.intermediate_size * self.config.hidden_size * self.dtype.itemsize

    @cached_property
    def backbone_bytes(self) -> int:
        """`int`: memory of everything but experts."""
        parameters = lazy_parameters(self.checkpoint, self.config, None, sizes_checked=True)
        return sum(self._memory(t) for name, t in parameters.items() if not STACKED_EXPERTS.fullmatch(name))

    @cached_property
    def layer_bytes(self) -> int:
        """`int`: memory of the largest layer, with all of its experts."""
        sizes: dict[str, int] = {}
        for name, tensor in lazy_parameters(self.checkpoint, self.config, None, sizes_checked=True).items():
            if "layers." in name:
                layer = name.split("layers.")[1].split(".")[0]
                sizes[layer] = sizes.get(layer, 0) + self._memory(tensor)
        return max(sizes.values(), default=0)

    @property
    def always_used_bytes(self) -> int:
        """`int`: memory of the experts that every token uses, in the model's dtype."""
        return self.expert_bytes * sum(len(layer.always_used) for layer in self.config.layer_experts)

    @property
    def cache_bytes(self) -> int:
        """`int`: memory of the keys and values of one token, in the model's dtype."""
        config = self.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = config.num_key_value_heads or config.num_attention_heads
        return 2 * config.num_hidden_layers * heads * head * self.dtype.itemsize

    def budget(self, num_experts: int) -> int:
        """The `expert_memory` that holds so many routed experts in every layer.

        Args:
            num_experts (`int`): how many, experts that every token uses not counted.
        """
        layers = [layer for layer in self.config.layer_experts if not layer.is_dense]
        return self.expert_bytes * sum(
            min(num_experts, layer.num_experts - len(layer.always_used)) for layer in layers
        )

    @property
    def least_budget(self) -> int:
        """`int`: the least `expert_memory` that `from_pretrained` takes."""
        layers = [layer for layer in self.config.layer_experts if not layer.is_dense]
        return self.expert_bytes * max((layer.top_k - len(layer.always_used) for layer in layers), default=0)


def subset_of(config: EmoConfig, num_experts: int) -> ExpertSubset:
    """Some subset of so many experts a layer, to know its size: which experts it has makes no difference.

    Args:
        config (`EmoConfig`): the model's config.
        num_experts (`int`): layers with fewer keep all.

    Raises:
        ValueError: if no layer has so many, or one would be left without a routed expert.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.planning.model_sizes import subset_of
    >>> subset_of(EmoConfig(num_hidden_layers=1, num_experts=8, num_experts_per_tok=2), 3).experts
    [[0, 1, 7]]

    ```
    """
    most = max((layer.num_experts for layer in config.layer_experts), default=0)
    if not 1 <= num_experts <= most:
        raise ValueError(f"{num_experts} experts a layer: expected 1 to {most}, as the model has.")
    kept: list[list[int] | None] = []
    layers = zip(config.layer_experts, present_experts(config), strict=True)
    for index, (layer, ids) in enumerate(layers):
        always = layer.always_used
        if not layer.is_dense and num_experts <= len(always):
            raise ValueError(
                f"{num_experts} experts leave layer {index} without a routed one: {len(always)} are always "
                f"kept. Expected at least {len(always) + 1}."
            )
        others = [e for e in range(layer.num_experts) if e not in always]
        local = sorted([*always, *others[: num_experts - len(always)]])
        kept.append(None if layer.is_dense else [ids[e] for e in local])
    return ExpertSubset(kept).for_model(config)


def usual_numbers(config: EmoConfig) -> list[int]:
    """Numbers of experts a layer to show sizes for: all, by halves down to those that a token takes.

    Args:
        config (`EmoConfig`): the model's config.

    Returns:
        `list[int]`: the largest first; one number for a model of dense layers only.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.planning.model_sizes import usual_numbers
    >>> usual_numbers(EmoConfig(num_experts=128, num_experts_per_tok=8))
    [128, 64, 32, 16, 8]

    ```
    """
    layers = [layer for layer in config.layer_experts if not layer.is_dense]
    most = max((layer.num_experts for layer in layers), default=0)
    least = max((max(layer.top_k, len(layer.always_used) + 1) for layer in layers), default=1)
    numbers: list[int] = [most]
    while numbers[-1] // 2 >= least:
        numbers.append(numbers[-1] // 2)
    return numbers


def fitting(numbers: Sequence[int], wanted: int) -> int:
    """The number nearest to the one that is wanted.

    Args:
        numbers (`Sequence[int]`): what there is.
        wanted (`int`): what is wanted.

    Example:

    ```python
    >>> from transformers_emo.planning.model_sizes import fitting
    >>> fitting([128, 64, 32], 16)
    32

    ```
    """
    return min(numbers, key=lambda number: (abs(number - wanted), number))
