"""Whether config and weights belong together, and whether all weights are there.

A damaged or hostile `config.json` may ask for a billion tokens or layers. So sizes are checked before the
network is built: otherwise all would be allocated and filled at random first, and the error would come late.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ...checkpoints.errors import CheckpointError
from ...checkpoints.lazy_tensor import LazyTensor
from ...checkpoints.safetensors_header import TensorSpan
from ...configuration import EmoConfig, LayerExperts
from ...modeling_emo import EmoModel
from ...modeling_emo.weight_names import IN_LAYER, STACKED_EXPERTS


class MisfitError(CheckpointError, RuntimeError):
    """Weights do not fit the network; also a `RuntimeError`, which Transformers raises for it.

    Example:

    ```python
    >>> from transformers_emo import EmoForCausalLM
    >>> try:
    ...     EmoForCausalLM.from_pretrained("model_cards/toy-emo", vocab_size=500)
    ... except RuntimeError as error:
    ...     print(str(error)[:44])
    model_cards/toy-emo does not fit its config:

    ```
    """


def check_sizes(
    tensors: Mapping[str, TensorSpan], config: EmoConfig, *, ignore_missing: bool = False
) -> None:
    """Check that a config asks for no more layers and no larger tensors than the weights hold.

    Weights that are integers are refused too: as numbers of a network they make no sense. Smaller and missing
    tensors are another matter: see `check_fit`.

    Args:
        tensors (`Mapping[str, TensorSpan]`): the weights, from their headers.
        config (`EmoConfig`): the config of the network.
        ignore_missing (`bool`, defaults to `False`): the config may ask for more layers.

    Raises:
        CheckpointError: if it does.

    Example:

    ```python
    >>> from transformers_emo import CheckpointError, EmoConfig
    >>> from transformers_emo.checkpoints import Checkpoint
    >>> from transformers_emo.subsets.loading.weights_check import check_sizes
    >>> config = EmoConfig.from_pretrained("model_cards/toy-emo", vocab_size=10**9)
    >>> try:
    ...     check_sizes(Checkpoint.from_folder("model_cards/toy-emo").tensors, config)
    ... except CheckpointError as error:
    ...     print(str(error)[:86])
    config.json asks for a model.embed_tokens.weight of (1000000000, 128), and the weights

    ```
    """
    shapes = [_shapes_in_layer(config, experts) for experts in config.layer_experts]
    layers = set()
    for name, span in tensors.items():
        expected = None
        if match := IN_LAYER.fullmatch(name):
            layers.add(int(match["layer"]))
            if int(match["layer"]) < len(shapes):
                expected = shapes[int(match["layer"])].get(match["part"])
        elif name.endswith("embed_tokens.weight"):
            expected = (config.vocab_size, config.hidden_size)
        is_weight = name.endswith(".weight") or STACKED_EXPERTS.fullmatch(name)
        if is_weight and not span.dtype.is_floating_point:
            raise CheckpointError(
                f"{name} holds {span.dtype}, expected floating point numbers: the weights are quantised, and "
                "config.json does not say how, or they are damaged. Download both again."
            )
        if expected is not None and math.prod(expected) > math.prod(span.shape):
            raise CheckpointError(
                f"config.json asks for a {name} of {expected}, and the weights hold {span.shape}: they "
                "differ. Download both again, or pass `ignore_mismatched_sizes=True` if it is meant."
            )
    if layers and len(layers) < config.num_hidden_layers and not ignore_missing:
        raise CheckpointError(
            f"config.json asks for {config.num_hidden_layers} layers, and the weights hold {len(layers)}: "
            "they differ. Download both again, or pass `ignore_missing_keys=True` if new layers are meant."
        )


def _shapes_in_layer(config: EmoConfig, experts: LayerExperts) -> dict[str, tuple[int, ...]]:
    """Shapes of what a layer has, by its names on disk."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    shapes: dict[str, tuple[int, ...]] = {
        "pre_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (heads * head, hidden),
        "self_attn.k_proj.weight": ((config.num_key_value_heads or heads) * head, hidden),
    }
    if experts.is_dense:
        return shapes | {"mlp.gate_proj.weight": (config.dense_intermediate_size or 0, hidden)}
    return shapes | {
        "mlp.gate.weight": (experts.num_experts, hidden),
        "mlp.experts.0.gate_proj.weight": (config.intermediate_size, hidden),
        "mlp.experts.down_proj": (experts.num_experts, hidden, config.intermediate_size),
    }


def check_whole(parameters: Mapping[str, LazyTensor], config: EmoConfig, label: str) -> None:
    """Check that every parameter of the network is there, in its shape.

    Transformers would fill a missing one with random numbers. A model that is copied must be complete.

    Args:
        parameters (`Mapping[str, LazyTensor]`): from `lazy_parameters`, with all experts or some.
        config (`EmoConfig`): the config of the model with those experts.
        label (`str`): what the model is called in messages.

    Raises:
        CheckpointError: if one is missing or of another shape.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.checkpoints import Checkpoint
    >>> from transformers_emo.subsets.loading.weights_check import check_whole
    >>> from transformers_emo.subsets.loading.wanted_tensors import lazy_parameters
    >>> toy = "model_cards/toy-emo"
    >>> config = EmoConfig.from_pretrained(toy)
    >>> check_whole(lazy_parameters(Checkpoint.from_folder(toy), config, None), config, toy)

    ```
    """
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in EmoModel(config).state_dict().items()}
    if "EmoForCausalLM" in (config.architectures or []) and not config.tie_word_embeddings:
        expected["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    there = {name.removeprefix("model."): tensor.shape for name, tensor in parameters.items()}
    for name, shape in expected.items():
        if name not in there:
            raise CheckpointError(
                f"{label} lacks the tensor {name}, which its config asks for: download it again."
            )
        if there[name] != shape:
            raise CheckpointError(
                f"{name} of {label} has shape {list(there[name])}, expected {list(shape)} by its config."
            )


def missing_parameters(model: Any, names: Iterable[str]) -> set[str]:
    """Parameters of a network that weights lack and that would be random numbers.

    Tied ones are not missing while one of them is there, and neither is a head that the saved model did not
    have: a classifier on a language model is meant to be new.

    Args:
        model (`EmoPreTrainedModel`): the network.
        names (`Iterable[str]`): the names of its parameters and buffers that the weights lack.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig, EmoForCausalLM
    >>> from transformers_emo.subsets.loading.weights_check import missing_parameters
    >>> model = EmoForCausalLM.from_pretrained("model_cards/toy-emo")
    >>> missing_parameters(model, ["lm_head.weight", "model.norm.weight"]) == {
    ...     "lm_head.weight", "model.norm.weight"
    ... }
    True

    ```
    """
    missing = set(names)
    for one, other in getattr(model, "all_tied_weights_keys", {}).items():
        if not {one, other} <= missing:
            missing -= {one, other}
    expected = model._keys_to_ignore_on_load_missing or ()
    missing = {name for name in missing if not any(re.search(pattern, name) for pattern in expected)}
    base = model.base_model_prefix
    heads = {name.split(".")[0] for name in missing} if hasattr(model, base) else set()
    for head in heads - {base}:
        of_head = {name for name in model.state_dict() if name.split(".")[0] == head}
        if of_head <= missing and not _was_saved_with(head, model):
            missing -= of_head
    return missing


def _was_saved_with(head: str, model: Any) -> bool:
    """Whether the saved model had such a head, by the class that its config names."""
    classes = model.config.architectures or []
    if head == "lm_head":
        return not classes or "EmoForCausalLM" in classes
    kinds = type(model).__mro__ if head == "score" else (type(model),)
    return any(kind.__name__ in classes for kind in kinds)


def check_fit(label: str, missing: Iterable[str], mismatched: Iterable[Any] = (), errors: Any = ()) -> None:
    """Check that weights have filled a network.

    Args:
        label (`str`): what the model is called in messages.
        missing (`Iterable[str]`): the names of parameters that were not there.
        mismatched (`Iterable`): the names of parameters of another shape, with both shapes.
        errors (`Iterable[str]`): what went wrong besides.

    Raises:
        CheckpointError: if a parameter is missing.
        MisfitError: if one has another shape, or could not be made of the weights.

    Example:

    ```python
    >>> from transformers_emo import CheckpointError
    >>> from transformers_emo.subsets.loading.weights_check import check_fit
    >>> try:
    ...     check_fit("my-model", ["model.norm.weight"])
    ... except CheckpointError as error:
    ...     print(str(error)[:79])
    my-model lacks a tensor that the model needs: model.norm.weight. It would be ra

    ```
    """
    for name, found, expected in sorted(mismatched, key=str):
        raise MisfitError(
            f"{label} does not fit its config: {name} has a size mismatch, {tuple(found)} in the weights and "
            f"{tuple(expected)} by config.json. Download both again, or pass `ignore_mismatched_sizes=True` "
            "if it is meant: the tensor is then made anew."
        )
    for error in errors:
        raise MisfitError(
            f"{label} does not fit its config: {error} Download the weights and config.json again."
        )
    names = sorted(missing)
    if names:
        lacking, they = ("a tensor", "It") if len(names) == 1 else (f"{len(names)} tensors", "They")
        raise CheckpointError(
            f"{label} lacks {lacking} that the model needs: {', '.join(names[:5])}"
            f"{', ...' if len(names) > 5 else ''}. {they} would be random numbers. Download the model again, "
            "or pass `ignore_missing_keys=True` if new ones are meant."
        )


def check_finite(
    label: str, tensors: Iterable[tuple[str, torch.Tensor]], experts: Mapping[int, list[int]]
) -> None:
    """Check that no weight is NaN or infinite.

    Args:
        label (`str`): what the model is called in messages.
        tensors (`Iterable[tuple[str, torch.Tensor]]`): weights, by the network's names.
        experts (`Mapping[int, list[int]]`): by layer, the ids of the experts that are stacked in its tensors.

    Raises:
        CheckpointError: if one is. It names the first tensors, an expert's as on disk, in the numbering of
            the root model.
        ValueError: if a tensor is not in memory.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import CheckpointError
    >>> from transformers_emo.subsets.loading.weights_check import check_finite
    >>> try:
    ...     check_finite("my-model", [("model.norm.weight", torch.tensor([1, float("nan")]))], {})
    ... except CheckpointError as error:
    ...     print(str(error)[:67])
    my-model holds numbers that are none: model.norm.weight (1 NaN, 0 i

    ```
    """
    found = []
    for name, tensor in tensors:
        for part, values in _named_parts(name, tensor, experts):
            numbers = _plain_numbers(part, values)
            bad = [n for n in numbers if not torch.isfinite(n).all()]
            if bad:
                nans = sum(int(n.isnan().sum()) for n in bad)
                infinite = sum(int(n.isinf().sum()) for n in bad)
                found.append(f"{part} ({nans} NaN, {infinite} infinite)")
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise CheckpointError(
            f"{label} holds numbers that are none: {', '.join(found[:5])}{more}. Download the model again. "
            "If they are in the original too, leave these experts out, or train it again."
        )


def _named_parts(
    name: str, tensor: torch.Tensor, experts: Mapping[int, list[int]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The matrices of single experts under the names that they have on disk, and other tensors whole."""
    match = STACKED_EXPERTS.fullmatch(name)
    if match is None or type(tensor.data) is not torch.Tensor or tensor.dim() != 3:
        yield name, tensor
        return
    ids = experts[int(match["layer"])]
    parts = ("gate", "up") if match["kind"] == "gate_up" else ("down",)
    for expert, matrix in zip(ids, tensor, strict=True):
        for part, half in zip(parts, matrix.chunk(len(parts)), strict=True):
            yield f"{match['experts']}.{expert}.{part}_proj.weight", half


def _plain_numbers(name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
    """The floating point numbers that a tensor is made of: of a quantised one mostly its scales."""
    if tensor.is_meta:
        raise ValueError(
            f"`check_weights=True` cannot read {name}, which is not in memory: load the model without "
            "offloading it to the disk."
        )
    data = tensor.detach()
    if hasattr(data, "__tensor_flatten__"):
        inner = [getattr(data, each) for each in data.__tensor_flatten__()[0]]
        return [part for each in inner for part in _plain_numbers(name, each)]
    if not data.is_floating_point():
        return []
    return [data.float() if data.element_size() == 1 else data]
