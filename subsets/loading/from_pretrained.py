"""`from_pretrained` with some of the experts: what is wanted is found, checked and handed to Transformers.

`modeling_emo` calls this module through one hook. Transformers' own loader is given lazy tensors instead of
files. So dtype, device map and quantisation stay its business, and every expert's bytes are read straight to
the place where they stay (`weight_loading.py`).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

from ...checkpoints.errors import CheckpointError
from ...checkpoints.hub.names import HUB_KWARGS, folder_or_repo, is_hub_repo, pinned
from ...checkpoints.source_files import SourceFiles
from ...configuration import EmoConfig
from ...imports.transformers_versions import private_names
from ..numbering import present_experts
from .adapter_record import check_adapter, check_adapter_config, more_experts_allowed
from .expert_memory import check_memory_arguments, paged_parameters, refuse_packing
from .model_source import ModelSource
from .tokenizer_copy import Origin, name_part
from .weight_loading import LazyStateDict, prepare_packed, whole_model
from .weights_check import check_finite

with private_names("loading"):
    from transformers.integrations.peft import maybe_load_adapters

# Said of the model being loaded, not of what its file says.
_NOT_FOR_CONFIG = ("dtype", "torch_dtype", "quantization_config")
# What Transformers would take from the model's path, and is taken from there after the weights are loaded.
_AFTERWARDS = ("adapter_kwargs", "adapter_name", "generation_config", "output_loading_info")


def from_pretrained(
    load: Callable,
    cls: type,
    path: str | os.PathLike,
    *args,
    expert_subset: Any = None,
    exclude_experts: Any = None,
    ignore_missing_keys: bool = False,
    check_weights: bool = False,
    expert_memory: int | str | None = None,
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
        ignore_missing_keys (`bool`, defaults to `False`): parameters that the files lack may be random.
        check_weights (`bool`, defaults to `False`): refuse weights that are NaN or infinite.
        expert_memory (`int` or `str`, *optional*): bytes for experts, which are read when they are taken.

    Example: see `EmoPreTrainedModel.from_pretrained`.
    """
    is_whole = expert_subset is None and exclude_experts is None
    if is_whole and expert_memory is None:
        with whole_model(path, kwargs, ignore_missing=ignore_missing_keys):
            result = load(path, *args, **kwargs)
        if check_weights:
            _check_finite(result[0] if isinstance(result, tuple) else result, path)
        return result
    _check_arguments(kwargs, "expert_subset" if expert_memory is None else "expert_memory")
    if expert_memory is not None:
        check_memory_arguments(kwargs, check_weights=check_weights)
    hub = {name: kwargs.pop(name) for name in HUB_KWARGS if name in kwargs}
    with folder_or_repo(path):  # it may name an adapter: the experts are those of its model
        places: Any = dict(hub)  # Transformers may add to it
        adapter, base, adapter_kwargs = maybe_load_adapters(
            path, places, **kwargs.get("adapter_kwargs") or {}
        )
    hub = pinned(base, hub)  # one commit of everything, even if the branch moves meanwhile
    config, kwargs = _config_of(base, hub, kwargs)
    afterwards = {name: kwargs.pop(name, None) for name in _AFTERWARDS}
    any_size = bool(kwargs.get("ignore_mismatched_sizes"))
    files = None  # else their state, before anything of them is read
    if expert_memory is not None:
        files = SourceFiles.of(base, patterns=("**/*.safetensors",), subfolder=hub.get("subfolder"))
    with ModelSource(base, config, hub, variant=kwargs.pop("variant", None)) as source:
        asked = kwargs.get("quantization_config")
        packing = prepare_packed(copy.deepcopy(config), asked, os.fspath(base)) or source.packing
        if asked is not None and expert_memory is not None:
            refuse_packing(source, asked)
        # Before the subset: a damaged config would say that it does not fit.
        source.check_sizes(ignore_missing=ignore_missing_keys, ignore_mismatched=any_size)
        kept = source.keep(expert_subset, exclude_experts)
        small = source.config if is_whole else source.config_of(kept)
        if expert_memory is None or files is None:
            memory, tensors = None, LazyStateDict(source.parameters(kept.local))
        else:
            memory, tensors = paged_parameters(source, kept.local, small, expert_memory, files)
        tensors.label = os.fspath(base)
        tensors.ignore_missing = ignore_missing_keys or bool(afterwards["output_loading_info"])
        source.fetch(tensors.values(), progress=True)
        source.warn_if_chosen_elsewhere(kept, tensors)
        if packing is not None:
            kwargs.pop("quantization_config", None)
            small.quantization_config = packing.loading_dict()
        small.dtype = small.dtype or tensors.dtype  # which Transformers takes from the weights else
        model, info = load(None, *args, config=small, state_dict=tensors, output_loading_info=True, **kwargs)
    if check_weights:
        _check_finite(model, base)
    if memory is not None:
        memory.is_loaded = True
        model.requires_grad_(False)
    commit = source.commit if is_hub_repo(base) else None
    if is_whole:
        model.config._commit_hash = commit
        model.name_or_path = model.base_model.name_or_path = os.fspath(base)
    else:
        _name(model, base, commit, hub)
        model._part_of = Origin.of(base, hub)
    _take_generation_config(model, base, hub, afterwards["generation_config"], kwargs)
    if adapter is not None:
        token = {} if hub.get("token") is None else {"token": hub["token"]}
        info = model.load_adapter(
            adapter,
            adapter_name=afterwards["adapter_name"] or "default",
            load_config=tensors.load_config,
            adapter_kwargs=adapter_kwargs | token,
        ).to_dict()
    return (model, info) if afterwards["output_loading_info"] else model


def _check_finite(model: Any, path: str | os.PathLike) -> None:
    named = {id(tensor): (name, tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    check_finite(os.fspath(path), named.values(), dict(enumerate(present_experts(model.config))))


def _check_arguments(kwargs: dict[str, Any], argument: str) -> None:
    for name in ("state_dict", "gguf_file"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"`{argument}` chooses what is read from a checkpoint: it cannot go with `{name}`. Leave "
                "out one of the two."
            )
    if kwargs.get("use_safetensors") is False:
        raise CheckpointError(
            "Only safetensors weights can be read in part: leave out `use_safetensors=False`."
        )


def _config_of(
    base: str | os.PathLike, hub: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[EmoConfig, dict[str, Any]]:
    """The config of the whole model, and the keyword arguments that were not settings of it."""
    config = kwargs.pop("config", None)
    if isinstance(config, EmoConfig):
        return config, kwargs
    aside = {name: kwargs.pop(name) for name in (*_NOT_FOR_CONFIG, *_AFTERWARDS) if name in kwargs}
    place = base if config is None else config
    config, kwargs = EmoConfig.from_pretrained(place, return_unused_kwargs=True, **hub, **kwargs)
    return config, kwargs | aside


def _name(model: Any, base: str | os.PathLike, commit: str | None, hub: dict[str, Any]) -> None:
    """Let the model say where it is from, as Transformers does for a path; swaps and names start there."""
    name_part(model, base, hub)
    model.config._commit_hash = commit
    for part in (model, model.base_model):
        part.name_or_path = os.fspath(base)


def _take_generation_config(
    model: Any, base: str | os.PathLike, hub: dict[str, Any], own: Any, kwargs: dict[str, Any]
) -> None:
    """Take the generation config, and with `trust_remote_code` the code for it, from the model's path."""
    if not model.can_generate():
        return
    places = {name: hub.get(name) for name in ("cache_dir", "proxies", "token", "revision")}
    model.adjust_generation_fn(
        own,
        kwargs.get("_from_auto", False),
        kwargs.get("_from_pipeline"),
        base,
        **places,
        force_download=bool(hub.get("force_download")),
        local_files_only=bool(hub.get("local_files_only")),
        subfolder=hub.get("subfolder") or "",
        trust_remote_code=kwargs.get("trust_remote_code"),
    )


def load_checked_adapter(
    load: Callable, config: EmoConfig, adapter: str | os.PathLike | None, *args, **kwargs
):
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
    with more_experts_allowed():
        return load(adapter, *args, **kwargs)
