"""What one token, one step of decoding or one step of training takes of a rank: operations and bytes.

Counted are matrix products, attention, bytes of weights and of keys and values that are read, and bytes that
a rank sends to others. Norms, activations and the sampling are not: they are small beside these.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..configuration import EmoConfig, LayerExperts
from .parallel_layout import ParallelLayout


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in one step, by the group that it sends them to.

    Args:
        what (`str`): why.
        size (`float`): bytes.
        group (`int`): ranks of the group.
        span (`int`): from the first to the last rank of a group in the order of ranks: within a node if it is
            no larger than one.

    Example: see `Plan`.
    """

    what: str
    size: float
    group: int
    span: int


def head_size(config: EmoConfig) -> int:
    """The width of one head of the attention.

    Args:
        config (`EmoConfig`): the model's config.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.planning.work import head_size
    >>> head_size(EmoConfig())
    128

    ```
    """
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def token_parameters(config: EmoConfig) -> int:
    """The weights that one token is multiplied by: "1B" of the released 14B.

    Args:
        config (`EmoConfig`): the model's config.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.planning.work import token_parameters
    >>> token_parameters(EmoConfig()) / 1e9
    1.283305472

    ```
    """
    hidden, head = config.hidden_size, head_size(config)
    heads, keys = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    attention = hidden * head * (2 * heads + 2 * keys)
    total = config.vocab_size * hidden
    for layer in config.layer_experts:
        total += attention
        if layer.is_dense:
            total += 3 * hidden * (config.dense_intermediate_size or 0)
        else:
            total += hidden * layer.num_experts + layer.top_k * 3 * hidden * config.intermediate_size
    return total


def token_flops(config: EmoConfig, context: float) -> float:
    """Operations that one token takes in a forward pass; two for a multiplication with its addition.

    Args:
        config (`EmoConfig`): the model's config.
        context (`float`): how many tokens it attends to.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.planning.work import token_flops
    >>> token_flops(EmoConfig(), context=2048) / 1e9
    2.8350464

    ```
    """
    attention = 4 * config.num_attention_heads * head_size(config) * context * config.num_hidden_layers
    return 2 * token_parameters(config) + attention


def experts_touched(layer: LayerExperts, tokens: float) -> float:
    """How many experts of a layer so many tokens use, if each picks independently and evenly.

    Tokens of one document, and pools, use fewer: then less is read than a plan says.

    Args:
        layer (`LayerExperts`): the layer.
        tokens (`float`): how many.

    Example:

    ```python
    >>> from transformers_emo.configuration import LayerExperts
    >>> from transformers_emo.planning.work import experts_touched
    >>> layer = LayerExperts(num_experts=128, num_shared=1, always_active=(), top_k=8)
    >>> round(experts_touched(layer, 1)), round(experts_touched(layer, 64))
    (8, 125)

    ```
    """
    if layer.is_dense:
        return 0.0
    always = len(layer.always_used)
    routed = layer.num_experts - always
    picks = min(layer.top_k - always, routed)
    return always + routed * (1 - (1 - picks / routed) ** tokens if routed else 0.0)


def forward_traffic(
    config: EmoConfig, layout: ParallelLayout, tokens: float, itemsize: int, *, training: bool
) -> list[Traffic]:
    """What a rank sends in a forward pass, weights that FSDP gathers left out.

    A sum over n ranks sends 2 (n - 1) / n of its bytes, gathering and exchanging (n - 1) / n.

    Args:
        config (`EmoConfig`): the model's config.
        layout (`ParallelLayout`): how ranks share it.
        tokens (`float`): tokens of the rank's group of tensor parallelism.
        itemsize (`int`): bytes of a number.
        training (`bool`): tokens then always go to the ranks of their experts; when serving, ranks that have
            one batch sum what their experts make of it.

    Example: see `Plan`.
    """
    hidden = tokens * config.hidden_size * itemsize
    tensor, experts = layout.tp_size, layout.ep_size
    with_experts = [layer for layer in config.layer_experts if not layer.is_dense]
    found = []
    if tensor > 1:
        # Of the embedding, and in each layer of the attention, and of the experts or the dense network.
        sums = 1 + config.num_hidden_layers
        sums += config.num_hidden_layers - (len(with_experts) if experts > 1 else 0)
        share = (tensor - 1) / tensor
        found.append(Traffic("sums of tensor parallelism", 2 * share * sums * hidden, tensor, tensor))
        gathered = share * tokens * config.vocab_size * itemsize
        found.append(Traffic("logits", gathered, tensor, tensor))
    if experts > 1 and with_experts:
        share = (experts - 1) / experts
        if experts == tensor and not training:  # the group has one batch: its outputs are summed
            size = 2 * share * hidden * len(with_experts)
        else:  # to the experts' ranks and back, each rank its own part of the tokens
            size = 2 * share * hidden / tensor * sum(layer.top_k for layer in with_experts)
        found.append(Traffic("tokens to experts and back", size, experts, experts))
        if tensor > 1 and (experts != tensor or training):
            gathered = (tensor - 1) / tensor * hidden * len(with_experts)
            found.append(Traffic("what experts made of parts of the tokens", gathered, tensor, tensor))
    return found


def rank_flops(
    config: EmoConfig, layout: ParallelLayout, tokens: float, context: float, *, training: bool
) -> float:
    """Operations of the busiest rank in a step.

    With expert parallelism that is a rank with an expert that every token uses. In training each layer's
    forward pass runs twice, for gradient checkpointing, and the backward pass takes two of them.

    Args:
        config (`EmoConfig`): the model's config.
        layout (`ParallelLayout`): how ranks share it.
        tokens (`float`): tokens of the rank's group of tensor parallelism.
        context (`float`): how many tokens each attends to.
        training (`bool`): with the backward pass.

    Example: see `Plan`.
    """
    expert = 2 * 3 * config.hidden_size * config.intermediate_size
    of_experts = busiest = 0.0
    for layer in config.layer_experts:
        if layer.is_dense:
            continue
        always = len(layer.always_used)
        of_experts += layer.top_k * expert
        if layout.ep_size == 1:
            busiest += layer.top_k * expert * tokens / layout.tp_size
        else:
            # Those that every token uses have the last numbers, and so are on few ranks.
            each = max(layer.num_experts // layout.ep_size, 1)
            in_group = tokens * layout.ep_size / layout.tp_size
            busiest += in_group * expert * ((layer.top_k - always) / layout.ep_size + min(always, each))
    head = 2 * config.vocab_size * config.hidden_size
    others = token_flops(config, context) - of_experts - head
    passes = 4 if training else 1
    return passes * (busiest + others * tokens / layout.tp_size) + (passes - training) * (
        head * tokens / layout.tp_size
    )
