"""Whether config and weights belong together, checked before the network is built.

A damaged or hostile `config.json` may ask for a billion tokens or layers. Without the check they would be
allocated and filled at random first, and the error would come late.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ...checkpoints.errors import CheckpointError
from ...checkpoints.lazy_tensor import LazyTensor
from ...checkpoints.safetensors_header import TensorSpan
from ...configuration import EmoConfig, LayerExperts
from ...modeling_emo import EmoModel
from ...modeling_emo.weight_names import IN_LAYER


def check_sizes(tensors: Mapping[str, TensorSpan], config: EmoConfig) -> None:
    """Check that a config asks for no more layers and no larger tensors than the weights hold.

    Smaller and missing tensors are left to Transformers, which names them.

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
        if match := IN_LAYER.fullmatch(name):
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
