"""The tensors of a network with some of its experts, found in a checkpoint."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import Any

from ...checkpoints.checkpoint import Checkpoint, rows_of
from ...checkpoints.errors import CheckpointError
from ...checkpoints.hub.opening import fetch_ahead, open_part
from ...checkpoints.hub.repository import HubFiles
from ...checkpoints.lazy_tensor import LazyTensor
from ...configuration import EmoConfig
from .weights_check import check_sizes

EXPERT_TENSOR = re.compile(
    r"(?P<block>|.*\.)layers\.(?P<layer>\d+)\.mlp\.experts\.(?P<expert>\d+)\.(?P<part>gate|up|down)_proj\.weight"
)


_STACKED_TENSOR = re.compile(r".*\blayers\.(?P<layer>\d+)\.mlp\.(experts\.(gate_up|down)_proj|gate\.weight)")


def fetch_parameters(
    files: HubFiles, config: EmoConfig, kept: list[list[int] | None], *, variant: str | None = None
) -> dict[str, LazyTensor]:
    """The parameters of the network, once the bytes of the kept experts have come from the Hub.

    Args:
        files (`HubFiles`): the repository's.
        config (`EmoConfig`): the config of the checkpoint.
        kept (`list[list[int] | None]`): for each layer the experts to keep, as in `lazy_parameters`.
        variant (`str`, *optional*): as in `from_pretrained`.

    Raises:
        CheckpointError: if the checkpoint is damaged or its bytes cannot be had.

    Example: see `EmoPreTrainedModel.from_pretrained`.
    """
    checkpoint = open_part(files, partial(_is_kept, kept), variant=variant)
    tensors = lazy_parameters(checkpoint, config, kept)
    fetch_ahead(files, tensors.values(), progress=True)
    return tensors


def _is_kept(kept: list[list[int] | None], name: str) -> bool:
    """Whether a tensor is of a kept expert, or of none."""
    match = EXPERT_TENSOR.fullmatch(name)
    if match is None or int(match["layer"]) >= len(kept):
        return True
    return int(match["expert"]) in (kept[int(match["layer"])] or ())


def open_checkpoint(
    path: str | os.PathLike, *, kept: list[list[int] | None] | None = None, **hub_kwargs: Any
) -> Checkpoint:
    """The checkpoint of a folder or a Hub repository, known by its headers.

    Args:
        path (`str` or `os.PathLike`): the folder or repository.
        kept (`list[list[int] | None]`, *optional*): for each layer the experts that will be read, as in
            `lazy_parameters`. Files of a repository that hold nothing else are downloaded; without it none
            are, unless there are very many (expert shards).
        hub_kwargs: `revision`, `token`, `cache_dir` and so on, as for `from_pretrained`.

    Raises:
        CheckpointError: if there are no safetensors weights, or they are damaged.

    Example:

    ```python
    >>> from transformers_emo.subsets.loading.wanted_tensors import open_checkpoint
    >>> len(open_checkpoint("model_cards/toy-emo").tensors)
    415

    ```
    """
    if os.path.isdir(path):
        return Checkpoint.from_folder(Path(path, hub_kwargs.get("subfolder") or ""))
    wants = None if kept is None else partial(_is_kept, kept)
    return open_part(HubFiles(os.fspath(path), hub_kwargs), wants)


def lazy_parameters(
    checkpoint: Checkpoint, config: EmoConfig, kept: list[list[int] | None] | None
) -> dict[str, LazyTensor]:
    """The parameters of the network, each made of the bytes of the kept experts.

    Args:
        checkpoint (`Checkpoint`): the weights, with a tensor for each expert or already stacked.
        config (`EmoConfig`): the config of the checkpoint.
        kept (`list[list[int] | None]`, *optional*): for each layer the experts to keep, in the checkpoint's
            own numbering, `None` for a dense layer; all of them by default.

    Returns:
        `dict[str, LazyTensor]`: under the network's parameter names, with the checkpoint's prefix: expert
        matrices stacked into `mlp.experts.gate_up_proj` (K, 2F, D) and `mlp.experts.down_proj` (K, D, F),
        router rows cut to the K kept.

    Raises:
        CheckpointError: if an expert or a router that should be there is missing or has another shape.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.checkpoints import Checkpoint
    >>> from transformers_emo.subsets.loading.wanted_tensors import lazy_parameters
    >>> config = EmoConfig.from_pretrained("model_cards/toy-emo")
    >>> tensors = lazy_parameters(Checkpoint.from_folder("model_cards/toy-emo"), config, [[0, 5, 31]] * 4)
    >>> tensors["model.layers.0.mlp.gate.weight"].shape
    (3, 128)

    ```
    """
    check_sizes(checkpoint.tensors, config)
    if kept is None:
        kept = [list(range(layer.num_experts)) for layer in config.layer_experts]
    kept_ids = [ids or [] for ids in kept]
    width, hidden = config.intermediate_size, config.hidden_size
    separate: dict[int, set[int]] = {}  # of layers with a tensor for each expert: the experts there are
    block = ""  # what stands before `layers.` in the checkpoint's names
    lazies: dict[str, LazyTensor] = {}
    for name, span in checkpoint.tensors.items():
        if match := EXPERT_TENSOR.fullmatch(name):
            separate.setdefault(int(match["layer"]), set()).add(int(match["expert"]))
            block = match["block"]
            expected = (hidden, width) if match["part"] == "down" else (width, hidden)
            if span.shape != expected:
                raise CheckpointError(
                    f"{name} has shape {span.shape}, expected {expected}: config.json and the weights differ."
                )
        elif match := _STACKED_TENSOR.fullmatch(name):
            layer = int(match["layer"])
            _check_size(config, layer, span.shape[0] if span.shape else 0)
            ids = kept_ids[layer]
            lazies[name] = checkpoint.from_pieces(rows_of(span, ids), (len(ids), *span.shape[1:]))
        else:
            lazies[name] = checkpoint.lazy([name])
    for name in checkpoint.elsewhere:
        if match := EXPERT_TENSOR.fullmatch(name):
            separate.setdefault(int(match["layer"]), set()).add(int(match["expert"]))
    for layer, present in separate.items():
        _check_size(config, layer, len(present))
        experts, ids = f"{block}layers.{layer}.mlp.experts", kept_ids[layer]
        pairs = [f"{experts}.{e}.{half}_proj.weight" for e in ids for half in ("gate", "up")]
        downs = [f"{experts}.{e}.down_proj.weight" for e in ids]
        lazies[f"{experts}.gate_up_proj"] = checkpoint.lazy(pairs, shape=(len(ids), 2 * width, hidden))
        lazies[f"{experts}.down_proj"] = checkpoint.lazy(downs, shape=(len(ids), hidden, width))
    _check_complete(lazies, config)
    return lazies


def _check_size(config: EmoConfig, layer: int, present: int) -> None:
    """See that there is such a layer and that it has as many experts as the config says."""
    expected = config.layer_experts[layer].num_experts if layer < config.num_hidden_layers else 0
    if present != expected or expected == 0:
        raise CheckpointError(
            f"The checkpoint has {present} experts in layer {layer}, expected {expected}: config.json and "
            "the weights differ."
        )


def _check_complete(lazies: dict[str, LazyTensor], config: EmoConfig) -> None:
    """See that every expert layer has its three parameters."""
    names = {name[name.index("layers.") :] for name in lazies if "layers." in name}
    for index, layer in enumerate(config.layer_experts):
        for parameter in (
            () if layer.is_dense else ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
        ):
            if f"layers.{index}.mlp.{parameter}" not in names:
                raise CheckpointError(
                    f"The checkpoint lacks layers.{index}.mlp.{parameter}: config.json and the weights "
                    "differ."
                )
