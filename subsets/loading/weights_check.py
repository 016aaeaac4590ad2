"""Whether a network would be larger than the weights it is loaded from: known before it is built.

A damaged or hostile `config.json` may ask for a billion tokens or layers. What the weights do not hold would
be allocated and filled at random before anyone is told.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.errors import CheckpointError
from ...checkpoints.lazy_tensor import LazyTensor
from ...checkpoints.safetensors_header import TensorSpan
from ...checkpoints.side_files import optional_file
from ...configuration import EmoConfig, LayerExperts
from ...modeling_emo import EmoModel

_IN_LAYER = re.compile(r"(?:.*\.)?layers\.(?P<layer>\d+)\.(?P<part>.+)")
# With these, weights are of another form than the network's own, or the user has asked for other sizes.
_OTHER_FORMS = ("state_dict", "gguf_file", "key_mapping", "ignore_mismatched_sizes")
_FILE_KWARGS = ("cache_dir", "revision", "subfolder", "variant")

# Where the weights of the whole model in loading are: from `from_pretrained` to the network's constructor.
_loading: ContextVar[dict[str, Any] | None] = ContextVar("loading", default=None)


def check_sizes(tensors: Mapping[str, TensorSpan], config: EmoConfig) -> None:
    """See that a config asks for no more layers and no larger tensors than the weights hold.

    Smaller ones, and tensors that are not there, are left to Transformers, which names them.

    Args:
        tensors (`Mapping[str, TensorSpan]`): the weights, from their headers.
        config (`EmoConfig`): the config of the network.

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
        if match := _IN_LAYER.fullmatch(name):
            layers.add(int(match["layer"]))
            if int(match["layer"]) < len(shapes):
                expected = shapes[int(match["layer"])].get(match["part"])
        elif name.endswith("embed_tokens.weight"):
            expected = (config.vocab_size, config.hidden_size)
        if expected is not None and math.prod(expected) > math.prod(span.shape):
            raise CheckpointError(
                f"config.json asks for a {name} of {expected}, and the weights hold {span.shape}: they "
                "differ. Download both again, or pass `ignore_mismatched_sizes=True` if it is meant."
            )
    if layers and len(layers) < config.num_hidden_layers:
        raise CheckpointError(
            f"config.json asks for {config.num_hidden_layers} layers, and the weights hold {len(layers)}: "
            "they differ. Download both again, or pass `ignore_mismatched_sizes=True` if it is meant."
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


@contextmanager
def weights_known(kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Let `check_before_building` know where the weights of the model in loading are.

    Args:
        kwargs (`Mapping[str, Any]`): of `from_pretrained`.

    Example: see `EmoPreTrainedModel.from_pretrained`.
    """
    other = any(kwargs.get(name) for name in _OTHER_FORMS) or kwargs.get("use_safetensors") is False
    token = _loading.set(None if other else {name: kwargs.get(name) for name in _FILE_KWARGS})
    try:
        yield
    finally:
        _loading.reset(token)


def check_before_building(config: EmoConfig) -> None:
    """`check_sizes` with the weights of the model in loading, once Transformers has found or downloaded them.

    Weights that are quantised or no safetensors files are left to Transformers, and so is a network that is
    not being loaded.

    Args:
        config (`EmoConfig`): the config of the network to be built.

    Raises:
        CheckpointError: as `check_sizes`.

    Example: see `EmoPreTrainedModel.from_pretrained`.
    """
    where = _loading.get()
    if where is None or not config.name_or_path or getattr(config, "quantization_config", None) is not None:
        return
    _loading.set(None)  # a network inside this one is checked with it
    variant = where.pop("variant")
    hub = {name: value for name, value in where.items() if value is not None} | {"local_files_only": True}
    infix = "" if variant is None else f".{variant}"
    names = (
        SAFE_WEIGHTS_NAME.replace(".safetensors", f"{infix}.safetensors"),
        SAFE_WEIGHTS_INDEX_NAME.replace(".index", f".index{infix}"),
    )
    found = next(filter(None, (optional_file(config.name_or_path, name, **hub) for name in names)), None)
    if found is None:
        return
    try:
        checkpoint = Checkpoint.from_folder(os.path.dirname(found), variant=variant)
    except CheckpointError:  # Transformers says what is wrong with the files
        return
    checkpoint.source.close()
    check_sizes(checkpoint.tensors, config)


def check_whole(parameters: Mapping[str, LazyTensor], config: EmoConfig, label: str) -> None:
    """See that every parameter of the network is there in its shape.

    Transformers would fill what is missing with random numbers: a model that is copied must have it all.

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
