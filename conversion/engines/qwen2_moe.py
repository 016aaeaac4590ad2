"""An EMO as a Qwen2-MoE, which every engine knows.

Qwen2-MoE has a shared expert too, weighed by a sigmoid of its own. An EMO's has weight 1. So the sigmoid is
held at exactly 0.5, by a gate so small that its logit is lost in rounding, and the last matrix of the shared
expert is doubled. Both are powers of two: nothing is rounded. The gate must not be all zeros: llama.cpp
divides by it.

Qwen2-MoE's other differences are biases on queries, keys and values (zeros here) and the names of norms. The
layout: `Qwen2MoeForCausalLM` of Transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...checkpoints.lazy_tensor import LazyTensor
from ...configuration import EmoConfig
from .backbone import (
    attention_tensors,
    common_config,
    dense_tensors,
    embeddings,
    head_tensors,
    routed_experts,
    router,
    shared_expert,
)
from .export_tensor import ExportTensor
from .routing_shape import RoutingShape

GATE = 2.0**-100
"""The one number of the shared expert's gate that is not zero. It is too small for float16."""


def qwen2_moe_config(config: EmoConfig, shape: RoutingShape) -> dict[str, Any]:
    """The `config.json` of an EMO as a Qwen2-MoE.

    Args:
        config (`EmoConfig`): the config of the model.
        shape (`RoutingShape`): its experts.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.conversion.engines.qwen2_moe import qwen2_moe_config
    >>> from transformers_emo.conversion.engines.routing_shape import routing_shape
    >>> config = EmoConfig(num_hidden_layers=2)
    >>> content = qwen2_moe_config(config, routing_shape(config, "qwen2-moe", []))
    >>> content["model_type"], content["num_experts"], content["shared_expert_intermediate_size"]
    ('qwen2_moe', 127, 1024)

    ```
    """
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        **common_config(config, shape),
        "num_experts": shape.routed,
        "shared_expert_intermediate_size": config.intermediate_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(shape.dense),
        "qkv_bias": True,
        "use_sliding_window": False,
        "output_router_logits": False,
        "router_aux_loss_coef": config.router_aux_loss_coef,
    }


def qwen2_moe_tensors(
    config: EmoConfig, shape: RoutingShape, tensors: Mapping[str, LazyTensor]
) -> Iterator[ExportTensor]:
    """The tensors of an EMO as those of a Qwen2-MoE, in the order in which they are needed.

    Args:
        config (`EmoConfig`): the config of the model.
        shape (`RoutingShape`): its experts.
        tensors (`Mapping[str, LazyTensor]`): the model's, from `released_tensors`.

    Example:

    ```python
    >>> from transformers_emo.conversion.engines.qwen2_moe import qwen2_moe_tensors
    >>> from transformers_emo.conversion.engines.routing_shape import routing_shape
    >>> from transformers_emo.subsets.loading.model_source import ModelSource
    >>> from transformers_emo.subsets.rewriting.expert_tensors import released_tensors
    >>> with ModelSource.open("model_cards/toy-emo") as source:
    ...     tensors = released_tensors(source.parameters())
    ...     shape = routing_shape(source.config, "qwen2-moe", [])
    ...     names = [tensor.name for tensor in qwen2_moe_tensors(source.config, shape, tensors)]
    >>> names[-1], "model.layers.3.mlp.shared_expert.up_proj.weight" in names
    ('lm_head.weight', True)

    ```
    """
    yield embeddings(tensors)
    for layer in range(shape.layers):
        yield from attention_tensors(tensors, layer, biases=True)
        if layer in shape.dense:
            yield from dense_tensors(tensors, layer)
            continue
        mlp = f"model.layers.{layer}.mlp"
        yield router(tensors, layer, shape.routed)
        yield from routed_experts(tensors, layer, shape)
        gate = (1, config.hidden_size)
        yield ExportTensor(f"{mlp}.shared_expert_gate.weight", gate, values=(GATE,), role="vector")
        for part, tensor in shared_expert(tensors, layer, shape, down=2.0).items():
            yield tensor.renamed(f"{mlp}.shared_expert.{part}_proj.weight")
    yield from head_tensors(tensors)
