"""Reading the `config.json` of a training checkpoint into an `EmoConfig`.

In it every dict names its class of the training library as `_CLASS_`. These names are compared as strings,
and never imported. A setting that changes what the network computes, and that `EmoForCausalLM` does not have,
is an error: a converted model that computes something else would be worse than none.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from ...checkpoints import CheckpointError
from ...checkpoints.small_files import read_json
from ...configuration import EmoConfig

_NO_POOL_ROUTERS = (
    "MoERouterConfig",
    "MoELinearLBReduceDPRouterConfig",
    "MoELinearLBReduceDPSharedExpRouterConfig",
)
_POOL_ROUTERS = ("MoETwoLevelBatchLBReduceDPSharedExpRandPoolRouterConfig",)
_DENSE_BLOCKS = ("default",)
_MOE_BLOCKS = ("moe",)

SHARED_EXPERTS_DIFFER = (
    "in training each has the weight 1, while in released EMO models their weights are a softmax of the "
    "token's logits and sum to 1. Both agree for one shared expert only, so no conversion keeps what the "
    "model computes"
)


def read_config(path: Path) -> EmoConfig:
    """Read the `config.json` beside a training checkpoint.

    Args:
        path (`Path`): the file.

    Returns:
        `EmoConfig`: the config of the released model, with the tokenizer's vocabulary and without router
        logits. It keeps the pool sizes and the coefficients of training.

    Raises:
        CheckpointError: if the file cannot be read or is no such config.
        ValueError: if a setting is missing, wrong or not supported. The message names it.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from transformers_emo.conversion.olmo_core.config_reader import read_config
    >>> config = read_config(Path("tests/goldens/D_olmo_core_checkpoint/step10/config.json"))
    >>> config.document_pool_min, config.document_pool_max, config.num_shared_experts
    (4, 16, 1)

    ```
    """
    try:
        content = read_json(path)
    except FileNotFoundError as error:
        missing = f"file '{path}'" if path.parent.is_dir() else f"folder '{path.parent}'"
        raise CheckpointError(
            f"There is no {missing} (seen from {os.getcwd()}): expected a training step's folder, with "
            "config.json and model_and_optim/."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"Cannot read {path}: {error}. Expected the config.json of a training step's folder."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise CheckpointError(f"{path} has no `model`: expected the config.json of a training step's folder.")
    return _config(_Settings(content, ""))


class _Settings:
    """A dict of the config that knows its name in the config, for errors."""

    def __init__(self, values: dict, name: str):
        self.values, self.name = values, name

    def get(self, key: str, wanted: type | tuple[type, ...], default: Any = ...) -> Any:
        """The value of a key. It must be of a type; with a default it may be null or missing."""
        value = self.values.get(key)
        name = f"{self.name}{key}"
        if value is None:
            if default is ...:
                raise ValueError(f"The training config has no `{name}`: add it.")
            return default
        kinds = wanted if isinstance(wanted, tuple) else (wanted,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(
                f"`{name}` of the training config is {value!r:.60}, expected "
                f"{' or '.join(kind.__name__ for kind in kinds)}."
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`{name}` of the training config is {value}, expected a finite number.")
        return value

    def at(self, key: str, default: Any = ...) -> _Settings:
        return _Settings(self.get(key, dict, default), f"{self.name}{key}.")

    def whole(self, key: str, most: int = 1 << 31) -> int:
        value = self.get(key, int)
        if not 1 <= value <= most:
            raise ValueError(f"`{self.name}{key}` of the training config is {value}, expected 1 to {most}.")
        return value

    def only(self, **supported: tuple) -> None:
        """Refuse all values but these. A key may also be null or missing."""
        for key, values in supported.items():
            value = self.values.get(key)
            if value is not None and value not in values:
                raise ValueError(
                    f"`{self.name}{key}` of the training config is {value!r:.60}: an EMO model has no such "
                    f"thing, so it cannot be converted (supported: {', '.join(map(repr, values)) or 'null'})."
                )


def _config(root: _Settings) -> EmoConfig:
    model = root.at("model")
    block = model.at("block")
    is_older = block.values.get("sequence_mixer") is None and block.values.get("attention") is not None
    attention = block.at("attention" if is_older else "sequence_mixer")
    rope, norm, head = attention.at("rope"), block.at("layer_norm"), model.at("lm_head")
    tokenizer = root.at("dataset").at("tokenizer")
    model.only(block_overrides=({},), block_pattern=([],), embed_scale=(1, 1.0), embedding_norm=())
    block.only(name=_DENSE_BLOCKS + _MOE_BLOCKS, attention_residual_alpha=(), feed_forward_residual_alpha=())
    block.only(dropout=(0, 0.0))
    attention.only(
        name=("default", "fused"), type=("attention",), bias=(False,), qk_norm=(), clip_qkv=(), gate=()
    )
    attention.only(sliding_window=(), use_head_qk_norm=(False,))
    attention.only(softmax_scale=(), head_dim=())
    rope.only(name=("default",), scaling=(), no_global_rope=(False,))
    norms = [norm, head.at("layer_norm")]
    for one in norms:
        one.only(name=("rms", "fused_rms"), bias=(False,), elementwise_affine=(True,))
    if norms[0].get("eps", (int, float), 1e-5) != norms[1].get("eps", (int, float), 1e-5):
        raise ValueError(
            "`layer_norm.eps` differs between the blocks and the head: an EMO model has one for both."
        )
    head.only(name=("default",), bias=(False,))
    rows, vocabulary = model.whole("vocab_size"), tokenizer.whole("vocab_size")
    if vocabulary > rows:
        raise ValueError(
            f"The tokenizer has {vocabulary} tokens, more than the {rows} rows of `model.vocab_size`."
        )
    module = root.at("train_module", {})
    dataset = root.at("dataset")
    heads = attention.whole("n_heads")
    dropout = float(attention.get("dropout", (int, float), 0.0))
    theta = float(rope.get("theta", (int, float), 500000))
    if not 0 <= dropout < 1:
        raise ValueError(
            f"`{attention.name}dropout` of the training config is {dropout}, expected a probability below 1."
        )
    if theta <= 0:
        raise ValueError(f"`{rope.name}theta` of the training config is {theta}, expected more than 0.")
    settings: dict[str, Any] = {
        "architectures": ["EmoForCausalLM"],
        "vocab_size": vocabulary,
        "hidden_size": model.whole("d_model"),
        "num_hidden_layers": model.whole("n_layers", 1000),
        "num_attention_heads": heads,
        "num_key_value_heads": attention.get("n_kv_heads", int, heads),
        "max_position_embeddings": dataset.get(
            "sequence_length", int, module.get("max_sequence_length", int, 4096)
        ),
        "initializer_range": float(model.get("init_std", (int, float), 0.02)),
        "rms_norm_eps": float(norm.get("eps", (int, float), 1e-5)),
        "rope_theta": theta,
        "attention_dropout": dropout,
        "eos_token_id": tokenizer.get("eos_token_id", int),
        "pad_token_id": tokenizer.get("pad_token_id", int, None),
        "bos_token_id": tokenizer.get("bos_token_id", int, None),
        "attention_within_documents": dataset.get("generate_doc_lengths", bool, False),
        "lm_z_loss_coef": float(module.get("z_loss_multiplier", (int, float), 0.0)),
    }
    if settings["hidden_size"] % heads:
        raise ValueError(
            f"`model.d_model` is {settings['hidden_size']}, not a multiple of the {heads} attention heads."
        )
    if block.get("name", str) in _DENSE_BLOCKS:
        settings |= _dense(block, settings["num_hidden_layers"])
    else:
        moe = block.at("feed_forward_moe")
        settings |= _experts(moe, settings["num_hidden_layers"])
        eos = moe.at("router").get("eos_token_id", int, settings["eos_token_id"])
        if "document_pool_min" in settings and eos != settings["eos_token_id"]:
            raise ValueError(
                f"The router begins documents at token {eos}, and the tokenizer's EOS is "
                f"{settings['eos_token_id']}: an EMO model has one EOS for both."
            )
    try:
        return EmoConfig(**settings)
    except StrictDataclassError as error:
        raise ValueError(f"The training config contradicts itself: {error}") from error


def _dense(block: _Settings, layers: int) -> dict[str, Any]:
    feed_forward = block.at("feed_forward")
    feed_forward.only(name=("default",), bias=(False,), activation=("silu",))
    width = feed_forward.whole("hidden_size")
    return {
        "num_experts": 0,
        "num_experts_per_tok": 0,
        "num_shared_experts": 0,
        "num_experts_per_layer": [0] * layers,
        "dense_intermediate_size": width,
        "intermediate_size": width,
    }


def _experts(moe: _Settings, layers: int) -> dict[str, Any]:
    router = moe.at("router")
    # In training the default kind drops tokens beyond an expert's capacity. The network is the same.
    moe.only(name=("default", "dropless"), shared_mlp=(), feed_forward=())
    router.only(
        name=("default",),
        gating_function=("softmax",),
        bias_gamma=(),
        uniform_expert_assignment=(False,),
        num_forced_experts=(0,),
        extension_finetune_mode=(False,),
    )
    kind = router.get("_CLASS_", str).rpartition(".")[2]
    if kind not in _NO_POOL_ROUTERS + _POOL_ROUTERS:
        raise ValueError(
            f"`{router.name}_CLASS_` is {kind!r:.80}, a router that is not supported: expected one of "
            f"{', '.join(_POOL_ROUTERS + _NO_POOL_ROUTERS)}."
        )
    shared = 0 if kind in _NO_POOL_ROUTERS[:2] else router.get("num_shared_experts", int, 1)
    if shared > 1:
        raise ValueError(
            f"`{router.name}num_shared_experts` of the training config is {shared}: {SHARED_EXPERTS_DIFFER}."
        )
    experts, top_k = moe.whole("num_experts", 10_000), router.whole("top_k")
    if top_k > experts:
        raise ValueError(f"`{router.name}top_k` is {top_k}, more than the {experts} experts of a layer.")
    normed = router.get("normalize_expert_weights", (int, float), None)
    if normed is not None and (normed != 1 or shared):
        raise ValueError(
            f"`{router.name}normalize_expert_weights` is {normed}: supported are null and, without shared "
            "experts, 1."
        )
    # Training sums the layers' losses, and may divide each by their number. Ours is their mean.
    times = 1 if moe.get("scale_loss_by_num_layers", bool, True) else layers
    settings = {
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "num_shared_experts": shared,
        "intermediate_size": moe.whole("hidden_size"),
        "norm_topk_prob": normed is not None,
        "always_active_experts": router.get("always_active_experts", list, None),
        "balance_loss_coef": times * float(moe.get("lb_loss_weight", (int, float), 0.0)),
        "router_z_loss_coef": times * float(moe.get("z_loss_weight", (int, float), 0.0)),
    }
    if kind in _POOL_ROUTERS:
        settings |= {
            "document_pool_min": router.whole("min_document_expert_pool"),
            "document_pool_max": router.whole("max_document_expert_pool"),
            "document_pool_eval": router.get("eval_document_expert_pool", int, None),
        }
    return settings
