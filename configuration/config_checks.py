"""Whether a config is one that a network can have. Each error names the value and says what to do.

`EmoConfig` calls these when it is made. They take it as it is, and change nothing.
"""

import math
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .layer_experts import LayerExperts

# Lists with one entry for each layer.
BY_LAYER = (
    "num_experts_per_layer",
    "num_shared_experts_per_layer",
    "always_active_experts_per_layer",
    "retained_experts",
    "root_experts_per_layer",
)

# Sizes of which a network needs at least one.
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "dense_intermediate_size",
)
_NOT_NEGATIVE = ("num_experts_per_tok", "rms_norm_eps", "initializer_range", "attention_dropout")


def check_values(config: Any) -> None:
    """Check that every value by itself is one that a network can have.

    Args:
        config (`EmoConfig`): the config.

    Raises:
        ValueError: if one is not, with its name.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.configuration.config_checks import check_values
    >>> config = EmoConfig(num_hidden_layers=1)
    >>> config.hidden_size = -4
    >>> try:
    ...     check_values(config)
    ... except ValueError as error:
    ...     print(error)
    `hidden_size` is -4, expected at least 1: correct it.

    ```
    """
    for name in _SIZES:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is {value}, expected at least 1: correct it.")
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`{name}` is {value}, expected a finite number: give one.")
    for name in _NOT_NEGATIVE:
        value = getattr(config, name)
        if value is not None and value < 0:
            raise ValueError(f"`{name}` is {value}, expected 0 or more: give such a number.")
    if config.attention_dropout is not None and config.attention_dropout > 1:
        raise ValueError(f"`attention_dropout` is {config.attention_dropout}, expected at most 1: lower it.")
    if config.num_attention_heads % (config.num_key_value_heads or 1):
        raise ValueError(
            f"`num_key_value_heads` is {config.num_key_value_heads}, which does not divide the "
            f"{config.num_attention_heads} attention heads: give a number that does."
        )
    from transformers.activations import ACT2FN  # not above: it needs PyTorch

    if config.hidden_act not in ACT2FN:
        raise ValueError(
            f"`hidden_act` is {config.hidden_act!r:.60}, expected an activation of Transformers, such as "
            "'silu'."
        )


def check_rotary_embedding(config: Any) -> None:
    """Check that the rotary embedding is a known one, and fits `head_dim`.

    Args:
        config (`EmoConfig`): the config.

    Raises:
        ValueError: if a setting of it is unknown or out of range.

    Example: see `check_values`.
    """
    if getattr(config, "head_dim", None) is not None:
        check_heads(config)
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    kind = rope.get("rope_type", "default")
    known = sorted({"default", *ROPE_INIT_FUNCTIONS})
    if kind not in known:
        raise ValueError(
            f"`rope_type` is {kind!r:.60}, expected one of {', '.join(known)}: give one of these."
        )
    for name, value in rope.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(
                f"`{name}` of the rotary embedding is {value}, expected a finite number: give one."
            )
    check_theta(config.rope_theta)
    factor = rope.get("factor")
    if factor is not None and not (isinstance(factor, int | float) and factor > 0):
        raise ValueError(f"`factor` of the rotary embedding is {factor!r:.60}: write a number above 0.")


def check_heads(config: Any) -> None:
    """Check the width of an attention head.

    Args:
        config (`EmoConfig`): the config.

    Raises:
        ValueError: if it is not even.

    Example: see `check_values`.
    """
    width = getattr(config, "head_dim", None)
    if width is None:
        width = config.hidden_size // config.num_attention_heads
    if type(width) is not int or width < 2 or width % 2:
        raise ValueError(
            f"A head is {width!r:.60} wide, expected an even number: `hidden_size` ({config.hidden_size}) "
            f"by `num_attention_heads` ({config.num_attention_heads}), or `head_dim`. Correct one of them."
        )


def check_lists(config: Any) -> None:
    """Check that what is listed by layer has an entry for each.

    Args:
        config (`EmoConfig`): the config.

    Raises:
        ValueError: if a list has more or fewer.

    Example: see `check_values`.
    """
    for name in BY_LAYER:
        value = getattr(config, name)
        if value is not None and len(value) != config.num_hidden_layers:
            raise ValueError(
                f"`{name}` has {len(value)} entries, expected one for each of the "
                f"{config.num_hidden_layers} layers: give so many."
            )


def check_experts(config: Any) -> None:
    """Check that the expert counts fit each other and the number of layers.

    Args:
        config (`EmoConfig`): the config.

    Raises:
        ValueError: if they contradict each other, with the layer.

    Example: see `check_values`.
    """
    check_lists(config)
    if config.num_experts_per_layer is None and config.num_shared_experts > config.num_experts:
        raise ValueError(
            f"`num_shared_experts` is {config.num_shared_experts}, more than the {config.num_experts} "
            "experts: lower it, or raise `num_experts`."
        )
    for index, layer in enumerate(config.layer_experts):
        _check_layer(config, index, layer)
        held = None if config.retained_experts is None else config.retained_experts[index]
        if held is not None and len(held) != layer.num_experts:
            raise ValueError(
                f"`retained_experts` names {len(held)} experts in layer {index}, which has "
                f"{layer.num_experts}: name each expert of the layer once."
            )
        roots = None if config.root_experts_per_layer is None else config.root_experts_per_layer[index]
        wrong = [id for id in held or () if id < 0 or (roots is not None and id >= roots)]
        if wrong or len(set(held or ())) < len(held or ()):
            raise ValueError(
                f"`retained_experts` is {held!r:.60} in layer {index}: expected different ids from 0 on, "
                f"below the {roots or 'number of'} experts of the root model. Correct it."
            )


def check_document_pools(config: Any) -> None:
    """Check that pools hold at least the experts that a token picks.

    Args:
        config (`EmoConfig`): the config.

    Raises:
        ValueError: if the sizes contradict each other or the experts.

    Example: see `check_values`.
    """
    smallest, largest = config.document_pool_min, config.document_pool_max
    if (smallest is None) != (largest is None):
        raise ValueError(
            f"`document_pool_min` is {smallest} and `document_pool_max` is {largest}: give both or neither."
        )
    if smallest is not None and largest is not None and smallest > largest:
        raise ValueError(
            f"`document_pool_min` ({smallest}) is larger than `document_pool_max` ({largest}): lower the "
            "first or raise the second."
        )
    for name in ("document_pool_min", "document_pool_eval"):
        size = getattr(config, name)
        for index, layer in enumerate(config.layer_experts if size is not None else ()):
            if layer.always_active:
                raise ValueError(
                    f"`{name}` is not defined with always-active experts (layer {index}): leave out one "
                    "of the two."
                )
            if not layer.is_dense and size < layer.top_k - layer.num_shared:
                raise ValueError(
                    f"`{name}` is {size}, fewer than the {layer.top_k - layer.num_shared} routed experts "
                    f"that a token picks in layer {index}: give at least as many."
                )


def _check_layer(config: Any, index: int, layer: LayerExperts) -> None:
    if layer.num_experts < 0:
        raise ValueError(f"Layer {index} has {layer.num_experts} experts: give 0 for a dense layer, or more.")
    if layer.is_dense:
        if config.dense_intermediate_size is None:
            raise ValueError(
                f"Layer {index} is dense (0 experts): set `dense_intermediate_size` to its width."
            )
        return
    if not 0 <= layer.num_shared <= layer.num_experts:
        raise ValueError(
            f"Layer {index} has {layer.num_shared} shared experts: give a number from 0 to its "
            f"{layer.num_experts} experts."
        )
    outside = [e for e in layer.always_active if not 0 <= e < layer.num_experts]
    if outside or len(set(layer.always_active)) != len(layer.always_active):
        raise ValueError(
            f"Layer {index} has always-active experts {list(layer.always_active)}: give different ids "
            f"from 0 to {layer.num_experts - 1}."
        )
    if layer.top_k < 1:
        raise ValueError(
            f"A token takes {layer.top_k} of the {layer.num_experts} experts of layer {index}: raise "
            "`num_experts_per_tok`."
        )
    taken = len(layer.always_active) or layer.num_shared
    if layer.top_k < taken:
        raise ValueError(
            f"Layer {index} takes {layer.top_k} experts per token, fewer than the {taken} that every "
            "token takes: raise `num_experts_per_tok`."
        )
    if config.norm_topk_prob and taken:
        raise ValueError(
            f"`norm_topk_prob=True` is not defined with shared or always-active experts (layer {index} "
            f"has {taken}): set it to False."
        )


def check_theta(value: Any) -> None:
    """Check the base of a rotary embedding.

    Args:
        value: what was given.

    Raises:
        ValueError: if it is no finite number above 0.

    Example: see `check_values`.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (math.isfinite(value) and value > 0):
        raise ValueError(f"`rope_theta` of the config is {value!r:.60}: write a number above 0.")
