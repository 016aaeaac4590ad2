"""What an EMO is made of, read from the attributes of its config, and what of it vLLM cannot compute
exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

EXACT_ROPE = ("default", "linear", "llama3")
"""The kinds of rotary embedding that the tests found equal in vLLM and Transformers."""


class UnsupportedModelError(ValueError):
    """The model cannot be served exactly: the text says why, and what can be done.

    Example:

    ```python
    >>> from transformers_emo_vllm.architecture import UnsupportedModelError
    >>> issubclass(UnsupportedModelError, ValueError)
    True

    ```
    """


@dataclass(frozen=True)
class Layer:
    """The experts of one layer. The shared ones are the last `num_shared`.

    Args:
        num_experts (`int`): experts, shared ones included; 0 for one dense feed-forward network.
        num_shared (`int`): experts that every token takes. Their softmax is their own.
        always_active (`tuple[int, ...]`): experts that every token takes, with one softmax over all experts.
        top_k (`int`): experts that a token takes, these included.

    Example:

    ```python
    >>> from transformers_emo_vllm.architecture import Layer
    >>> Layer(num_experts=128, num_shared=1, always_active=(), top_k=8).num_routed
    127

    ```
    """

    num_experts: int
    num_shared: int
    always_active: tuple[int, ...]
    top_k: int

    @property
    def is_dense(self) -> bool:
        """Whether the layer has one feed-forward network in place of experts."""
        return self.num_experts == 0

    @property
    def num_routed(self) -> int:
        """How many experts the router chooses from."""
        return self.num_experts - self.num_shared

    @property
    def num_picked(self) -> int:
        """How many of them a token takes."""
        return self.top_k - self.num_shared

    @property
    def always_used(self) -> tuple[int, ...]:
        """The ids of the experts that every token takes."""
        return self.always_active or tuple(range(self.num_routed, self.num_experts))


def layers_of(config: Any) -> list[Layer]:
    """The experts of each layer, all settings by layer resolved.

    Args:
        config: an `EmoConfig` of this package or of `transformers-emo`.

    Raises:
        UnsupportedModelError: if the numbers do not fit each other.

    Example:

    ```python
    >>> from transformers_emo_vllm.architecture import layers_of
    >>> from transformers_emo_vllm.config import EmoConfig
    >>> layers_of(EmoConfig(num_hidden_layers=1, num_experts=16, num_experts_per_tok=4, num_shared_experts=1))
    [Layer(num_experts=16, num_shared=1, always_active=(), top_k=4)]

    ```
    """
    number = config.num_hidden_layers
    experts = config.num_experts_per_layer or [config.num_experts] * number
    shared = config.num_shared_experts_per_layer or [min(config.num_shared_experts, e) for e in experts]
    always = config.always_active_experts_per_layer or [config.always_active_experts] * number
    if not len(experts) == len(shared) == len(always) == number:
        raise UnsupportedModelError(
            f"The config has {number} layers, and lists of {len(experts)} numbers of experts, {len(shared)} "
            f"of shared and {len(always)} of always-active ones: give one entry a layer."
        )
    layers = [
        Layer(e, s if e else 0, tuple(a or ()) if e else (), min(config.num_experts_per_tok, e))
        for e, s, a in zip(experts, shared, always, strict=True)
    ]
    for index, layer in enumerate(layers):
        taken = len(layer.always_active) or layer.num_shared
        if not 0 <= layer.num_shared <= layer.num_experts or layer.top_k < taken:
            raise UnsupportedModelError(
                f"Layer {index} has {layer.num_experts} experts, {taken} that every token takes, and takes "
                f"{layer.top_k}: correct the config."
            )
        if layer.is_dense and not config.dense_intermediate_size:
            raise UnsupportedModelError(
                f"Layer {index} is dense: set `dense_intermediate_size` to its width."
            )
        if config.norm_topk_prob and taken:
            raise UnsupportedModelError(
                f"`norm_topk_prob` is not defined with experts that every token takes (layer {index}): set "
                "it to false."
            )
    return layers


def check_exact(config: Any) -> None:
    """Refuse what vLLM's parts would compute in another way than the model.

    Args:
        config: an `EmoConfig` of this package or of `transformers-emo`.

    Raises:
        UnsupportedModelError: with the reason, and what to do.

    Example:

    ```python
    >>> from transformers_emo_vllm.architecture import check_exact
    >>> from transformers_emo_vllm.config import EmoConfig
    >>> check_exact(EmoConfig())
    >>> check_exact(EmoConfig(hidden_act="gelu"))
    Traceback (most recent call last):
    transformers_emo_vllm.architecture.UnsupportedModelError: `hidden_act` is 'gelu' ...

    ```
    """
    layers_of(config)
    if config.hidden_act != "silu":
        raise UnsupportedModelError(
            f"`hidden_act` is {config.hidden_act!r} and vLLM's experts compute 'silu': run the model with "
            "transformers-emo."
        )
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if width * config.num_attention_heads != config.hidden_size:
        raise UnsupportedModelError(
            f"{config.num_attention_heads} heads of width {width} do not make the hidden size "
            f"{config.hidden_size}: such models were not tested in vLLM."
        )
    kind = rope_of(config).get("rope_type", "default")
    if kind not in EXACT_ROPE:
        raise UnsupportedModelError(
            f"The rotary embedding is of kind {kind!r}; only {', '.join(EXACT_ROPE)} were found equal in "
            "vLLM and Transformers. Run the model with transformers-emo."
        )
    if getattr(config, "quantization_config", None):
        raise UnsupportedModelError(
            "The weights are quantised. Only plain ones were tested in vLLM: serve the model they were "
            "made from."
        )


def rope_of(config: Any) -> dict[str, Any]:
    """The settings of the rotary embedding, as vLLM takes them.

    Args:
        config: an `EmoConfig` of this package or of `transformers-emo`.

    Example:

    ```python
    >>> from transformers_emo_vllm.architecture import rope_of
    >>> from transformers_emo_vllm.config import EmoConfig
    >>> rope_of(EmoConfig(rope_theta=1e4))["rope_theta"]
    10000.0

    ```
    """
    rope = dict(getattr(config, "rope_parameters", None) or {})
    rope.setdefault("rope_type", "default")
    rope.setdefault("rope_theta", config.default_theta)
    return rope
