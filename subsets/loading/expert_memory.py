"""`from_pretrained(..., expert_memory="6GB")`: a full model whose experts are read when a token takes them.

What the network needs at once is told from its experts here. The memory itself is in `subsets/paging`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...checkpoints.checkpoint import Checkpoint, rows_of, weight_files
from ...checkpoints.hub.repository import HubFiles
from ...checkpoints.lazy_tensor import LazyTensor
from ...checkpoints.safetensors_header import read_index
from ...checkpoints.source_files import SourceFiles
from ...checkpoints.writing.safetensors_writing import size_in_bytes
from ...configuration import EmoConfig
from ...modeling_emo.weight_names import ROUTER, STACKED_EXPERTS
from ..paging.expert_memory import ExpertMemory
from ..paging.expert_rows import ExpertRows
from .model_source import ModelSource
from .wanted_tensors import lazy_parameters
from .weight_loading import LazyStateDict

_PARTS = ("gate", "up", "down")


def check_memory_arguments(kwargs: Mapping[str, Any], *, check_weights: bool = False) -> None:
    """Check that `from_pretrained` is asked for nothing that does not go with `expert_memory`.

    Args:
        kwargs (`Mapping[str, Any]`): its keyword arguments.
        check_weights (`bool`, defaults to `False`): as there.

    Raises:
        ValueError: if it is.

    Example:

    ```python
    >>> from transformers_emo.subsets.loading.expert_memory import check_memory_arguments
    >>> try:
    ...     check_memory_arguments({"tp_plan": "auto"})
    ... except ValueError as error:
    ...     print(str(error)[:44])
    `expert_memory` cannot go with `tp_plan`: it

    ```
    """
    reasons = {
        "ignore_mismatched_sizes": "all experts have to have one size",
        "tp_plan": "it is for one process",
        "distributed_config": "it is for one process",
        "device_mesh": "it is for one process",
    }
    given = {name: reason for name, reason in reasons.items() if kwargs.get(name)}
    if check_weights:
        given["check_weights"] = "it does not read all experts"
    for name, reason in given.items():
        raise ValueError(f"`expert_memory` cannot go with `{name}`: {reason}. Leave out one of the two.")


def refuse_packing(source: ModelSource, asked: Any) -> None:
    """Refuse to quantise experts while they are read.

    Args:
        source (`ModelSource`): where the model is.
        asked (`PackedConfig` or other): the argument `quantization_config`.

    Raises:
        ValueError: if the model is not packed already.

    Example: see `ExpertMemory`.
    """
    if source.packing is None:
        raise ValueError(
            f"{os.fspath(source.path)} is not quantised, and with `expert_memory` a `quantization_config` "
            f"({type(asked).__name__}) cannot make it so: experts are read as they are in the files. Load it "
            "once with `quantization_config=PackedConfig(...)` and without `expert_memory`, save it, and "
            "load what was saved with `expert_memory`."
        )


def paged_parameters(
    source: ModelSource,
    kept: list[list[int] | None],
    config: EmoConfig,
    budget: int | str,
    files: SourceFiles,
) -> tuple[ExpertMemory, LazyStateDict]:
    """The parameters of a network without its experts, and the memory for those.

    Args:
        source (`ModelSource`): where the model is.
        kept (`list[list[int] | None]`): for each layer the experts to use, in the numbering of the source.
        config (`EmoConfig`): the config of the model with these experts.
        budget (`int` or `str`): bytes for experts.
        files (`SourceFiles`): the state of the files, noted before the source was opened.

    Returns:
        `tuple`: the memory, and the parameters, which put it into the network when they are loaded.

    Raises:
        ValueError: if the model has no expert layer, or the budget is no size.
        CheckpointError: if the weights and the config differ.

    Example: see `ExpertMemory`.
    """
    budget = size_in_bytes(budget, name="expert_memory")
    # Of a repository, files that hold experts alone are left where they are.
    needed = [
        None if ids is None else sorted(ids[e] for e in layer.always_used) or ids[:1]
        for ids, layer in zip(kept, config.layer_experts, strict=True)
    ]
    checkpoint = source.checkpoint(needed)
    all_here = not checkpoint.elsewhere
    if source.packing is not None and not all_here:
        raise ValueError(
            f"{os.fspath(source.path)} has packed experts in files of their own on the Hub, which "
            "`expert_memory` reads from a folder only: download it (`hf download`), and give the folder."
        )
    tensors = LazyStateDict(lazy_parameters(checkpoint, source.config, kept if all_here else needed))
    rows: dict[int, ExpertRows] = {}
    stacks: dict[int, dict[str, LazyTensor]] = {}
    for name in list(tensors):
        if match := STACKED_EXPERTS.fullmatch(name):
            stacks.setdefault(int(match["layer"]), {})[name.rpartition(".")[2]] = tensors.pop(name)
            if not all_here:
                index = int(match["layer"])
                shard = _ExpertFiles(source, checkpoint, match["experts"], kept[index] or [])
                rows[index] = ExpertRows(stacks[index], shard.open)
        elif not all_here and (match := ROUTER.fullmatch(name)):
            ids = kept[int(match["layer"])] or []
            pieces = rows_of(checkpoint.tensors[name], ids)
            tensors[name] = checkpoint.from_pieces(pieces, (len(ids), *tensors[name].shape[1:]))
    if not stacks:
        raise ValueError(
            f"{os.fspath(source.path)} has no experts that `expert_memory` could be for: leave it out."
        )
    rows = {index: rows.get(index) or ExpertRows(stacks[index]) for index in sorted(stacks)}
    memory = ExpertMemory(budget, config, rows, label=os.fspath(source.path), files=files)

    def prepare(model: Any, load_config: Any) -> None:
        devices = {str(device) for device in (load_config.device_map or {"": "cpu"}).values()}
        if len(devices) > 1 or devices & {"disk", "meta"}:
            raise ValueError(
                f"`expert_memory` has its slots on one device, and the device map has {sorted(devices)}: "
                "give one device, such as `device_map='cuda'`, or leave it out."
            )
        device = torch.device(int(found) if (found := devices.pop()).isdecimal() else found)
        memory.install(model, device)

    tensors.prepare = prepare
    tensors.label = os.fspath(source.path)
    return memory, tensors


class _ExpertFiles:
    """Experts of one layer in files of a repository that are opened when an expert is wanted."""

    def __init__(self, source: ModelSource, checkpoint: Checkpoint, experts: str, ids: Sequence[int]):
        self.files = checkpoint.source
        self.variant = source.variant
        self.checkpoint, self.experts, self.ids = checkpoint, experts, list(ids)
        self.weight_map: dict[str, str] | None = None

    def open(self, rows: Sequence[int]) -> dict[int, dict[str, LazyTensor]]:
        """The parameters of some experts; their files are downloaded, if all that they hold is theirs."""
        assert isinstance(self.files, HubFiles)
        names = {row: [f"{self.experts}.{self.ids[row]}.{p}_proj.weight" for p in _PARTS] for row in rows}
        lacking = {n for three in names.values() for n in three} - self.checkpoint.tensors.keys()
        if lacking and self.weight_map is None:
            index = self.files.find(weight_files(self.variant)[1])
            self.weight_map = {} if index is None else read_index(index)
        shards = sorted({(self.weight_map or {})[name] for name in lacking})
        self.files.download(shards)
        tensors = dict(self.checkpoint.tensors)
        if shards:
            tensors |= Checkpoint.from_files("", shards, self.files).tensors
        found = Checkpoint(self.files, tensors)
        opened = {}
        for row, (gate, up, down) in names.items():
            width, hidden = tensors[gate].shape
            opened[row] = {
                "gate_up_proj": found.lazy([gate, up], shape=(1, 2 * width, hidden)),
                "down_proj": found.lazy([down], shape=(1, hidden, width)),
            }
        return opened
