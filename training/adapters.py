"""LoRA adapters that know which experts they were trained on.

PEFT trains the router and the stacked experts through `target_parameters`. An adapter of stacked experts has
no expert ids of its own: loaded onto other experts of the same number, it would silently adapt the wrong
ones. So a file beside it, `expert_subset.json`, says which experts of the root model it belongs to.

Shape suffixes: E experts of a layer, K of them kept in the adapter's subset, r the rank, I what a matrix
takes and O what it gives.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from ..checkpoints.hub.names import HUB_KWARGS
from ..configuration import EmoConfig
from ..imports.optional_packages import import_optional
from ..modeling_emo import EmoPreTrainedModel
from ..modeling_emo.weight_names import SIZED_BY_EXPERTS
from ..subsets import ExpertSubset, SubsetError, present_experts
from ..subsets.library import RECORD
from ..subsets.loading.adapter_record import RECORD_KEY, check_record, read_record
from ..subsets.reduced_config import held_experts

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

# PEFT gives these to `hf_hub_download`, which takes no proxies.
_HUB_KWARGS = tuple(name for name in HUB_KWARGS if name != "proxies")
# Factors of the stacked experts (PEFT nests its wrappers: one per parameter) and of the router.
_EXPERT_FACTOR = re.compile(
    r".*\.layers\.(?P<layer>\d+)\.mlp\.(?P<part>experts|gate)(\.base_layer)*\.lora_(?P<factor>[AB])\.weight"
)


def lora_config(model: EmoPreTrainedModel, **kwargs) -> LoraConfig:
    """A PEFT `LoraConfig` whose adapter remembers the experts of `model`, whoever saves it.

    The config holds the experts that the model has now. So make one for each model, after its experts were
    chosen or swapped: `model.add_adapter`, `EmoTrainer` and `emo train` refuse a config of other experts.
    PEFT's `get_peft_model` cannot, as it does not show the model to the config. `save_adapter` always writes
    the experts that the model has.

    Args:
        model (`EmoPreTrainedModel`): the model to be adapted, full or a subset.
        kwargs: of `peft.LoraConfig`. What can be adapted: attention (`target_modules=["q_proj", "v_proj"]`,
            the default here; PEFT's own `LoraConfig` has none for mixtures of experts and refuses);
            the experts (`target_modules=["gate_proj", "up_proj", "down_proj"]`, or the stacked parameters by
            name, `target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]`); the router
            (`target_parameters=["mlp.gate.weight"]`). Stacked parameters take no `lora_dropout`. In every
            layer PEFT takes `gate_proj`, `up_proj` and `down_proj` for the experts'. To adapt dense layers,
            give `target_parameters=["mlp.gate_proj.weight", ...]`.

    Returns:
        `LoraConfig`: for `peft.get_peft_model`, or as `peft_config=` of TRL's trainers. TRL computes its own
            loss. It has no losses of document pools, and it adds another model's balance loss unless
            `router_aux_loss_coef=0.0`.

    Raises:
        ImportError: without PEFT.

    Example:

    ```python
    >>> from peft import get_peft_model
    >>> from transformers_emo import EmoForCausalLM
    >>> from transformers_emo.training import lora_config
    >>> model = EmoForCausalLM.from_pretrained("model_cards/toy-emo", expert_subset=[[0, 1, 2, 31]] * 4)
    >>> adapted = get_peft_model(model, lora_config(model, r=2, target_modules=["q_proj", "v_proj"]))
    >>> adapted.save_pretrained(tmp_path)
    >>> (tmp_path / "expert_subset.json").is_file()
    True

    ```
    """
    _require_peft()
    if kwargs.get("target_modules") is None and kwargs.get("target_parameters") is None:
        kwargs["target_modules"] = ["q_proj", "v_proj"]
    from .peft_config import SubsetLoraConfig  # this module needs PEFT, which is optional

    return SubsetLoraConfig(**kwargs, expert_subset=held_experts(model.config).to_dict())


def save_adapter(model: PeftModel, folder: str | os.PathLike, **kwargs) -> None:
    """Save an adapter with the experts that it was trained on, whichever config it was made with.

    `transformers_emo.subsets.push_folder(folder, "me/adapter")` then puts it on the Hub with its card. PEFT's
    `push_to_hub` uploads the experts too (with `lora_config`), but its card does not name them.

    Args:
        model (`peft.PeftModel`): the adapted model.
        folder (`str` or `os.PathLike`): the folder.
        kwargs: of `PeftModel.save_pretrained`.

    Raises:
        ImportError: without PEFT.
        TypeError: if the model is not one of PEFT's.

    Example:

    ```python
    >>> from peft import LoraConfig, get_peft_model
    >>> from transformers_emo import EmoForCausalLM
    >>> from transformers_emo.training import save_adapter
    >>> model = EmoForCausalLM.from_pretrained("model_cards/toy-emo", expert_subset=[[0, 1, 2, 31]] * 4)
    >>> adapted = get_peft_model(model, LoraConfig(r=2, target_parameters=["mlp.gate.weight"]))
    >>> save_adapter(adapted, tmp_path)
    >>> (tmp_path / "expert_subset.json").is_file()
    True

    ```
    """
    peft = _require_peft()
    if not isinstance(model, peft.PeftModel):
        raise TypeError(
            f"Expected a model that `peft.get_peft_model` made, got {type(model).__name__}: wrap it first, "
            "or save a whole model with its own `save_pretrained`."
        )
    model.save_pretrained(os.fspath(folder), **kwargs)
    subset = held_experts(model.get_base_model().config)
    for name in kwargs.get("selected_adapters") or model.peft_config:
        # PEFT's own layout: the default adapter in the folder itself, others in folders of their names.
        subset.save(Path(folder, RECORD) if name == "default" else Path(folder, name, RECORD))


def load_adapter(
    base: EmoPreTrainedModel,
    adapter: str | os.PathLike,
    *,
    trained_on: Any = None,
    is_trainable: bool = False,
    **kwargs,
) -> PeftModel:
    """Put a saved adapter on a model, after checking that it belongs to the model's experts.

    The model may hold more experts than the adapter was trained on: the full model, or a larger subset. The
    adapter is then expanded as by `expand_adapter`, and the other experts stay as they are. With
    `base.use_experts(subset)` the result computes what the subset with its adapter computes.

    `model.load_adapter(adapter)` and `AutoModelForCausalLM.from_pretrained(adapter)` refuse other experts
    too. Plain `PeftModel.from_pretrained(base, adapter)` and `AutoPeftModelForCausalLM` do not show the
    adapter's folder to the model. They refuse other experts, and more of them, if the adapter's config names
    its own: that of `lora_config`, and any of a subset with a `task_type`.

    Args:
        base (`EmoPreTrainedModel`): the model; adapted in place, as PEFT does.
        adapter (`str` or `os.PathLike`): the adapter's folder or Hub repository.
        trained_on (`ExpertSubset`, path, `dict` or list of lists, *optional*): the experts that the adapter
            was trained on, if it was saved without them.
        is_trainable (`bool`, defaults to `False`): whether the adapter is to be trained further.
        kwargs: of `PeftModel.from_pretrained`.

    Returns:
        `peft.PeftModel`: the adapted model.

    Raises:
        ImportError: without PEFT.
        SubsetError: if the adapter was trained on experts that the model does not hold, or if they are not
            known. It comes before anything is loaded.

    Example:

    ```python
    >>> from peft import get_peft_model
    >>> from transformers_emo import EmoForCausalLM, SubsetError
    >>> from transformers_emo.training import load_adapter, lora_config
    >>> def subset(ids):
    ...     return EmoForCausalLM.from_pretrained("model_cards/toy-emo", expert_subset=[ids] * 4)
    >>> model = subset([0, 1, 2, 31])
    >>> config = lora_config(model, r=2, target_parameters=["mlp.experts.down_proj"])
    >>> get_peft_model(model, config).save_pretrained(tmp_path)
    >>> adapted = load_adapter(subset([0, 1, 2, 31]), tmp_path)
    >>> try:
    ...     load_adapter(subset([0, 1, 7, 31]), tmp_path)
    ... except SubsetError as error:
    ...     print(error)  # doctest: +ELLIPSIS
    The adapter was trained on the experts [0, 1, 2, 31] in layer 0, and this model holds [0, 1, 7, 31]...
    >>> on_full = load_adapter(EmoForCausalLM.from_pretrained("model_cards/toy-emo"), tmp_path)

    ```
    """
    peft = _require_peft()
    subset = _subset_of_adapter(adapter, base.config, trained_on, kwargs)
    if subset.experts == held_experts(base.config).experts:
        return peft.PeftModel.from_pretrained(base, os.fspath(adapter), is_trainable=is_trainable, **kwargs)
    hub = {name: kwargs.pop(name) for name in _HUB_KWARGS if name in kwargs}
    with TemporaryDirectory() as folder:
        expand_adapter(adapter, base.config, folder, trained_on=subset, **hub)
        return peft.PeftModel.from_pretrained(base, folder, is_trainable=is_trainable, **kwargs)


def expand_adapter(
    adapter: str | os.PathLike, config: EmoConfig, folder: str | os.PathLike, *, trained_on: Any = None, **hub
) -> None:
    """Rewrite an adapter of a subset for a model that holds those experts and more.

    The factors of each expert, and its row of the router's factor, go to the place of this expert in the
    larger model. All other places get zeros, which change nothing. Factors of attention are copied.

    Args:
        adapter (`str` or `os.PathLike`): the adapter's folder or Hub repository.
        config (`EmoConfig`): the config of the larger model, mostly the full one.
        folder (`str` or `os.PathLike`): where the expanded adapter goes.
        trained_on (`ExpertSubset`, path, `dict` or list of lists, *optional*): as in `load_adapter`.
        hub: `cache_dir`, `force_download`, `local_files_only`, `revision`, `subfolder` or `token`, for a Hub
            repository.

    Raises:
        ImportError: without PEFT.
        SubsetError: if the model lacks some of the adapter's experts, or the adapter changes experts in
            another way than by LoRA on the stacked experts or the router.

    Example:

    ```python
    >>> from peft import get_peft_model
    >>> from transformers_emo import EmoConfig, EmoForCausalLM
    >>> from transformers_emo.training import expand_adapter, lora_config
    >>> full = EmoConfig.from_pretrained("model_cards/toy-emo")
    >>> model = EmoForCausalLM.from_pretrained("model_cards/toy-emo", expert_subset=[[0, 1, 2, 31]] * 4)
    >>> adapted = get_peft_model(model, lora_config(model, r=2, target_parameters=["mlp.gate.weight"]))
    >>> adapted.save_pretrained(tmp_path / "small")
    >>> expand_adapter(tmp_path / "small", full, tmp_path / "full")

    ```
    """
    peft = _require_peft()
    kept = _subset_of_adapter(adapter, config, trained_on, hub)
    present = present_experts(config)
    peft_config = peft.PeftConfig.from_pretrained(os.fspath(adapter), **hub)
    weights = peft.load_peft_weights(os.fspath(adapter), device="cpu", **hub)
    expanded = {}
    for name, tensor in weights.items():
        match = _EXPERT_FACTOR.fullmatch(name)
        if match is None and SIZED_BY_EXPERTS.fullmatch(name):
            raise SubsetError(
                f"{name} of the adapter cannot be expanded to other experts: only LoRA on stacked experts "
                "and on the router can (`target_parameters`). Merge the adapter into the subset that it was "
                "trained on."
            )
        if match is not None:
            layer = int(match["layer"])
            place = {root: index for index, root in enumerate(present[layer])}
            ids = torch.tensor([place[root] for root in kept.experts[layer] or []])
            spread = _spread_router if match["part"] == "gate" else _spread_experts
            tensor = spread(tensor, match["factor"], ids, len(place))
        expanded[name] = tensor
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(expanded, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    held_experts(config).save(folder / RECORD)
    if RECORD_KEY in (peft_config.auto_mapping or {}):
        peft_config.auto_mapping[RECORD_KEY] = held_experts(config).to_dict()
    peft_config.save_pretrained(os.fspath(folder))


def _spread_experts(tensor: torch.Tensor, factor: str, ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """PEFT flattens `lora_A` (K, r, I) to (K * r, I), but `lora_B` (O, r, K), experts last, to (O, r * K)."""
    if factor == "A":
        tensor_KrI = tensor.reshape(len(ids), -1, tensor.shape[-1])
        expanded_ErI = tensor.new_zeros(num_experts, *tensor_KrI.shape[1:])
        return expanded_ErI.index_copy_(0, ids, tensor_KrI).flatten(0, 1)
    tensor_OrK = tensor.reshape(tensor.shape[0], -1, len(ids))
    expanded_OrE = tensor.new_zeros(*tensor_OrK.shape[:2], num_experts)
    return expanded_OrE.index_copy_(2, ids, tensor_OrK).flatten(1, 2)


def _spread_router(tensor: torch.Tensor, factor: str, ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """The router's `lora_A` (r, D) serves all experts, and its `lora_B` (K, r) has a row for each."""
    if factor == "A":
        return tensor
    return tensor.new_zeros(num_experts, tensor.shape[1]).index_copy_(0, ids, tensor)


def _subset_of_adapter(
    adapter: str | os.PathLike, config: EmoConfig, trained_on: Any, kwargs: dict[str, Any]
) -> ExpertSubset:
    """The adapter's experts, checked against those of the model it is meant for."""
    subset = None if trained_on is None else ExpertSubset.of(trained_on)
    if subset is None:
        subset = read_record(adapter, **{name: kwargs[name] for name in _HUB_KWARGS if name in kwargs})
    if subset is None:
        here = held_experts(config)
        if config.retained_experts is None:  # an adapter of the full model, as anyone's PEFT saves it
            return here
        raise SubsetError(
            f"The adapter {os.fspath(adapter)!r} has no {RECORD}: the experts that it was trained on are not "
            f"known, and this model holds a subset ({_first_layer(here)}). Give them as `trained_on=`."
        )
    check_record(subset, config)
    return subset


def _first_layer(subset: ExpertSubset) -> str:
    layer, ids = next((index, ids) for index, ids in enumerate(subset.experts) if ids)
    return f"{ids} in layer {layer}"


def _require_peft() -> Any:
    return import_optional("peft", "Adapters need")
