"""An EMO as a DeepSeek-MoE of the first kind (https://arxiv.org/abs/2401.06066), which has shared experts.

It is not in Transformers: vLLM, MLX and llama.cpp know it. It holds what Qwen2-MoE does not: dense layers
first (MLX, llama.cpp), and experts that every token takes (vLLM alone: a large correction of their scores
has them picked, and their weight is that of the softmax, without it).
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

CORRECTION = 10.0
"""Added to the score, at most 1, of an expert that every token takes."""


CONFIG_CODE = "configuration_deepseek.py"
"""The file that tells vLLM's Transformers about the config: `--trust-remote-code` lets it read that."""
CONFIG_TEXT = '''"""The config of a DeepSeek-MoE (v1), which Transformers does not know."""

from transformers import PretrainedConfig


class DeepseekConfig(PretrainedConfig):
    model_type = "deepseek"
    n_shared_experts = None
'''


def deepseek_config(config: EmoConfig, shape: RoutingShape) -> dict[str, Any]:
    """The `config.json` of an EMO as a DeepSeek-MoE.

    Args:
        config (`EmoConfig`): the config of the model.
        shape (`RoutingShape`): its experts.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.conversion.engines.deepseek import deepseek_config
    >>> from transformers_emo.conversion.engines.routing_shape import routing_shape
    >>> config = EmoConfig(num_hidden_layers=2)
    >>> content = deepseek_config(config, routing_shape(config, "deepseek", []))
    >>> content["model_type"], content["n_routed_experts"], content["n_shared_experts"]
    ('deepseek', 127, 1)

    ```
    """
    content = {
        "architectures": ["DeepseekForCausalLM"],
        "model_type": "deepseek",
        "auto_map": {"AutoConfig": f"{CONFIG_CODE.removesuffix('.py')}.DeepseekConfig"},
        **common_config(config, shape),
        "n_routed_experts": shape.routed,
        "first_k_dense_replace": len(shape.dense),
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
        "routed_scaling_factor": 1.0,
    }
    if shape.shared:
        content["n_shared_experts"] = 1
    if shape.always:
        content |= {"topk_method": "noaux_tc", "n_group": 1, "topk_group": 1}
    return content


def deepseek_tensors(
    config: EmoConfig, shape: RoutingShape, tensors: Mapping[str, LazyTensor]
) -> Iterator[ExportTensor]:
    """The tensors of an EMO as those of a DeepSeek-MoE, in the order in which they are needed.

    Args:
        config (`EmoConfig`): the config of the model.
        shape (`RoutingShape`): its experts.
        tensors (`Mapping[str, LazyTensor]`): the model's, from `released_tensors`.

    Example: see `qwen2_moe_tensors`.
    """
    yield embeddings(tensors)
    for layer in range(shape.layers):
        yield from attention_tensors(tensors, layer)
        if layer in shape.dense:
            yield from dense_tensors(tensors, layer)
            continue
        mlp = f"model.layers.{layer}.mlp"
        yield router(tensors, layer, shape.routed)
        if shape.always:
            yield ExportTensor(
                f"{mlp}.gate.e_score_correction_bias",
                (shape.routed,),
                values=tuple(CORRECTION if e in shape.always else 0.0 for e in range(shape.routed)),
                role="vector",
            )
        yield from routed_experts(tensors, layer, shape)
        if shape.shared:
            for part, tensor in shared_expert(tensors, layer, shape).items():
                yield tensor.renamed(f"{mlp}.shared_experts.{part}_proj.weight")
    yield from head_tensors(tensors)
