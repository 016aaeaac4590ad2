"""Which EMO models other engines compute exactly, and why not the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...configuration import EmoConfig, LayerExperts

LAYOUTS = ("qwen2-moe", "deepseek", "gguf")
"""The layouts that a model can be exported to."""
_ROPE_TYPES = {
    "qwen2-moe": ("default", "linear", "yarn", "llama3"),
    "deepseek": ("default", "linear"),
    "gguf": ("default", "linear"),
}


@dataclass(frozen=True)
class RoutingShape:
    """What all sparse layers of an exportable model have in common.

    Args:
        routed (`int`): routed experts of a layer, R; 0 if all layers are dense.
        picked (`int`): routed experts that a token takes, r.
        shared (`bool`): whether layers have a shared expert.
        always (`tuple[int, ...]`): experts that every token takes, with their weight in one softmax over all.
        dense (`tuple[int, ...]`): the layers that are dense.
        layers (`int`): how many layers there are.

    Example: see `routing_shape`.
    """

    routed: int
    picked: int
    shared: bool
    always: tuple[int, ...]
    dense: tuple[int, ...]
    layers: int

    @property
    def dense_first(self) -> bool:
        """Whether the dense layers, if any, are the first ones."""
        return self.dense == tuple(range(len(self.dense)))


def routing_shape(config: EmoConfig, to: str, output_biases: Sequence[str]) -> RoutingShape:
    """What an export has to say about experts. Models that the layout cannot hold exactly are refused.

    Args:
        config (`EmoConfig`): the config of the model, or of the subset, that is exported.
        to (`str`): one of `LAYOUTS`.
        output_biases (`Sequence[str]`): the model's biases behind attention's output that are not zeros.

    Raises:
        ValueError: with every reason why the layout cannot hold the model.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.conversion.engines.routing_shape import routing_shape
    >>> shape = routing_shape(EmoConfig(num_hidden_layers=2), "qwen2-moe", [])
    >>> shape.routed, shape.picked, shape.shared
    (127, 7, True)
    >>> try:
    ...     routing_shape(EmoConfig(num_shared_experts=2, num_hidden_layers=2), "qwen2-moe", [])
    ... except ValueError as error:
    ...     print(str(error)[:86])
    The model cannot be exported to 'qwen2-moe': layer 0 has 2 shared experts, and other e

    ```
    """
    layers = config.layer_experts
    sparse = {index: _Layer.of(layer) for index, layer in enumerate(layers) if not layer.is_dense}
    reasons = [*_reasons_of_config(config, to), *_reasons_of_layers(layers)]
    first = next(iter(sparse.values()), _Layer(0, 0, False, ()))
    for index, layer in sparse.items():
        if layer != first:
            reasons.append(
                f"layer {index} has {layer.routed} routed experts of which a token takes {layer.picked}, and "
                f"layer {min(sparse)} {first.routed} and {first.picked}: in other engines all layers are "
                "alike"
            )
            break
    dense = tuple(index for index, layer in enumerate(layers) if layer.is_dense)
    shape = RoutingShape(first.routed, first.picked, first.shared, first.always, dense, len(layers))
    reasons += _reasons_of_shape(shape, config, to)
    if output_biases:
        reasons.append(f"its attention has biases behind the output ({output_biases[0]})")
    elif config.attention_bias and to == "deepseek":
        reasons.append("its attention has biases: export it to 'qwen2-moe'")
    if reasons:
        raise ValueError(f"The model cannot be exported to {to!r}: {'; '.join(reasons)}.")
    return shape


@dataclass(frozen=True)
class _Layer:
    """A layer as other engines see it: with always-active experts there is one softmax over all."""

    routed: int
    picked: int
    shared: bool
    always: tuple[int, ...]

    @classmethod
    def of(cls, layer: LayerExperts) -> _Layer:
        if layer.always_active:
            return cls(layer.num_experts, layer.top_k, False, tuple(sorted(layer.always_active)))
        return cls(layer.num_routed, layer.top_k - layer.num_shared, layer.num_shared > 0, ())


def _reasons_of_layers(layers: list[LayerExperts]) -> list[str]:
    for index, layer in enumerate(layers):
        if layer.is_dense or layer.always_active:
            continue
        if layer.num_shared > 1:
            return [
                f"layer {index} has {layer.num_shared} shared experts, and other engines add them up, where "
                "the released inference code weighs them by a softmax"
            ]
        if layer.top_k == layer.num_shared:
            return [f"in layer {index} a token takes no routed expert"]
    return []


def _reasons_of_config(config: EmoConfig, to: str) -> list[str]:
    reasons = []
    if config.hidden_act != "silu":
        reasons.append(f"its activation is {config.hidden_act!r}, expected 'silu'")
    rope: Any = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if kind not in _ROPE_TYPES[to]:
        reasons.append(
            f"its rotary embedding is of type {kind!r}, and engines compute only "
            f"{', '.join(_ROPE_TYPES[to])} of this layout alike"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        reasons.append(f"it rotates a part of each head ({rope['partial_rotary_factor']})")
    return reasons


def _reasons_of_shape(shape: RoutingShape, config: EmoConfig, to: str) -> list[str]:
    reasons = []
    if shape.dense and config.dense_mlp_bias:
        reasons.append("its dense layers have biases")
    if shape.always and to != "deepseek":
        reasons.append(
            f"every token takes the experts {list(shape.always)}, which only vLLM computes: export it to "
            "'deepseek'"
        )
    if to != "qwen2-moe" and not shape.routed:
        reasons.append("it has no experts: export it to 'qwen2-moe'")
    elif to != "qwen2-moe" and not shape.dense_first:
        reasons.append(
            f"its dense layers {list(shape.dense)} are not the first ones: export it to 'qwen2-moe', which "
            "Transformers and vLLM compute"
        )
    if to == "gguf" and config.norm_topk_prob:
        reasons.append("it normalises the weights of a token's experts, which llama.cpp does not here")
    return reasons
