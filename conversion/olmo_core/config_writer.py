"""Writing the `config.json` of a training checkpoint from an `EmoConfig`: the reverse of `config_reader`."""

from __future__ import annotations

import copy
from typing import Any

from ...configuration import EmoConfig
from .config_reader import SHARED_EXPERTS_DIFFER

_POOL_ROUTER = (
    "olmo_core.nn.moe.twolevel_batchlb_reducedp_sharedexp_randpool_router."
    "MoETwoLevelBatchLBReduceDPSharedExpRandPoolRouterConfig"
)
_SHARED_ROUTER = "olmo_core.nn.moe.router_lbreducedp_sharedexp.MoELinearLBReduceDPSharedExpRouterConfig"
_PLAIN_ROUTER = "olmo_core.nn.moe.router_lbreducedp.MoELinearLBReduceDPRouterConfig"


def check_can_be_trained(config: EmoConfig) -> None:
    """Refuse a model that OLMo-core does not have.

    Args:
        config (`EmoConfig`): the config of the model.

    Raises:
        ValueError: if there is a setting that OLMo-core cannot have. The message says which and why.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.conversion.olmo_core.config_writer import check_can_be_trained
    >>> check_can_be_trained(EmoConfig())
    >>> try:
    ...     check_can_be_trained(EmoConfig(tie_word_embeddings=True))
    ... except ValueError as error:
    ...     print(str(error)[:43])
    `tie_word_embeddings` is True: OLMo-core's

    ```
    """
    layers = config.layer_experts
    reasons = {
        "tie_word_embeddings": "OLMo-core's models have a head of their own, which would be trained apart",
        "attention_bias": "its attention would lose the biases",
        "dense_mlp_bias": "its feed-forward networks would lose the biases",
    }
    for name, reason in reasons.items():
        if getattr(config, name):
            raise ValueError(f"`{name}` is True: {reason}. It cannot be written for OLMo-core.")
    rope = config.to_dict()["rope_scaling"]
    if rope is not None:
        raise ValueError(
            f"`rope_scaling` is {rope}: EMO was trained without it, and it cannot be written. Remove it."
        )
    if not 0 <= (config.attention_dropout or 0.0) < 1:
        raise ValueError(
            f"`attention_dropout` is {config.attention_dropout}, expected a probability below 1."
        )
    eos = config.eos_token_id
    if eos is None or (isinstance(eos, list) and len(eos) != 1):
        raise ValueError(
            f"`eos_token_id` is {eos}: OLMo-core needs the one token that ends a document. Set it in "
            "config.json. Other tokens that end a text belong in generation_config.json."
        )
    if config.hidden_act != "silu":
        raise ValueError(f"`hidden_act` is {config.hidden_act!r}: OLMo-core's experts have 'silu'.")
    if any(layer.always_active for layer in layers):
        raise ValueError("There are always-active experts: none of OLMo-core's EMO routers has them.")
    if len({(layer.num_experts, layer.num_shared, layer.top_k) for layer in layers}) > 1:
        numbers = [layer.num_experts for layer in layers]
        raise ValueError(f"Layers have {numbers} experts: OLMo-core's blocks are all of one kind.")
    if layers[0].num_shared > 1:
        raise ValueError(f"There are {layers[0].num_shared} shared experts: {SHARED_EXPERTS_DIFFER}.")
    boundaries = config.document_boundaries
    in_attention = config.attention_within_documents and boundaries == "position_ids"
    if in_attention or (config.document_pool_min is not None and boundaries != "eos"):
        raise ValueError(
            f"`document_boundaries` is {boundaries!r}: OLMo-core tells documents apart by EOS tokens only, "
            "and each EOS begins a document for the pools. Set 'eos' in config.json to train in this way."
        )
    if config.document_pool_min is not None and layers[0].num_shared != 1:
        raise ValueError("Document pools need one shared expert in OLMo-core; the model has none.")


def training_config(config: EmoConfig, rows: int, base: dict[str, Any] | None = None) -> dict[str, Any]:
    """Make the contents of a training checkpoint's `config.json`.

    Args:
        config (`EmoConfig`): the config of the model, with pool sizes and coefficients of training.
        rows (`int`): rows of the padded vocabulary.
        base (`dict[str, Any]`, *optional*): the config of another run. Its data, optimiser and schedule are
            kept. Without it the result has the model's own settings only.

    Returns:
        `dict[str, Any]`: JSON data.

    Raises:
        ValueError: as from `check_can_be_trained`.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.conversion.olmo_core.config_writer import training_config
    >>> content = training_config(EmoConfig(document_pool_min=8, document_pool_max=128), 100352)
    >>> content["model"]["block"]["feed_forward_moe"]["router"]["_CLASS_"].rpartition(".")[2]
    'MoETwoLevelBatchLBReduceDPSharedExpRandPoolRouterConfig'

    ```
    """
    check_can_be_trained(config)
    eos = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    tokenizer = {
        "vocab_size": config.vocab_size,
        "eos_token_id": eos,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "_CLASS_": "olmo_core.data.tokenizer.TokenizerConfig",
    }
    said = {
        "dataset": {
            "tokenizer": _without_nulls(tokenizer),
            "sequence_length": config.max_position_embeddings,
            "generate_doc_lengths": config.attention_within_documents,
        },
        "train_module": {"z_loss_multiplier": config.lm_z_loss_coef},
    }
    content = _merged(copy.deepcopy(base or {}), said)
    content["model"] = _model(config, rows, eos)
    return content


def _model(config: EmoConfig, rows: int, eos: int | None) -> dict[str, Any]:
    is_dense = config.layer_experts[0].is_dense
    theta = config.to_dict()["rope_theta"]
    attention = {
        "name": "default",
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "bias": False,
        "rope": {
            "name": "default",
            "theta": int(theta) if theta == int(theta) else theta,
            "full_precision": True,
            "no_global_rope": False,
            "_CLASS_": "olmo_core.nn.rope.RoPEConfig",
        },
        # The only backend of OLMo-core that keeps attention inside documents.
        "backend": "flash_2" if config.attention_within_documents else None,
        "dtype": "float32",
        "use_head_qk_norm": False,
        "_CLASS_": "olmo_core.nn.attention.AttentionConfig",
        "type": "attention",
    }
    if config.attention_dropout:
        attention["dropout"] = config.attention_dropout
    if config.num_key_value_heads == config.num_attention_heads:
        attention["n_kv_heads"] = None
    norm = {
        "name": "rms",
        "eps": config.rms_norm_eps,
        "bias": False,
        "dtype": "float32",
        "_CLASS_": "olmo_core.nn.layer_norm.LayerNormConfig",
    }
    block: dict[str, Any] = {"sequence_mixer": _without_nulls(attention), "layer_norm": norm}
    if is_dense:
        block["feed_forward"] = {
            "hidden_size": config.dense_intermediate_size,
            "name": "default",
            "bias": False,
            "dtype": "float32",
            "_CLASS_": "olmo_core.nn.feed_forward.FeedForwardConfig",
        }
    else:
        block["feed_forward_moe"] = _experts(config, eos)
    kind = "default" if is_dense else "moe"
    block |= {"name": kind, "_CLASS_": "olmo_core.nn.transformer.config.TransformerBlockConfig"}
    return {
        "d_model": config.hidden_size,
        "vocab_size": rows,
        "n_layers": config.num_hidden_layers,
        "block": block,
        "lm_head": {
            "name": "default",
            "layer_norm": dict(norm),
            "bias": False,
            "dtype": "float32",
            "loss_implementation": "default",
            "_CLASS_": "olmo_core.nn.lm_head.LMHeadConfig",
        },
        "name": kind,
        "dtype": "float32",
        "init_method": "normal",
        "init_seed": 0,
        "init_std": config.initializer_range,
        "_CLASS_": "olmo_core.nn.transformer.config.TransformerConfig",
    }


def _experts(config: EmoConfig, eos: int | None) -> dict[str, Any]:
    experts = config.layer_experts[0]
    router: dict[str, Any] = {
        "name": "default",
        "top_k": experts.top_k,
        "uniform_expert_assignment": False,
        "gating_function": "softmax",
    }
    if config.document_pool_min is not None:
        router |= {
            "eos_token_id": eos,
            "num_shared_experts": experts.num_shared,
            "min_document_expert_pool": config.document_pool_min,
            "max_document_expert_pool": config.document_pool_max,
            "eval_document_expert_pool": config.document_pool_eval,
            "_CLASS_": _POOL_ROUTER,
        }
    elif experts.num_shared:
        router |= {"num_shared_experts": experts.num_shared, "_CLASS_": _SHARED_ROUTER}
    else:
        router |= {
            "normalize_expert_weights": 1.0 if config.norm_topk_prob else None,
            "_CLASS_": _PLAIN_ROUTER,
        }
    return {
        "name": "dropless",
        "num_experts": experts.num_experts,
        "hidden_size": config.intermediate_size,
        "router": _without_nulls(router),
        "lb_loss_weight": config.balance_loss_coef,
        "lb_loss_granularity": "local_batch",
        "z_loss_weight": config.router_z_loss_coef,
        "scale_loss_by_num_layers": True,
        "dtype": "float32",
        "_CLASS_": "olmo_core.nn.moe.moe.MoEConfig",
    }


def _merged(into: dict, values: dict) -> dict:
    for key, value in values.items():
        there = into.get(key)
        into[key] = _merged(there, value) if isinstance(there, dict) and isinstance(value, dict) else value
    return into


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
