"""What the layouts of other engines have in common: the tensors beside the experts, and their config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...checkpoints.lazy_tensor import LazyTensor
from ...configuration import EmoConfig
from .export_tensor import ExportTensor
from .routing_shape import RoutingShape

SAME_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "attention_dropout",
    "norm_topk_prob",
    "rope_theta",
    "rope_scaling",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
)
"""What goes by the same name in an EMO's `config.json` and in an export's."""
OWN_SETTINGS = (
    "num_experts",
    "num_experts_per_tok",
    "num_shared_experts",
    "num_experts_per_layer",
    "num_shared_experts_per_layer",
    "always_active_experts",
    "always_active_experts_per_layer",
    "retained_experts",
    "root_experts_per_layer",
    "document_pool_min",
    "document_pool_max",
    "document_pool_eval",
    "document_boundaries",
    "attention_within_documents",
    "balance_loss_coef",
    "router_z_loss_coef",
    "lm_z_loss_coef",
    "router_aux_loss_coef",
    "tie_word_embeddings",
    "attention_bias",
)
"""What an EMO has that the other layouts cannot say. It is kept under `emo` in their `config.json`."""
PARTS = ("gate", "up", "down")
"""The matrices of an expert."""


def common_config(config: EmoConfig, shape: RoutingShape) -> dict[str, Any]:
    """The settings that an export's `config.json` has in every layout. Those that are `None` are left out.

    Args:
        config (`EmoConfig`): the config of the model that is exported.
        shape (`RoutingShape`): its experts.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.conversion.engines.backbone import common_config
    >>> from transformers_emo.conversion.engines.routing_shape import routing_shape
    >>> config = EmoConfig(num_hidden_layers=2)
    >>> common_config(config, routing_shape(config, "qwen2-moe", []))["num_experts_per_tok"]
    7

    ```
    """
    content = config.to_dict()
    kept = {name: content[name] for name in SAME_KEYS if content.get(name) is not None}
    # Scaling goes by `rope_type` alone. MLX asks for `type` too, and would then leave it out of its sums.
    return kept | {
        "num_experts_per_tok": shape.picked,
        "moe_intermediate_size": config.intermediate_size,
        "intermediate_size": config.dense_intermediate_size or config.intermediate_size,
        "tie_word_embeddings": False,  # MLX takes no other
        "emo": {name: content[name] for name in OWN_SETTINGS if content.get(name) is not None},
    }


def embeddings(tensors: Mapping[str, LazyTensor]) -> ExportTensor:
    """The embeddings of tokens.

    Args:
        tensors (`Mapping[str, LazyTensor]`): the model's, from `released_tensors`.

    Example: see `attention_tensors`.
    """
    return whole("model.embed_tokens.weight", tensors["model.embed_tokens.weight"])


def head_tensors(tensors: Mapping[str, LazyTensor]) -> Iterator[ExportTensor]:
    """The last norm and the language-model head, which is written even if it is that of the embeddings.

    Args:
        tensors (`Mapping[str, LazyTensor]`): the model's, from `released_tensors`.

    Example: see `attention_tensors`.
    """
    yield whole("model.norm.weight", tensors["model.norm.weight"], role="vector")
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    yield whole("lm_head.weight", head)


def attention_tensors(
    tensors: Mapping[str, LazyTensor], layer: int, *, biases: bool = False
) -> Iterator[ExportTensor]:
    """The norms and the attention of a layer, under the names that Llama and its kin give them.

    Args:
        tensors (`Mapping[str, LazyTensor]`): the model's, from `released_tensors`.
        layer (`int`): the layer.
        biases (`bool`, defaults to `False`): with biases of queries, keys and values: zeros if the model has
            none.

    Example:

    ```python
    >>> from transformers_emo.conversion.engines.backbone import attention_tensors
    >>> from transformers_emo.subsets.loading.model_source import ModelSource
    >>> with ModelSource.open("model_cards/toy-emo") as source:
    ...     [tensor.name for tensor in attention_tensors(source.parameters(), 0)][:2]
    ['model.layers.0.input_layernorm.weight', 'model.layers.0.self_attn.q_proj.weight']

    ```
    """
    before = f"model.layers.{layer}"
    norm = tensors[f"{before}.pre_attention_layernorm.weight"]
    yield whole(f"{before}.input_layernorm.weight", norm, role="vector")
    for part in "qkvo":
        name = f"{before}.self_attn.{part}_proj.weight"
        yield whole(name, tensors[name])
        if biases and part != "o":
            bias = f"{before}.self_attn.{part}_proj.bias"
            parts = (tensors[bias],) if bias in tensors else ()
            yield ExportTensor(bias, tensors[name].shape[:1], parts, role="vector")
    norm = tensors[f"{before}.pre_feedforward_layernorm.weight"]
    yield whole(f"{before}.post_attention_layernorm.weight", norm, role="vector")


def dense_tensors(tensors: Mapping[str, LazyTensor], layer: int) -> Iterator[ExportTensor]:
    """The feed-forward network of a dense layer.

    Args:
        tensors (`Mapping[str, LazyTensor]`): the model's, from `released_tensors`.
        layer (`int`): the layer.

    Example: see `attention_tensors`.
    """
    for part in PARTS:
        name = f"model.layers.{layer}.mlp.{part}_proj.weight"
        yield whole(name, tensors[name])


def router(tensors: Mapping[str, LazyTensor], layer: int, routed: int) -> ExportTensor:
    """The rows of a layer's router that belong to routed experts, which are the first ones.

    Args:
        tensors (`Mapping[str, LazyTensor]`): the model's, from `released_tensors`.
        layer (`int`): the layer.
        routed (`int`): how many routed experts there are.

    Example: see `attention_tensors`.
    """
    name = f"model.layers.{layer}.mlp.gate.weight"
    return whole(name, tensors[name].take(range(routed)), role="router")


def routed_experts(
    tensors: Mapping[str, LazyTensor], layer: int, shape: RoutingShape
) -> Iterator[ExportTensor]:
    """The matrices of a layer's routed experts, one after the other.

    Args:
        tensors (`Mapping[str, LazyTensor]`): the model's, from `released_tensors`.
        layer (`int`): the layer.
        shape (`RoutingShape`): the model's experts.

    Example: see `attention_tensors`.
    """
    for expert in range(shape.routed):
        for part in PARTS:
            name = f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
            yield whole(name, tensors[name])


def shared_expert(
    tensors: Mapping[str, LazyTensor], layer: int, shape: RoutingShape, *, down: float = 1.0
) -> dict[str, ExportTensor]:
    """The matrices of a layer's shared expert, by part; of zeros if there is none, for engines that want one.

    Args:
        tensors (`Mapping[str, LazyTensor]`): the model's, from `released_tensors`.
        layer (`int`): the layer.
        shape (`RoutingShape`): the model's experts.
        down (`float`, defaults to 1.0): what the last matrix is multiplied by, a power of two.

    Example: see `attention_tensors`.
    """
    experts = f"model.layers.{layer}.mlp.experts"
    found = {}
    for part in PARTS:
        like = tensors[f"{experts}.0.{part}_proj.weight"]
        parts = (tensors[f"{experts}.{shape.routed}.{part}_proj.weight"],) if shape.shared else ()
        found[part] = ExportTensor(part, like.shape, parts, factor=down if part == "down" else 1.0)
    return found


def whole(name: str, tensor: LazyTensor, role: str = "weight") -> ExportTensor:
    """A tensor of the model as it is, under another name.

    Args:
        name (`str`): the name.
        tensor (`LazyTensor`): the tensor.
        role (`str`, defaults to `"weight"`): as in `ExportTensor`.

    Example: see `attention_tensors`.
    """
    return ExportTensor(name, tensor.shape, (tensor,), role=role)
