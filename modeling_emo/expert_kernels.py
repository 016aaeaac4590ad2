"""`"emo_sorted"`: an experts implementation for training on a CPU.

Tokens are sorted by expert once; every expert is then two matrix products forward and four backward, each
into its place in one buffer, and all else runs over all picks at once. Transformers' own implementations
either build gradients of the size of all experts for every expert (`eager`), or go through a fallback
(`grouped_mm`).

Shape suffixes: T tokens, K experts taken per token, P = T * K picks, E experts, D hidden size, F expert
width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import grouped_mm_experts_forward


class _SortedExperts(torch.autograd.Function):
    """Weighted sum of each token's experts, SwiGLU with a SiLU."""

    @staticmethod
    def forward(ctx: Any, x_TD, gate_up_E2FD, down_EDF, weights_TK, index_TK):
        num_experts, hidden, width = down_EDF.shape
        top_k = index_TK.shape[1]
        expert_P, order_P = index_TK.flatten().sort(stable=True)
        # Under expert parallelism the id E stands for experts elsewhere. It sorts last, and is left out.
        counts = torch.bincount(expert_P, minlength=num_experts).tolist()[:num_experts]
        ends = torch.tensor(counts).cumsum(0).tolist()
        spans = [(e, end - n, end) for e, (n, end) in enumerate(zip(counts, ends, strict=True)) if n]
        place_P = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(len(order_P)))
        here = ends[-1]
        order_P = order_P[:here]
        token_P = order_P // top_k
        weight_P1 = weights_TK.reshape(-1, 1)[order_P]

        x_PD = x_TD.index_select(0, token_P)
        gate_up_P2F = x_PD.new_empty(here, 2 * width)
        for e, a, b in spans:
            torch.mm(x_PD[a:b], gate_up_E2FD[e].T, out=gate_up_P2F[a:b])
        gate_PF, up_PF = gate_up_P2F.chunk(2, dim=-1)
        act_PF = F.silu(gate_PF).mul_(up_PF)
        out_PD = x_PD.new_empty(len(place_P), hidden)
        for e, a, b in spans:
            torch.mm(act_PF[a:b], down_EDF[e].T, out=out_PD[a:b])
        out_PD[:here] *= weight_P1
        out_PD[here:] = 0
        ctx.save_for_backward(x_TD, gate_up_E2FD, down_EDF, weight_P1, gate_up_P2F, token_P, place_P)
        ctx.spans, ctx.top_k = spans, top_k
        return _sum_picks(out_PD, place_P, top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD):
        x_TD, gate_up_E2FD, down_EDF, weight_P1, gate_up_P2F, token_P, place_P = ctx.saved_tensors
        wants_x, wants_gate_up, wants_down, wants_weights, _ = ctx.needs_input_grad
        spans, top_k = ctx.spans, ctx.top_k
        here, width = len(token_P), down_EDF.shape[-1]
        # Rows of experts that no token took have no gradient; where there are none, nothing need be zeroed.
        new_grad = torch.empty_like if len(spans) == len(down_EDF) else torch.zeros_like
        grad_x = grad_gate_up = grad_down = grad_weights = None

        gate_PF, up_PF = gate_up_P2F.chunk(2, dim=-1)
        silu_PF = F.silu(gate_PF)
        act_PF = silu_PF * up_PF
        grad_PD = grad_TD.index_select(0, token_P)
        grad_act_PF = torch.empty_like(act_PF)
        for e, a, b in spans:
            torch.mm(grad_PD[a:b], down_EDF[e], out=grad_act_PF[a:b])
        if wants_weights:
            # A pick's weight times its output: the gradient is <grad, W act> = <W^T grad, act>.
            grad_weight_P1 = weight_P1.new_zeros(len(place_P), 1)
            grad_weight_P1[:here] = torch.linalg.vecdot(grad_act_PF, act_PF)[:, None]
            grad_weights = grad_weight_P1[place_P].view(-1, top_k)
        if wants_down:
            act_PF *= weight_P1
            grad_down = new_grad(down_EDF)
            for e, a, b in spans:
                torch.mm(grad_PD[a:b].T, act_PF[a:b], out=grad_down[e])
        if wants_gate_up or wants_x:
            grad_act_PF *= weight_P1
            grad_gate_up_P2F = torch.empty_like(gate_up_P2F)
            torch.mul(grad_act_PF, silu_PF, out=grad_gate_up_P2F[:, width:])
            grad_gate_up_P2F[:, :width] = torch.ops.aten.silu_backward(grad_act_PF.mul_(up_PF), gate_PF)
        if wants_gate_up:
            x_PD = x_TD.index_select(0, token_P)
            grad_gate_up = new_grad(gate_up_E2FD)
            for e, a, b in spans:
                torch.mm(grad_gate_up_P2F[a:b].T, x_PD[a:b], out=grad_gate_up[e])
        if wants_x:
            grad_x_PD = grad_PD.new_zeros(len(place_P), grad_PD.shape[1]) if here < len(place_P) else grad_PD
            for e, a, b in spans:
                torch.mm(grad_gate_up_P2F[a:b], gate_up_E2FD[e], out=grad_x_PD[a:b])
            grad_x = _sum_picks(grad_x_PD, place_P, top_k)
        return grad_x, grad_gate_up, grad_down, grad_weights, None


def _sum_picks(rows_PD: torch.Tensor, place_P: torch.Tensor, top_k: int) -> torch.Tensor:
    """Rows in the order of experts to their sums over each token's picks, (T, D)."""
    return rows_PD.index_select(0, place_P).view(-1, top_k, rows_PD.shape[-1]).sum(dim=1)


def sorted_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Weighted sum of each token's experts, for `ExpertsInterface`.

    Gradients are dense, and written once. The sizes of matrices depend on the routing, which no graph can
    hold: compiled, and on other devices, Transformers' `grouped_mm` runs instead.

    Args:
        self (`nn.Module`): stacked experts, `gate_up_proj` (E, 2F, D) with gate above up, and `down_proj` (E,
            D, F); SiLU, no biases.
        hidden_states (`torch.Tensor`): (T, D).
        top_k_index (`torch.Tensor`): (T, K); E marks a pick that another rank computes.
        top_k_weights (`torch.Tensor`): (T, K).

    Returns:
        `torch.Tensor`: (T, D) in the dtype of `hidden_states`.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoForCausalLM
    >>> model = EmoForCausalLM.from_pretrained(
    ...     "model_cards/toy-emo", experts_implementation="emo_sorted"
    ... )
    >>> ids = torch.tensor([[5, 6, 7]])
    >>> model(ids, labels=ids).loss.backward()

    ```
    """
    is_silu = self.config.hidden_act == "silu"  # type: ignore[union-attr]
    if hidden_states.device.type != "cpu" or torch.compiler.is_compiling() or not is_silu:
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_states.dtype
    output_TD = _SortedExperts.apply(
        hidden_states.to(dtype),
        self.gate_up_proj.to(dtype),
        self.down_proj.to(dtype),
        top_k_weights.to(dtype),
        top_k_index,
    )
    return output_TD.to(hidden_states.dtype)
