"""Which mixtures of experts of other families compute what an EMO computes, and why others do not.

An EMO's block has an RMSNorm before attention and one before the experts, but none on queries and keys. Its
experts are SwiGLU. Its router takes the largest values of a softmax over all routed experts, and may
normalise them again. Mixtral is such a model, without shared experts and normalised again
(https://arxiv.org/abs/2401.04088, section 2.1).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_MIXTRAL_NAMES = {
    ".input_layernorm.": ".pre_attention_layernorm.",
    ".post_attention_layernorm.": ".pre_feedforward_layernorm.",
    ".block_sparse_moe.": ".mlp.",
    ".w1.": ".gate_proj.",
    ".w3.": ".up_proj.",
    ".w2.": ".down_proj.",
}
_REASONS = {
    "olmoe": "it normalises queries and keys (QK-norm)",
    "flex_olmo": "it normalises queries and keys, and its norms come after attention and experts",
    "qwen2_moe": "its attention has biases, and its shared expert a sigmoid gate and a width of its own",
    "qwen3_moe": "it normalises queries and keys (QK-norm)",
    "deepseek_v2": "its attention is another (latent keys and values)",
    "deepseek_v3": "its attention is another (latent keys and values), and its router a sigmoid",
}
# Copied if the config has them, since the defaults of an EMO differ.
_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_dropout",
    "tie_word_embeddings",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "router_aux_loss_coef",
    "dtype",
    "torch_dtype",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
_MIXTRAL_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "router_aux_loss_coef": 0.001,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def emo_settings(content: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The settings of the EMO that computes the same as a model of another family.

    Args:
        content (`dict[str, Any]`): that model's `config.json`.
        names (`Iterable[str]`): the names of its tensors.

    Returns:
        `dict[str, Any]`: settings for `EmoConfig.from_dict`.

    Raises:
        ValueError: if there is no such EMO. The message says why.

    Example:

    ```python
    >>> from transformers_emo.conversion.other_families import emo_settings
    >>> settings = emo_settings({"model_type": "mixtral", "num_local_experts": 4}, [])
    >>> settings["num_experts"], settings["num_shared_experts"], settings["norm_topk_prob"]
    (4, 0, True)
    >>> try:
    ...     emo_settings({"model_type": "olmoe"}, [])
    ... except ValueError as error:
    ...     print(str(error)[:57])
    A model of type 'olmoe' cannot become an EMO: it normalis

    ```
    """
    kind = content["model_type"]
    reasons = []
    if kind != "mixtral":
        reasons.append(_REASONS.get(kind, "only EMO and Mixtral are known to compute what an EMO computes"))
    else:
        reasons += _mixtral_reasons(content)
    names = list(names)
    for sign, reason in (("_norm.weight", "it has norms inside attention"), (".bias", "it has biases")):
        found = [name for name in names if name.endswith(sign)]
        if found and kind == "mixtral":
            reasons.append(f"{reason} ({found[0]})")
    if reasons:
        raise ValueError(
            f"A model of type {kind!r} cannot become an EMO: {'; '.join(reasons)}. Use it as it is."
        )
    settings = _MIXTRAL_DEFAULTS | {name: content[name] for name in _SAME if name in content}
    if "rope_parameters" not in settings:
        settings.setdefault("rope_theta", 1e6)
    return settings | {
        "model_type": "emo",
        "architectures": ["EmoForCausalLM"],
        "num_experts": content.get("num_local_experts", 8),
        "num_experts_per_tok": content.get("num_experts_per_tok", 2),
        "num_shared_experts": 0,
        "norm_topk_prob": True,
    }


def emo_name(kind: str, name: str) -> str:
    """The name in the released layout of a tensor of another family.

    Args:
        kind (`str`): the family, `"mixtral"`.
        name (`str`): the tensor's name in that family.

    Example:

    ```python
    >>> from transformers_emo.conversion.other_families import emo_name
    >>> emo_name("mixtral", "model.layers.0.block_sparse_moe.experts.3.w2.weight")
    'model.layers.0.mlp.experts.3.down_proj.weight'

    ```
    """
    for theirs, ours in _MIXTRAL_NAMES.items() if kind == "mixtral" else ():
        name = name.replace(theirs, ours)
    return name


def _mixtral_reasons(content: dict[str, Any]) -> list[str]:
    reasons = []
    if content.get("sliding_window") is not None:
        reasons.append(f"its attention has a sliding window ({content['sliding_window']} tokens)")
    if content.get("hidden_act", "silu") != "silu":
        reasons.append(f"its experts have the activation {content['hidden_act']!r}, expected 'silu'")
    heads = content.get("num_attention_heads", 32)
    width, head = content.get("hidden_size", 4096), content.get("head_dim")
    if head is not None and head * heads != width:
        reasons.append(f"its heads are {head} wide, expected {width} / {heads}")
    return reasons
