"""Loading a model with only some of its experts: from a checkpoint to the parameters of the network.

`modeling_emo` calls this module through one hook (`model_hooks.py`). Each stacked parameter is handed to
Transformers' own loader as a lazy tensor, so that dtype, device map and quantisation stay its business, and
every expert's bytes are read straight to the place where they stay.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ...modeling_emo.transformers_versions import private_names
from .wanted_tensors import fetch_parameters, lazy_parameters

with private_names("loading"):
    from transformers.core_model_loading import WeightConverter
    from transformers.utils.hub import extract_commit_hash

from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.errors import CheckpointError
from ...checkpoints.hub.names import HUB_KWARGS, is_hub_repo, pinned
from ...checkpoints.hub.repository import HubFiles
from ...checkpoints.lazy_tensor import LazyTensor
from ...checkpoints.local_files import LocalFiles
from ...configuration import EmoConfig
from ..exclusion import named_exclusion, remaining_subset
from ..fingerprint import warn_if_chosen_elsewhere
from ..library import library_of
from ..reduced_config import local_experts, subset_config
from .adapter_record import check_adapter, check_adapter_config
from .hub_view import cache_view
from .tokenizer_copy import Origin
from .weights_check import check_sizes, weights_known

logger = logging.get_logger(__name__)

# Said of the model being loaded, not of what its file says.
_NOT_FOR_CONFIG = ("dtype", "torch_dtype", "quantization_config")


@dataclass
class _Request:
    """What the load in progress keeps, and of which model; where they have been fetched, its weights."""

    config: EmoConfig
    kept: list[list[int] | None] | None
    origin: Origin | None = None  # of a part
    tensors: dict[str, LazyTensor] | None = None


_request: ContextVar[_Request | None] = ContextVar("request", default=None)  # from_pretrained to load_weights


def from_pretrained(
    load: Callable,
    cls: type,
    path: str | os.PathLike,
    *args,
    expert_subset: Any = None,
    exclude_experts: Any = None,
    **kwargs,
):
    """`cls.from_pretrained(path, expert_subset=...)`; see `EmoPreTrainedModel.from_pretrained`.

    Args:
        load (`Callable`): Transformers' own `from_pretrained` of `cls`.
        cls (`type`): the model class.
        path (`str` or `os.PathLike`): a folder or a Hub repository.
        args, kwargs: passed on.
        expert_subset: whatever `ExpertSubset.of` takes, or `None` for the whole model.
        exclude_experts: whatever `remaining_subset` takes, or `None` for none.

    Example: see `EmoPreTrainedModel.from_pretrained`.
    """
    if expert_subset is None and exclude_experts is None:
        with weights_known(kwargs):
            return load(path, *args, **kwargs)
    for name in ("state_dict", "gguf_file"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"`expert_subset` chooses what is read from a checkpoint: it cannot go with `{name}`."
            )
    if kwargs.get("use_safetensors") is False:
        raise CheckpointError(
            "Only safetensors weights can be read in part: leave out `use_safetensors=False`."
        )

    base = _base_of_adapter(path)  # where the config and the weights are
    # Config, library and weights of one commit, even if the branch moves meanwhile.
    kwargs |= pinned(base, {name: kwargs[name] for name in HUB_KWARGS if name in kwargs})
    config = kwargs.pop("config", None)
    if not isinstance(config, EmoConfig):
        aside = {name: kwargs.pop(name) for name in _NOT_FOR_CONFIG if name in kwargs}
        hub = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        config, kwargs = EmoConfig.from_pretrained(
            base if config is None else config, return_unused_kwargs=True, **kwargs
        )
        kwargs |= hub | aside
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"The weights of {path} are quantised, and their experts cannot be taken apart. Take the subset "
            "of the unquantised model; `quantization_config` quantises it while loading."
        )
    folder = Path(base, kwargs.get("subfolder") or "") if os.path.isdir(base) else None
    checkpoint = None
    if folder is not None:  # see that the files are whole before the network is built
        checkpoint = Checkpoint.from_folder(folder, variant=kwargs.get("variant"))
        checkpoint.source.close()
        check_sizes(checkpoint.tensors, config)
    hub = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
    library = library_of(base, **hub)
    exclude_experts = named_exclusion(exclude_experts, *library)
    subset = remaining_subset(expert_subset, exclude_experts, config, *library)
    kept = local_experts(subset, config)
    if checkpoint is not None:
        try:
            lazies = lazy_parameters(checkpoint, config, kept)
            warn_if_chosen_elsewhere(subset, base, lazies, config.num_hidden_layers, excluded=exclude_experts)
        finally:
            checkpoint.source.close()
    small = subset_config(config, subset)
    request = _Request(config, kept, Origin.of(base, hub))
    if is_hub_repo(base):
        files = HubFiles(os.fspath(base), hub)
        try:
            tensors = fetch_parameters(files, config, kept, variant=kwargs.pop("variant", None))
            warn_if_chosen_elsewhere(
                subset, base, tensors, config.num_hidden_layers, excluded=exclude_experts
            )
            request.tensors = tensors
            dtype = next(tensor.dtype for tensor in tensors.values() if tensor.dtype.is_floating_point)
            with cache_view(files, dtype) as view:
                return _load(load, path, request, *args, config=small, **kwargs | view)
        finally:
            files.close()
    return _load(load, path, request, *args, config=small, **kwargs)


def _load(load: Callable, path: str | os.PathLike, request: _Request, *args, **kwargs):
    token = _request.set(request)
    try:
        return load(path, *args, **kwargs)
    finally:
        _request.reset(token)


def load_adapter(load: Callable, config: EmoConfig, adapter: str | os.PathLike | None, *args, **kwargs):
    """Transformers' `model.load_adapter`, once the adapter is known to belong to the model's experts.

    Args:
        load (`Callable`): Transformers' own `load_adapter` of the model.
        config (`EmoConfig`): the model's config.
        adapter (`str` or `os.PathLike`, *optional*): the adapter's folder or Hub repository.
        args, kwargs: passed on.

    Raises:
        SubsetError: if it does not; before anything is loaded.

    Example: see `EmoPreTrainedModel.load_adapter`.
    """
    check_adapter_config(kwargs.get("peft_config"), config)
    if adapter is not None:
        hub = dict(getattr(kwargs.get("load_config"), "download_kwargs", None) or {})
        hub |= kwargs.get("adapter_kwargs") or {}
        if kwargs.get("local_files_only"):
            hub["local_files_only"] = True
        check_adapter(adapter, config, {name: hub[name] for name in HUB_KWARGS if name in hub})
    return load(adapter, *args, **kwargs)


def load_weights(load: Callable, model, state_dict, checkpoint_files, load_config, *args, **kwargs):
    """Transformers' `_load_pretrained_model`, given lazy tensors of the wanted experts.

    Also used for whole models: experts are read straight into the stacked parameters, so that the peak of
    memory is the model itself and not twice that. Where Transformers has business of its own with the files
    (quantised weights, offloading to disk, custom key mappings, adapters), whole models are left to it.

    Args:
        load (`Callable`): Transformers' own `_load_pretrained_model`.
        model (`EmoPreTrainedModel`): the network, its parameters on the meta device.
        state_dict, checkpoint_files, load_config, args, kwargs: as for that.

    Raises:
        CheckpointError: for a subset, if the checkpoint does not hold its experts.

    Example: see `EmoPreTrainedModel.from_pretrained`.
    """
    request = _request.get() or _Request(model.config, None)
    config, kept = request.config, request.kept
    _request.set(None)  # an adapter that this load may go on to read is not part of the checkpoint
    # What is swapped in or named later is of this commit, whatever the repository holds by then.
    model.config._commit_hash = extract_commit_hash(next(iter(checkpoint_files or ()), None), None)
    model._part_of = request.origin
    on_disk = "disk" in (load_config.device_map or {}).values()
    if kept is None:
        left_alone = (
            state_dict is not None or not checkpoint_files or on_disk or load_config.hf_quantizer is not None
        )
        left_alone = left_alone or not all(file.endswith(".safetensors") for file in checkpoint_files)
        if left_alone or not _has_our_mapping(load_config):
            return load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
    source = None
    tensors = request.tensors
    try:
        if tensors is None:
            folder = Path(os.path.commonpath([os.path.dirname(os.path.abspath(f)) for f in checkpoint_files]))
            files = [os.path.relpath(os.path.abspath(file), folder) for file in checkpoint_files]
            source = LocalFiles(folder)
            try:
                tensors = lazy_parameters(Checkpoint.from_files(folder, files, source), config, kept)
            except CheckpointError:
                if kept is not None:
                    raise
                # Not a checkpoint of this very network: Transformers reports what is missing or different.
                return load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        if load_config.hf_quantizer is None:
            _cast_while_reading(tensors, model)
            if getattr(load_config, "device_mesh", None) is None:  # else each process takes its part of it
                _read_to_devices(tensors, model, load_config.device_map or {})
        # Transformers' own default would map them. Read weights are found faster by what computes with them.
        if source is not None and getattr(load_config, "disable_mmap", None) is False:
            for tensor in tensors.values():
                tensor.mapped = True
        # Transformers would look up offloaded parameters in the files by name, and find the whole router.
        files_for_offload = None if on_disk else checkpoint_files
        result = load(model, tensors, files_for_offload, load_config, *args, **kwargs)
    finally:
        if source is not None:
            source.close()
    # The tensors came in under the network's own names; saving must still take the experts apart again.
    model._weight_conversions = [
        transform
        for transform in load_config.weight_mapping
        if transform.was_used() or _is_expert_converter(transform)
    ]
    return result


def _base_of_adapter(path: str | os.PathLike) -> str | os.PathLike:
    """The model that a folder with nothing but an adapter belongs to; any other path as it is."""
    adapter, config = Path(path, "adapter_config.json"), Path(path, "config.json")
    if adapter.is_file() and not config.is_file():
        return json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path") or path
    return path


def _cast_while_reading(tensors: dict[str, LazyTensor], model) -> None:
    """Have tensors converted to the dtype of the model's parameters as they are read."""
    for name, parameter in model.state_dict().items():
        for key in _names_of(name, model):
            if key in tensors and tensors[key].dtype.is_floating_point and parameter.dtype.is_floating_point:
                tensors[key].cast_to = parameter.dtype


def _read_to_devices(tensors: dict[str, LazyTensor], model, device_map: dict[str, Any]) -> None:
    """Have tensors read into the memory of the accelerator where the device map wants them."""
    for name in model.state_dict():
        parts = name.split(".")
        modules = [".".join(parts[:length]) for length in range(len(parts), -1, -1)]
        place = next((device_map[module] for module in modules if module in device_map), "cpu")
        if str(place) in ("cpu", "disk"):
            continue
        for key in _names_of(name, model):
            if key in tensors:
                tensors[key].device = torch.device(place)


def _names_of(name: str, model) -> tuple[str, ...]:
    """What a parameter may be called in a checkpoint of the model with another head or none."""
    prefix = f"{model.base_model_prefix}."
    return name, prefix + name, name.removeprefix(prefix)


def _is_expert_converter(transform) -> bool:
    return isinstance(transform, WeightConverter) and "mlp.experts." in transform.target_patterns[0]


def _has_our_mapping(load_config) -> bool:
    """Whether the expert converters are there (a custom key mapping might have replaced them)."""
    return any(_is_expert_converter(transform) for transform in load_config.weight_mapping or [])
