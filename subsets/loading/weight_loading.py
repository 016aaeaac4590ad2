"""Transformers' loader of weights, given lazy tensors: experts are read straight into the stacked parameters.

A subset comes as a `LazyStateDict`. A whole model comes as files: those are opened here.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ...checkpoints.checkpoint import Checkpoint, weight_files
from ...checkpoints.errors import CheckpointError
from ...checkpoints.lazy_tensor import LazyTensor
from ...checkpoints.local_files import LocalFiles, check_json_inside, file_inside
from ...checkpoints.side_files import GENERATION_CONFIG, optional_file
from ...configuration import EmoConfig
from ...configuration.configuration_emo import prepare_config
from ...imports.transformers_versions import private_names
from ...quantization.packed_config import METHOD, ON_DISK, PackedConfig, packing_of
from ...quantization.packed_files import LazyPacked, PackedCheckpoint, QuantisedWhileRead
from ...quantization.quantizer import PackedQuantizer
from .wanted_tensors import lazy_parameters
from .weights_check import check_fit, check_sizes, missing_parameters

with private_names("loading"):
    from transformers.core_model_loading import WeightConverter
    from transformers.integrations import is_deepspeed_zero3_enabled
    from transformers.utils.hub import extract_commit_hash

# With these, weights are of another form than the network's own.
_OTHER_FORMS = ("state_dict", "gguf_file", "key_mapping")
_NO_PATH = "The checkpoint"
_FILE_KWARGS = ("cache_dir", "revision", "subfolder", "variant")


class LazyStateDict(dict[str, LazyTensor]):
    """The weights of a network with some of its experts, yet to be read.

    Attributes:
        label (`str`): what their model is called in messages.
        ignore_missing (`bool`): whether parameters that are not among them may be random numbers.
        load_config (`LoadStateDictConfig`, *optional*): what Transformers loaded them with, once it has.
        prepare (`Callable`, *optional*): called with the network and `load_config` before anything is loaded.

    Example: see `EmoPreTrainedModel.from_pretrained`.
    """

    label: str = ""
    ignore_missing: bool = False
    load_config: Any = None
    prepare: Callable[[Any, Any], None] | None = None

    @property
    def dtype(self) -> torch.dtype | None:
        """`torch.dtype`, *optional*: of the first tensor of floating point numbers."""
        return next((tensor.dtype for tensor in self.values() if tensor.dtype.is_floating_point), None)


@dataclass
class _WholeModel:
    """The whole model in loading: where its weights are, and their headers, once they have been read."""

    where: dict[str, Any] | None
    label: str
    ignore_missing: bool
    tells_missing: bool  # to the caller: `output_loading_info`
    ignore_mismatched: bool
    checkpoint: Checkpoint | None = None
    packing: PackedConfig | None = None  # of the files


# From `from_pretrained` of a whole model to the network's constructor and to `load_weights`.
_loading: ContextVar[_WholeModel | None] = ContextVar("loading", default=None)


@contextmanager
def whole_model(path: Any, kwargs: dict[str, Any], *, ignore_missing: bool = False) -> Iterator[None]:
    """Have a whole model loaded from files that are checked: by `check_before_building` and `load_weights`.

    The files of a folder are looked at before Transformers opens any. What is wrong with those of a
    repository is found out when Transformers could not load them, if not before.

    Args:
        path (`str` or `os.PathLike`, *optional*): the folder or Hub repository.
        kwargs (`dict[str, Any]`): of `from_pretrained`. A config of packed weights is replaced.
        ignore_missing (`bool`, defaults to `False`): parameters that the files lack may be random numbers.

    Raises:
        CheckpointError: if a file is damaged, missing or outside the folder, or the weights do not fit.

    Example: see `EmoPreTrainedModel.from_pretrained`.
    """
    # A state dict may be empty, and `None` is none.
    other = (
        any(kwargs.get(name) is not None for name in _OTHER_FORMS) or kwargs.get("use_safetensors") is False
    )
    where = None if other or path is None else {name: kwargs.get(name) for name in _FILE_KWARGS}
    label = _NO_PATH if path is None else os.fspath(path)
    tells = bool(kwargs.get("output_loading_info"))
    any_size = bool(kwargs.get("ignore_mismatched_sizes"))
    loading = _WholeModel(where, label, ignore_missing, tells, any_size)
    if where is not None and os.path.isdir(path):
        loading.checkpoint = _local_checkpoint(path, where)
    asked = kwargs.get("quantization_config")

    def prepare(config: Any) -> None:
        loading.packing = prepare_packed(config, asked, label)

    if isinstance(kwargs.get("config"), EmoConfig):
        kwargs["config"] = copy.deepcopy(kwargs["config"])
        prepare(kwargs["config"])
    token, preparing = _loading.set(loading), prepare_config.set(prepare)
    try:
        yield
    except CheckpointError:
        raise
    except _DAMAGE as error:
        if where is not None:
            _find_damage(path, where, error)
        if isinstance(error, SafetensorError | JSONDecodeError):
            raise CheckpointError(
                f"A file of {label} cannot be read ({type(error).__name__}: {error}): download it again."
            ) from error
        raise
    finally:
        _loading.reset(token)
        prepare_config.reset(preparing)
        if loading.checkpoint is not None:
            loading.checkpoint.source.close()


def prepare_packed(config: Any, asked: Any, label: str) -> PackedConfig | None:
    """Have Transformers read packed weights with the quantiser of this package.

    It has one for `compressed-tensors`, which knows nothing of stacked experts.

    Args:
        config (`EmoConfig`): the model's config; its `quantization_config` is changed.
        asked: the caller's `quantization_config`.
        label (`str`): what the model is called in messages.

    Returns:
        `PackedConfig`, *optional*: how the weights on disk are packed; `None` if they are not, or if they are
        quantised in a way that is left to Transformers.

    Raises:
        CheckpointError: if they are quantised in a way that nobody reads rightly.
        ValueError: if the caller asks for another way than that of the files.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig, PackedConfig
    >>> from transformers_emo.subsets.loading.weight_loading import prepare_packed
    >>> config = EmoConfig(quantization_config=PackedConfig(bits=8).to_dict())
    >>> prepare_packed(config, None, "my-model").bits, config.quantization_config["quant_method"]
    (8, 'emo-packed')

    ```
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    content = found if isinstance(found, Mapping) else found.to_dict()
    is_stacked = "experts" in str(content.get("quant_type", ""))
    if content.get("quant_method") not in (ON_DISK, METHOD) and not is_stacked:
        return None
    packing = packing_of(config, label)
    assert packing is not None
    if asked is not None and asked != packing:
        raise ValueError(
            f"{label} is in {packing.bits} bits already (group_size {packing.group_size}), and "
            "`quantization_config` asks for something else: leave it out, or give the unquantised model."
        )
    config.quantization_config = packing.loading_dict()
    return packing


# What others' readers raise for damaged files. It may have another reason: then the files are found whole.
_DAMAGE = (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)


def _local_checkpoint(path: str | os.PathLike, where: Mapping[str, Any]) -> Checkpoint | None:
    """The headers of the weights in a folder; `None` if it has none that are safetensors."""
    folder = Path(path, where["subfolder"] or "")
    for name in ("config.json", GENERATION_CONFIG):
        check_json_inside(folder, name)
    if not any((folder / name).is_file() for name in weight_files(where["variant"])):
        return None  # an adapter, or weights of another form
    return Checkpoint.from_folder(folder, variant=where["variant"])


def _find_damage(path: str | os.PathLike, where: Mapping[str, Any], error: Exception) -> None:
    """Raise `CheckpointError` if files of a repository, which are in the cache by now, are damaged."""
    if os.path.isdir(path):
        return
    hub = {name: value for name, value in where.items() if value is not None} | {"local_files_only": True}
    variant = hub.pop("variant", None)
    try:
        found = next(filter(None, (optional_file(path, name, **hub) for name in weight_files(variant))), None)
        if found is not None:
            Checkpoint.from_folder(os.path.dirname(found), variant=variant).source.close()
    except CheckpointError as damage:
        raise damage from error
    except (OSError, ValueError):  # not even in the cache
        return


def check_before_building(config: EmoConfig) -> None:
    """`check_sizes` with the weights of the model in loading, once Transformers has found or downloaded them.

    Weights that are quantised or no safetensors files are left to Transformers, and so is a network that is
    not being loaded.

    Args:
        config (`EmoConfig`): the config of the network to be built.

    Raises:
        CheckpointError: if the files are damaged or outside the folder, and as `check_sizes`.

    Example: see `EmoPreTrainedModel.from_pretrained`.
    """
    loading = _loading.get()
    if loading is None or loading.where is None:
        return
    where, loading.where = dict(loading.where), None  # a network inside this one is checked with it
    if not config.name_or_path:
        return
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None and not isinstance(quantised, PackedConfig):
        return
    if loading.checkpoint is None:
        variant = where.pop("variant")
        hub = {name: value for name, value in where.items() if value is not None} | {"local_files_only": True}
        names = weight_files(variant)
        found = next(filter(None, (optional_file(config.name_or_path, name, **hub) for name in names)), None)
        if found is None:
            return
        snapshot = os.path.dirname(found)
        for name in ("config.json", GENERATION_CONFIG):
            check_json_inside(snapshot, name)
        loading.checkpoint = Checkpoint.from_folder(snapshot, variant=variant)
        loading.checkpoint.source.close()
    if loading.packing is not None:
        loading.checkpoint = PackedCheckpoint(loading.checkpoint, loading.packing)
    if not loading.ignore_mismatched:
        check_sizes(loading.checkpoint.tensors, config, ignore_missing=loading.ignore_missing)


def load_weights(load: Callable, model, state_dict, checkpoint_files, load_config, *args, **kwargs):
    """Transformers' `_load_pretrained_model`, given lazy tensors of the wanted experts.

    Also used for whole models: experts are read straight into the stacked parameters, so that the peak of
    memory is the model itself and not twice that. Where Transformers has business of its own with the files
    (quantised weights, offloading to disk, custom key mappings, adapters, DeepSpeed's ZeRO-3), whole models
    are left to it.

    Args:
        load (`Callable`): Transformers' own `_load_pretrained_model`.
        model (`EmoPreTrainedModel`): the network, its parameters on the meta device.
        state_dict, checkpoint_files, load_config, args, kwargs: as for that.

    Raises:
        CheckpointError: if the weights lack parameters or do not fit the network.

    Example: see `EmoPreTrainedModel.from_pretrained`.
    """
    loading = _loading.get()
    _loading.set(None)  # an adapter that this load may go on to read is not part of the checkpoint
    if loading is not None:
        # What is swapped in or named later is of this commit, whatever the repository holds by then.
        model.config._commit_hash = extract_commit_hash(next(iter(checkpoint_files or ()), None), None)
        place = model.config.name_or_path
        for file in checkpoint_files or () if os.path.isdir(place) else ():
            file_inside(place, os.path.relpath(file, place))
    tensors = state_dict
    if isinstance(state_dict, LazyStateDict):
        state_dict.load_config = load_config
        if state_dict.prepare is not None:
            state_dict.prepare(model, load_config)
        label, ignore_missing = state_dict.label, state_dict.ignore_missing
    else:
        tensors = _tensors_of_files(model.config, state_dict, checkpoint_files, load_config, loading)
        label = _NO_PATH if loading is None else loading.label
        # An empty state dict asks for a network that is new throughout.
        ignore_missing = (
            loading is None or loading.ignore_missing or loading.tells_missing or state_dict == {}
        )
        if tensors is None:
            if loading is not None and isinstance(load_config.hf_quantizer, PackedQuantizer):
                raise ValueError(
                    f"{label} can only be read in few bits from safetensors files of its own layout: leave "
                    "out `state_dict`, `gguf_file`, `key_mapping`, `use_safetensors=False` and a "
                    "`device_map` to the disk, or `quantization_config`."
                )
            result = load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
            if loading is not None:  # else it is an adapter
                _check_fit(model, label, result[0], load_config, ignore_missing)
            return result
    quantiser = load_config.hf_quantizer
    is_ours = quantiser is None or isinstance(quantiser, PackedQuantizer)
    if isinstance(quantiser, PackedQuantizer):
        tensors = _to_be_quantised(tensors, quantiser, model, load_config)
    if not ignore_missing and is_ours:  # before any is read
        names = model.state_dict()
        lacking = (name for name in names if not any(each in tensors for each in _names_of(name, model)))
        check_fit(label, missing_parameters(model, lacking))
    source = next(tensor.source for tensor in tensors.values())
    try:
        if is_ours:
            _cast_while_reading(tensors, model)
            if getattr(load_config, "device_mesh", None) is None:  # else each process takes its part of it
                _read_to_devices(tensors, model, load_config.device_map or {})
        # Transformers' own default would map them. Read weights are found faster by what computes with them.
        if getattr(load_config, "disable_mmap", None) is False:
            for tensor in tensors.values():
                tensor.mapped = True
        if is_deepspeed_zero3_enabled():  # it takes no lazy tensors
            tensors = _tensors_of_first_process(tensors)
        # No files: Transformers would look up offloaded parameters there by name, and find the whole router.
        result = load(model, tensors, None, load_config, *args, **kwargs)
    finally:
        source.close()
    _check_fit(model, label, result[0], load_config, ignore_missing)
    # The tensors came in under the network's own names; saving must still take the experts apart again.
    model._weight_conversions = [
        transform
        for transform in load_config.weight_mapping
        if transform.was_used() or _is_expert_converter(transform)
    ]
    return result


def _check_fit(model: Any, label: str, info: Any, load_config: Any, ignore_missing: bool) -> None:
    """`check_fit` with what Transformers found; it would fill what is missing with random numbers."""
    mismatched = () if load_config.ignore_mismatched_sizes else info.mismatched_keys
    conversion = getattr(info, "conversion_errors", None) or {}
    check_fit(
        label,
        () if ignore_missing else missing_parameters(model, info.missing_keys),
        mismatched,
        [*info.error_msgs, *(f"{name} cannot be made of it." for name in conversion)],
    )


def _tensors_of_files(
    config: EmoConfig, state_dict: Any, files: list[str] | None, load_config: Any, loading: _WholeModel | None
) -> dict[str, LazyTensor] | None:
    """The parameters of a whole model, or `None` where its files are left to Transformers."""
    if state_dict is not None or not files or not all(file.endswith(".safetensors") for file in files):
        return None
    on_disk = "disk" in (load_config.device_map or {}).values()
    quantiser = load_config.hf_quantizer
    is_ours = quantiser is None or isinstance(quantiser, PackedQuantizer)
    if on_disk or not is_ours or not _has_our_mapping(load_config):
        return None
    if is_deepspeed_zero3_enabled():
        return None
    folder = Path(os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files]))
    names = [os.path.relpath(os.path.abspath(file), folder) for file in files]
    known = None if loading is None else loading.checkpoint
    if known is not None and not _is_of(known, folder, names):
        known = None
    try:
        checkpoint = known or Checkpoint.from_files(folder, names)
        if (
            isinstance(quantiser, PackedQuantizer)
            and quantiser.pre_quantized
            and not isinstance(checkpoint, PackedCheckpoint)
        ):
            checkpoint = PackedCheckpoint(checkpoint, quantiser.quantization_config)
        any_size = loading is not None and loading.ignore_mismatched
        return lazy_parameters(checkpoint, config, None, sizes_checked=known is not None or any_size)
    except CheckpointError:  # not of this very network: Transformers reports what is missing or different
        if quantiser is not None:
            raise
        return None


def _to_be_quantised(
    tensors: dict[str, Any], quantiser: PackedQuantizer, model: Any, load_config: Any
) -> dict[str, Any]:
    """The tensors, those that the quantiser packs wrapped for it."""
    if getattr(load_config, "device_mesh", None) is not None:
        raise ValueError(
            "Weights in few bits cannot be divided among processes: load the model without `tp_plan` and "
            "such, or without `quantization_config`."
        )
    if quantiser.pre_quantized:
        head = next((name for name in _names_of("lm_head.weight", model) if name in tensors), None)
        if model.config.tie_word_embeddings and isinstance(tensors.get(head or ""), LazyPacked):
            raise CheckpointError(
                "config.json ties the head to the embeddings, and the weights have a quantised head of its "
                "own: download both again."
            )
        return tensors
    packed = {
        key: QuantisedWhileRead(tensors[key], quantiser.quantization_config, key)
        for name in model.state_dict()
        if quantiser.quantization_config.converts(name)
        for key in _names_of(name, model)
        if key in tensors
    }
    for tensor in packed.values():
        quantiser.quantization_config.group_of(tensor.shape[-1])
    return tensors | packed


def _is_of(checkpoint: Checkpoint, folder: Path, names: list[str]) -> bool:
    """Whether a checkpoint was read from just these files."""
    source = checkpoint.source
    same_folder = isinstance(source, LocalFiles) and source.folder.absolute() == folder
    return same_folder and {span.file for span in checkpoint.tensors.values()} == set(names)


def _tensors_of_first_process(tensors: dict[str, LazyTensor]) -> dict[str, torch.Tensor]:
    """What ZeRO-3 shares out: the first process has all values, the others know dtypes and shapes."""
    reads = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    return {
        name: tensor[...] if reads else torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in tensors.items()
    }


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
