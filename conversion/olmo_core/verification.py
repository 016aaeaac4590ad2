"""Comparing a converted model with its training checkpoint: the tensors of both must give the same logits.

Shape suffixes: T tokens, D hidden size, E experts, F expert width, H heads, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from ... import modeling_emo
from ...configuration import EmoConfig, LayerExperts
from .distributed_checkpoint import DistributedCheckpoint

_TOKENS = 48
_TOLERANCE = 1e-3  # as a share of the largest logit: enough for rounding, and for nothing else


def verify_logits(
    folder: Path, checkpoint: DistributedCheckpoint, config: EmoConfig, dtype: torch.dtype
) -> float:
    """Compare the logits of a converted model with those of the checkpoint it was made from.

    Args:
        folder (`Path`): the converted model. It is loaded in float32.
        checkpoint (`DistributedCheckpoint`): the training checkpoint. It is read layer by layer.
        config (`EmoConfig`): the config of the model.
        dtype (`torch.dtype`): the dtype in which the model was saved. The tensors of the checkpoint are
            rounded to it.

    Returns:
        `float`: the largest difference of a token's logits, as the median over tokens. The median is taken
        because rounding alone can make a token pick another expert.

    Raises:
        ValueError: if they differ by more than rounding does.

    Example:

    ```python
    >>> from transformers_emo.conversion import convert_olmo_core
    >>> convert_olmo_core("step10", "model", verify=True)  # doctest: +SKIP

    ```
    """
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(config.vocab_size, (_TOKENS,), generator=generator)
    expected_TV = training_logits(checkpoint, config, input_ids, dtype)
    model = modeling_emo.EmoForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits_TV = model(input_ids[None]).logits[0]
    difference = (logits_TV - expected_TV).abs().amax(-1).median().item()
    limit = _TOLERANCE * expected_TV.abs().max().item()
    if not difference <= limit:
        raise ValueError(
            f"The converted model's logits differ from the training checkpoint's by {difference:.3g}, "
            f"expected at most {limit:.3g}: nothing was kept. Please report this with the training config."
        )
    return difference


@torch.no_grad()
def training_logits(
    checkpoint: DistributedCheckpoint,
    config: EmoConfig,
    input_ids: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Compute the logits of one sequence from the tensors of a training checkpoint, as in training but
    without pools.

    Args:
        checkpoint (`DistributedCheckpoint`): the checkpoint. One layer at a time is in memory.
        config (`EmoConfig`): the config of the model.
        input_ids (`torch.Tensor`): (T,), int64, the token ids.
        dtype (`torch.dtype`, defaults to `torch.float32`): the dtype to which weights are rounded first.

    Returns:
        `torch.Tensor`: (T, V), float32, the logits over the tokenizer's vocabulary.

    Example: see `verify_logits`.
    """

    def weight(name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return checkpoint[f"model.{name}"].rows(start, stop).to(dtype).float()

    def norm(x_TD: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x_TD, x_TD.shape[-1:], weight(name), config.rms_norm_eps)

    x_TD = weight("embeddings.weight", 0, config.vocab_size)[input_ids]
    head_dim = config.hidden_size // config.num_attention_heads
    theta = torch.tensor(float(config.to_dict()["rope_theta"]))
    frequencies = theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(len(input_ids)).float(), frequencies).repeat(1, 2)
    for layer, experts in enumerate(config.layer_experts):
        block = f"blocks.{layer}"
        h_TD = norm(x_TD, f"{block}.attention_norm.weight")
        q_HTd, k_HTd, v_HTd = (
            F.linear(h_TD, weight(f"{block}.attention.w_{part}.weight"))
            .unflatten(-1, (-1, head_dim))
            .transpose(0, 1)
            for part in "qkv"
        )
        attended_HTd = F.scaled_dot_product_attention(
            _rotate(q_HTd, angles)[None],
            _rotate(k_HTd, angles)[None],
            v_HTd[None],
            is_causal=True,
            enable_gqa=True,
        )[0]
        attended_TD = attended_HTd.transpose(0, 1).flatten(1)
        x_TD = x_TD + F.linear(attended_TD, weight(f"{block}.attention.w_out.weight"))
        h_TD = norm(x_TD, f"{block}.feed_forward_norm.weight")
        if experts.is_dense:
            w1, w2, w3 = (weight(f"{block}.feed_forward.w{n}.weight") for n in (1, 2, 3))
            x_TD = x_TD + F.linear(F.silu(F.linear(h_TD, w1)) * F.linear(h_TD, w3), w2)
            continue
        router_ED = weight(f"{block}.feed_forward_moe.router.weight").view(experts.num_experts, -1)
        gates_TE = _gates(F.linear(h_TD, router_ED), experts, config.norm_topk_prob)
        f = config.intermediate_size
        for expert in gates_TE.any(0).nonzero().flatten().tolist():
            w1_FD, w2_FD, w3_FD = (
                weight(f"{block}.feed_forward_moe.experts.mlp.w{n}", expert * f, (expert + 1) * f)
                for n in (1, 2, 3)
            )
            tokens = gates_TE[:, expert].nonzero().flatten()
            picked_TD = h_TD[tokens]
            output_TD = (F.silu(picked_TD @ w1_FD.T) * (picked_TD @ w3_FD.T)) @ w2_FD
            x_TD[tokens] += gates_TE[tokens, expert, None] * output_TD
    return F.linear(norm(x_TD, "lm_head.norm.weight"), weight("lm_head.w_out.weight", 0, config.vocab_size))


def _gates(logits_TE: torch.Tensor, experts: LayerExperts, normed: bool) -> torch.Tensor:
    """The weight of each expert for each token: 0 if it is not picked, and 1 if it is shared."""
    gates_TE = torch.zeros_like(logits_TE)
    always = list(experts.always_active)
    if always:
        scores_TE = logits_TE.softmax(-1)
        ranked_TE = scores_TE.index_fill(1, torch.tensor(always), 2.0)  # above any probability
        picked = ranked_TE.topk(experts.top_k).indices
        return gates_TE.scatter(1, picked, scores_TE.gather(1, picked))
    scores_TR = logits_TE[:, : experts.num_routed].softmax(-1)
    weights, picked = scores_TR.topk(experts.top_k - experts.num_shared)
    if normed:
        weights = weights / weights.sum(-1, keepdim=True)
    gates_TE.scatter_(1, picked, weights)
    gates_TE[:, experts.num_routed :] = 1.0
    return gates_TE


def _rotate(x_HTd: torch.Tensor, angles_Td: torch.Tensor) -> torch.Tensor:
    first, second = x_HTd.chunk(2, -1)
    return x_HTd * angles_Td.cos() + torch.cat([-second, first], -1) * angles_Td.sin()
