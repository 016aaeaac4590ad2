"""Exchange the experts of a model in memory, or give its backbone a second set of experts.

Both find out, layer by layer, which experts the model holds and which must be read. They read those, and only
then change a model. `model_source.py` opens the place that they are read from.

Shape suffixes: K experts held in a layer.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ...checkpoints.errors import CheckpointError
from ...configuration import EmoConfig, LayerExperts
from ...modeling_emo.expert_switching import masked_by_anyone
from ...modeling_emo.weight_names import EXPERT_PARAMETERS
from ...quantization.packed_config import PackedConfig, packing_of
from ...quantization.packed_files import QuantisedWhileRead
from ...quantization.packed_parts import of_parts, parts_of
from ..expert_subset import ExpertSubset
from ..fingerprint import differing_signs, fingerprint_of
from ..numbering import present_experts, root_experts
from ..reduced_config import EXPERT_SETTINGS
from ..validation import SubsetError
from .model_source import KeptExperts, ModelSource, check_hub_kwargs
from .tokenizer_copy import Origin, SubsetName, name_part
from .weights_check import check_finite

# What two models must share so that the experts of one fit the other.
_SHAPE_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "hidden_act",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


@dataclass
class _Layer:
    """The experts that a layer will hold: where each is now, and what has been read."""

    index: int
    experts: LayerExperts
    held: list[tuple[int, int]]  # (row it will have, row it has)
    new_rows: list[int]  # rows that are read, in the order of `read`
    read: dict[str, torch.Tensor]  # by parameter, (len(new_rows), ...)

    def assemble(self, name: str, old: torch.Tensor) -> torch.Tensor:
        """The layer's parameter `name` as a new tensor (K, ...), from the old one and what was read."""
        read = parts_of(self.read[name]) if self.new_rows else {}
        parts = {part: self._assembled(each, read.get(part)) for part, each in parts_of(old).items()}
        return of_parts(parts, old)

    def write_into(self, name: str, old: torch.Tensor) -> None:
        """The same in place, for as many experts as there were."""
        read = parts_of(self.read[name]) if self.new_rows else {}
        for part, each in parts_of(old).items():
            self._write(each, read.get(part))

    def _assembled(self, old: torch.Tensor, read: torch.Tensor | None) -> torch.Tensor:
        new = old.new_empty(self.experts.num_experts, *old.shape[1:])
        for row, old_row in self.held:
            new[row].copy_(old[old_row])
        if read is not None:
            new[torch.tensor(self.new_rows, device=new.device)] = read
        return new

    def _write(self, old: torch.Tensor, read: torch.Tensor | None) -> None:
        # Both orders are sorted by root id. So no expert lands on one that has yet to move, if those that
        # move up go first, from the first on, and then those that move down, from the last on.
        for row, old_row in [pair for pair in self.held if pair[0] < pair[1]]:
            old[row].copy_(old[old_row])
        for row, old_row in reversed([pair for pair in self.held if pair[0] > pair[1]]):
            old[row].copy_(old[old_row])
        if read is not None:
            old[torch.tensor(self.new_rows, device=old.device)] = read


@torch.no_grad()
def swap_experts(
    model: Any,
    expert_subset: Any,
    exclude_experts: Any,
    source: str | os.PathLike | None,
    progress: bool,
    check_weights: bool,
    hub_kwargs: dict[str, Any],
) -> None:
    """`model.swap_experts(...)`; see `ExpertSwitching.swap_experts`.

    Args:
        model (`EmoPreTrainedModel`): the model.
        expert_subset, exclude_experts, source, progress, check_weights, hub_kwargs: as there.

    Example: see `ExpertSwitching.swap_experts`.
    """
    if masked_by_anyone(model.base_model):
        raise ValueError(
            "The experts are masked by an open `use_experts`, of this caller or another: leave it, then swap."
        )
    config, layers, place = _prepare(
        model, expert_subset, exclude_experts, source, progress, check_weights, hub_kwargs, "swap_experts"
    )
    # Nothing of the model changes before this line, and what follows allocates nothing.
    replaced = {
        (layer.index, name): layer.assemble(name, parameter)
        for layer in layers
        for name, parameter in _parameters_of(model, layer.index).items()
        if len(parameter) != layer.experts.num_experts
    }
    for layer in layers:
        for name, parameter in _parameters_of(model, layer.index).items():
            if (layer.index, name) in replaced:
                _set_parameter(model, layer.index, name, replaced.pop((layer.index, name)))
            else:
                layer.write_into(name, parameter)
                parameter.grad = None
    model._part_of = Origin.of_loaded(model, hub_kwargs)
    _set_config(model, config, layers, place)


@torch.no_grad()
def share_backbone(
    model: Any,
    expert_subset: Any,
    exclude_experts: Any,
    source: str | os.PathLike | None,
    progress: bool,
    check_weights: bool,
    hub_kwargs: dict[str, Any],
) -> Any:
    """`model.share_backbone(...)`; see `ExpertSwitching.share_backbone`.

    Args:
        model (`EmoPreTrainedModel`): the model whose backbone is shared.
        expert_subset, exclude_experts, source, progress, check_weights, hub_kwargs: as there.

    Example: see `ExpertSwitching.share_backbone`.
    """
    config, layers, place = _prepare(
        model, expert_subset, exclude_experts, source, progress, check_weights, hub_kwargs, "share_backbone"
    )
    own = {
        (layer.index, name): layer.assemble(name, parameter)
        for layer in layers
        for name, parameter in _parameters_of(model, layer.index).items()
    }
    # A deep copy takes what is in `memo` as copied. So the backbone is shared, and nothing is made of experts
    # and of the pools' random generator, which cannot be copied.
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    for layer in layers:
        for parameter in _parameters_of(model, layer.index).values():
            memo[id(parameter)] = nn.Parameter(parameter.new_empty(0), parameter.requires_grad)
    compiled = model.__dict__.get("_compiled_call")  # what `generate` compiled of this model
    for aside in (model.base_model.pool_generator, compiled):
        if aside is not None:
            memo[id(aside)] = None
    twin = copy.deepcopy(model, memo)
    twin._part_of = Origin.of_loaded(model, hub_kwargs)
    twin.__dict__.pop("_compiled_call", None)
    for (index, name), tensor in own.items():
        _set_parameter(twin, index, name, tensor)
    _set_config(twin, config, layers, place)
    return twin


def _prepare(
    model: Any,
    expert_subset: Any,
    exclude_experts: Any,
    source: str | os.PathLike | None,
    progress: bool,
    check_weights: bool,
    hub_kwargs: dict[str, Any],
    caller: str,
) -> tuple[EmoConfig, list[_Layer], tuple[str | os.PathLike, str | None] | None]:
    """The config with the new experts, the layers with what was read, and the place it was read from."""
    check_hub_kwargs(caller, hub_kwargs)
    _check_plain(model, caller)
    if expert_subset is None and exclude_experts is None:
        raise SubsetError(f"{caller}() needs an `expert_subset` or `exclude_experts`.")
    weights = dict(model.named_parameters())
    is_own = source is None or os.fspath(source) == model.config.name_or_path
    if source is None:
        own = ModelSource.of_loaded(model.config, hub_kwargs)
        held = _held(own, expert_subset, exclude_experts)
        if held is not None:  # the model holds them all
            config = own.config_of(held)
            own.warn_if_chosen_elsewhere(held, weights)
            return config, _plan(model, config, held.subset), None
        if not own.path:
            raise SubsetError(
                "The model does not hold these experts and was not loaded from anywhere: give the "
                "`source` to read them from."
            )
        source, hub_kwargs = own.path, own.hub_kwargs
    with ModelSource.open(source, **hub_kwargs) as place:
        _check_config(model, place)
        packing = _check_packing(model, place)
        try:
            kept = place.keep(expert_subset, exclude_experts)
        except SubsetError as error:
            raise SubsetError(
                f"{error} (Read from {os.fspath(source)!r}: `source` names another place.)"
            ) from error
        config = place.config_of(kept)
        layers = _plan(model, config, kept.subset)
        if any(layer.new_rows for layer in layers):
            _read(model, layers, place, kept.local, progress, is_own, packing)
            if check_weights:
                for layer in layers:
                    _check_read(layer, kept.subset, os.fspath(source))
        place.warn_if_chosen_elsewhere(kept, weights)
    return config, layers, (source, place.commit)


def _held(own: ModelSource, expert_subset: Any, exclude_experts: Any) -> KeptExperts | None:
    """The experts asked for, if the model holds them all."""
    if expert_subset is None:
        # All experts of the root: the model holds them only if it is no subset itself.
        return None if own.config.retained_experts is not None else own.keep(None, exclude_experts)
    subset = ExpertSubset.of(expert_subset, *own.library)
    if subset.local_ids:  # of the checkpoint
        return None
    held = present_experts(own.config)
    if len(subset.experts) != len(held) or any(
        not set(ids or ()) <= set(there) for ids, there in zip(subset.experts, held, strict=True)
    ):
        return None
    return own.keep(subset, exclude_experts)


def _check_config(model: Any, place: ModelSource) -> None:
    """Check that the place that experts are read from has the same model, as far as configs tell."""
    config, source = place.config, place.path
    for name in _SHAPE_SETTINGS:
        ours, theirs = getattr(model.config, name), getattr(config, name)
        if ours != theirs:
            raise CheckpointError(
                f"{os.fspath(source)} is another model: its `{name}` is {theirs!r}, this model's "
                f"{ours!r}. Give the model that this one was loaded from."
            )
    if root_experts(config) != root_experts(model.config):
        raise CheckpointError(
            f"{os.fspath(source)} is another model: it has {root_experts(config)} experts in its layers, and "
            f"this model is of one with {root_experts(model.config)}. Give the model that "
            "this one was loaded from."
        )


def _check_packing(model: Any, place: ModelSource) -> PackedConfig | None:
    """How experts that are read are to be packed; `None` if they are as the model has them.

    A model may have been quantised while it was loaded: its place is not.
    """
    ours, theirs = packing_of(model.config), place.packing
    if theirs is None:
        return ours
    if ours is None or (ours.bits, ours.group_size, ours.symmetric) != (
        theirs.bits,
        theirs.group_size,
        theirs.symmetric,
    ):
        held = "is not quantised" if ours is None else f"has {ours.bits} bits in groups of {ours.group_size}"
        raise CheckpointError(
            f"{os.fspath(place.path)} holds experts in {theirs.bits} bits in groups of {theirs.group_size}, "
            f"and this model {held}: give a `source` that is kept alike or not quantised."
        )
    return None


def _plan(model: Any, config: EmoConfig, subset: ExpertSubset) -> list[_Layer]:
    """Where each wanted expert is now."""
    layers = []
    held_ids = present_experts(model.config)
    for index, (wanted, experts) in enumerate(zip(subset.experts, config.layer_experts, strict=True)):
        if wanted is None:
            continue
        row_of = {root: row for row, root in enumerate(held_ids[index])}
        held = [(row, row_of[root]) for row, root in enumerate(wanted) if root in row_of]
        new = [row for row, root in enumerate(wanted) if root not in row_of]
        layers.append(_Layer(index, experts, held, new, {}))
    return layers


def _read(
    model: Any,
    layers: list[_Layer],
    place: ModelSource,
    local: list[list[int] | None],
    progress: bool,
    is_own: bool,
    packing: PackedConfig | None,
) -> None:
    """Read the experts and router rows that the model does not hold, in its dtype, to its device.

    `is_own`: the place that the model was loaded from. Another is first checked to have this model.
    `packing`: how experts are packed that are not so in that place.
    """
    rows = {layer.index: layer.new_rows for layer in layers}
    # A layer without anything new is named by one expert, which is never read.
    wanted = [
        None if ids is None else [ids[row] for row in rows[index]] or ids[:1]
        for index, ids in enumerate(local)
    ]
    parameters = place.parameters(wanted)
    if not is_own:
        _check_same_model(model, place)
    lazies = {name[name.index("layers.") :]: lazy for name, lazy in parameters.items() if "layers." in name}
    new = [layer for layer in layers if layer.new_rows]
    names = [f"layers.{layer.index}.mlp.{name}" for layer in new for name in EXPERT_PARAMETERS]
    place.fetch([lazies[name] for name in names], progress=progress)
    for layer in tqdm(new, desc="Reading experts", unit="layer", delay=2, disable=not progress):
        for name, parameter in _parameters_of(model, layer.index).items():
            lazy: Any = lazies[f"layers.{layer.index}.mlp.{name}"]
            if lazy.shape[1:] != tuple(parameter.shape[1:]):
                raise CheckpointError(
                    f"{name} of layer {layer.index} has shape {lazy.shape} in {os.fspath(place.path)}, and "
                    f"{tuple(parameter.shape)} in the model: they are not of one model. Give the model "
                    "that this one was loaded from."
                )
            if packing is not None and parts_of(parameter).keys() != {""}:
                lazy = QuantisedWhileRead(lazy, packing, f"{name} of layer {layer.index}")
            lazy.cast_to = parameter.dtype
            layer.read[name] = lazy[...].to(parameter.device)


def _check_read(layer: _Layer, subset: ExpertSubset, label: str) -> None:
    """Check that what was read for a layer are numbers."""
    wanted = subset.experts[layer.index] or []
    ids = [wanted[row] for row in layer.new_rows]
    tensors = ((f"model.layers.{layer.index}.mlp.{name}", tensor) for name, tensor in layer.read.items())
    check_finite(label, tensors, {layer.index: ids})


def _check_same_model(model: Any, place: ModelSource) -> None:
    """Check that experts of a place are of this model, which sizes and names do not tell."""
    num_layers = model.config.num_hidden_layers
    theirs = fingerprint_of(place.attention(), num_layers)
    reason = differing_signs(fingerprint_of(dict(model.named_parameters()), num_layers), theirs)
    if reason is not None:
        raise CheckpointError(
            f"{os.fspath(place.path)} is another model: {reason}. Its experts mean nothing in this one: give "
            "the model that this one was loaded or tuned from."
        )


def _check_plain(model: Any, caller: str) -> None:
    """Check that the experts are plain tensors in memory: rows are taken from them and put into them."""
    what = None
    quantised = getattr(model.config, "quantization_config", None)
    if model.expert_memory is not None:
        what = "read when they are taken: load the model with `expert_memory` and the other subset instead"
    elif quantised is not None and not isinstance(quantised, PackedConfig):
        what = "quantised: load the other subset instead"
    elif any(hasattr(module, "base_layer") for module in model.modules()):
        what = (
            "under adapters, which belong to the experts they were trained with: merge or unload them first"
        )
    else:
        for index, layer in enumerate(model.config.layer_experts):
            for name, parameter in {} if layer.is_dense else _parameters_of(model, index).items():
                if parameter.is_meta:
                    what = "offloaded: load the model with all of its weights in memory"
                elif len(parameter) != layer.num_experts or not _is_plain_or_packed(parameter):
                    what = f"sharded or wrapped ({name} is a {type(parameter.data).__name__})"
    if what is not None:
        raise ValueError(f"{caller}() cannot change experts that are {what}.")


def _is_plain_or_packed(parameter: nn.Parameter) -> bool:
    return type(parameter.data) is torch.Tensor or parts_of(parameter).keys() != {""}


def _parameters_of(model: Any, index: int) -> dict[str, nn.Parameter]:
    """The parameters of a layer that have a row for each expert."""
    block = model.base_model.layers[index].mlp
    return {name: block.get_parameter(name) for name in EXPERT_PARAMETERS}


def _set_parameter(model: Any, index: int, name: str, tensor: torch.Tensor) -> None:
    block = model.base_model.layers[index].mlp
    owner_name, _, attribute = name.rpartition(".")
    owner = block.get_submodule(owner_name)
    setattr(owner, attribute, nn.Parameter(tensor, getattr(owner, attribute).requires_grad))


def _set_config(model: Any, config: EmoConfig, layers: list[_Layer], place: tuple | None) -> None:
    """Set the new experts in the config, which all modules share, and in the modules."""
    for name in EXPERT_SETTINGS:
        setattr(model.config, name, copy.deepcopy(getattr(config, name)))
    for layer in layers:
        block = model.base_model.layers[layer.index].mlp
        block.gate.layer = layer.experts
        block.experts.num_experts = layer.experts.num_experts
    old, hub = model.config.name_or_path, {}
    if place is not None:  # where the next swap reads from
        model.name_or_path, model.config._commit_hash = os.fspath(place[0]), place[1]
    if isinstance(old, SubsetName) and old == model.name_or_path:
        hub = old.origin.hub_kwargs
    if getattr(model.config, "_commit_hash", None) is not None:
        hub = hub | {"revision": model.config._commit_hash}
    if place is not None or old:
        name_part(model, old if place is None else place[0], hub)
