"""Loading a model with only some of its experts: from a checkpoint to the parameters of the network.

`modeling_emo` calls this module through one hook (`model_hooks.py`). Each stacked parameter is handed to
Transformers' own loader as a lazy tensor, so that dtype, device map and quantisation stay its business, and
every expert's bytes are read straight to the place where they stay.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..modeling_emo.transformers_versions import private_names

with private_names("loading"):
    from transformers.core_model_loading import WeightConverter
    from transformers.utils.hub import extract_commit_hash

from ..configuration import EmoConfig
from .adapter_record import check_adapter, check_adapter_config
from .checkpoint import Checkpoint, LazyTensor, LocalFiles, rows_of
from .exclusion import named_exclusion, remaining_subset
from .expert_subset import SubsetError
from .fingerprint import warn_if_chosen_elsewhere
from .hub_files import HubFiles, is_hub_repo, pinned
from .hub_loading import cache_view, fetch_ahead, open_part
from .library import library_of, library_of_loaded
from .model_experts import local_experts, subset_config
from .safetensors_header import CheckpointError
from .size_check import check_sizes, weights_known
from .tokenizer_copy import Origin

logger = logging.get_logger(__name__)

# Said of the model being loaded, not of what its file says.
_NOT_FOR_CONFIG = ("dtype", "torch_dtype", "quantization_config")
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
EXPERT_TENSOR = re.compile(
    r"(?P<block>|.*\.)layers\.(?P<layer>\d+)\.mlp\.experts\.(?P<expert>\d+)\.(?P<part>gate|up|down)_proj\.weight"
)
_STACKED_TENSOR = re.compile(r".*\blayers\.(?P<layer>\d+)\.mlp\.(experts\.(gate_up|down)_proj|gate\.weight)")


@dataclass
class _Request:
    """What the load in progress keeps, and of which model; where they have been fetched, its weights."""

    config: EmoConfig
    kept: list[list[int] | None] | None
    origin: Origin | None = None  # of a part
    tensors: dict[str, LazyTensor] | None = None


_request: ContextVar[_Request | None] = ContextVar("request", default=None)  # from_pretrained to load_weights


def kept_experts(
    expert_subset: Any,
    config: EmoConfig,
    exclude_experts: Any = None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> list[list[int] | None]:
    """The experts a subset keeps, in the numbering of a model that will mask the others.

    Args:
        expert_subset: whatever `ExpertSubset.of` takes; `None` for all experts.
        config (`EmoConfig`): the model's config.
        exclude_experts: whatever `remaining_subset` takes; none by default.
        weights (`Mapping[str, torch.Tensor]`, *optional*): the model's, by name, to warn of a subset
            that was chosen on another model.

    Raises:
        SubsetError: if it does not fit the model, or drops shared experts: their weights would still be
            there.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.subsets.loading import kept_experts
    >>> kept_experts([[7, 1]], EmoConfig(num_hidden_layers=1, num_experts=8, num_experts_per_tok=4))
    [[1, 7]]

    ```
    """
    library = library_of_loaded(config)
    exclude_experts = named_exclusion(exclude_experts, *library)
    subset = remaining_subset(expert_subset, exclude_experts, config, *library)
    if subset.drop_shared:
        raise SubsetError("A subset with drop_shared=True cannot be a mask: load the model with it instead.")
    if weights is not None:
        path = config.name_or_path or ""
        warn_if_chosen_elsewhere(subset, path, weights, config.num_hidden_layers, excluded=exclude_experts)
    return local_experts(subset, config)


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
    >>> from transformers_emo.subsets.loading import open_checkpoint
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
    >>> from transformers_emo.subsets import Checkpoint
    >>> from transformers_emo.subsets.loading import lazy_parameters
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
