"""`"emo"`, the experts implementation of EMO on a CPU, and `"emo_sorted"`, the same without compiled code.

Forward and backward are in C++ (`native/`). Without compiled code, and for other dtypes, tokens are sorted by
expert once. Forward, every expert is then two matrix products, each into its place in one buffer. Backward it
is four. All other steps run over all picks at once. Transformers' `eager` builds gradients of the size of all
experts for every expert, and its `grouped_mm` runs a fallback on CPUs.

Shape suffixes: T tokens, K experts taken per token, P = T * K picks, E experts, D hidden size, F expert
width.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import integrations  # not its `moe`, which is still being imported when this is registered

from .gradient_memory import empty_gradient
from .native_calls import Kernels
from .native_library import find_kernels
from .observers import is_observed, is_transformed
from .packed.packed_products import packed_experts
from .packed.packed_tensor import PackedTensor
from .private_torch import private_torch

_is_wrapper = private_torch("torch.utils._python_dispatch.is_traceable_wrapper_subclass")
_COMPILED_DTYPES = (torch.bfloat16, torch.float32)
_DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
# With neither AMX nor AVX-512, PyTorch's float32 products are as fast as the kernel from so many rows an
# expert on. For gradients they are always as fast (both measured).
_MANY_ROWS = 192


class _Sorting:
    """The order of picks by expert, and by token within an expert. Picks of other ranks are left out."""

    def __init__(self, index_TK: torch.Tensor, num_experts: int):
        self.top_k = index_TK.shape[1]
        expert_P, order_P = index_TK.flatten().sort(stable=True)
        # Under expert parallelism the id E stands for experts elsewhere. It sorts last.
        counts = torch.bincount(expert_P, minlength=num_experts).tolist()[:num_experts]
        ends = torch.tensor(counts).cumsum(0).tolist()
        self.spans = [(e, end - n, end) for e, (n, end) in enumerate(zip(counts, ends, strict=True)) if n]
        self.place_P = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(len(order_P)))
        self.picks, self.here = len(order_P), ends[-1]
        self.order_P = order_P[: self.here]
        self.token_P = self.order_P // self.top_k

    def sum_picks(self, rows_PD: torch.Tensor) -> torch.Tensor:
        """Sum the rows, which are in the order of experts, over the picks of each token: (T, D)."""
        return rows_PD.index_select(0, self.place_P).view(-1, self.top_k, rows_PD.shape[-1]).sum(dim=1)


def _sorted_forward(x_TD, gate_up_E2FD, down_EDF, weights_TK, index_TK):
    """The output, and gate and up of every pick in the sorted order."""
    num_experts, hidden, width = down_EDF.shape
    sorting = _Sorting(index_TK, num_experts)
    here = sorting.here
    x_PD = x_TD.index_select(0, sorting.token_P)
    gate_up_P2F = x_PD.new_empty(sorting.picks, 2 * width)
    gate_up_P2F[here:] = 0
    for e, a, b in sorting.spans:
        torch.mm(x_PD[a:b], gate_up_E2FD[e].T, out=gate_up_P2F[a:b])
    gate_PF, up_PF = gate_up_P2F[:here].chunk(2, dim=-1)
    act_PF = F.silu(gate_PF).mul_(up_PF)
    out_PD = x_PD.new_empty(sorting.picks, hidden)
    for e, a, b in sorting.spans:
        torch.mm(act_PF[a:b], down_EDF[e].T, out=out_PD[a:b])
    out_PD[:here] *= weights_TK.reshape(-1, 1)[sorting.order_P].to(out_PD.dtype)
    out_PD[here:] = 0
    return sorting.sum_picks(out_PD), gate_up_P2F


def _sorted_backward(grad_TD, x_TD, gate_up_E2FD, down_EDF, weights_TK, index_TK, gate_up_P2F, wants):
    """The wanted gradients among those of x, gate_up, down and weights; `None` for the others."""
    wants_x, wants_gate_up, wants_down, wants_weights = wants
    num_experts, _, width = down_EDF.shape
    sorting = _Sorting(index_TK, num_experts)
    spans, here, token_P = sorting.spans, sorting.here, sorting.token_P
    grad_x = grad_gate_up = grad_down = grad_weights = None
    gate_up_P2F = gate_up_P2F[:here]
    weight_P1 = weights_TK.reshape(-1, 1)[sorting.order_P].to(x_TD.dtype)

    gate_PF, up_PF = gate_up_P2F.chunk(2, dim=-1)
    silu_PF = F.silu(gate_PF)
    act_PF = silu_PF * up_PF
    grad_PD = grad_TD.index_select(0, token_P)
    grad_act_PF = torch.empty_like(act_PF)
    for e, a, b in spans:
        torch.mm(grad_PD[a:b], down_EDF[e], out=grad_act_PF[a:b])
    if wants_weights:
        # A pick's weight times its output: the gradient is <grad, W act> = <W^T grad, act>.
        grad_weight_P1 = weight_P1.new_zeros(sorting.picks, 1)
        grad_weight_P1[:here] = torch.linalg.vecdot(grad_act_PF, act_PF)[:, None]
        grad_weights = grad_weight_P1[sorting.place_P].view(-1, sorting.top_k).to(weights_TK.dtype)
    if wants_down:
        act_PF *= weight_P1
        grad_down = _new_gradient(down_EDF, spans)
        for e, a, b in spans:
            torch.mm(grad_PD[a:b].T, act_PF[a:b], out=grad_down[e])
    if wants_gate_up or wants_x:
        grad_act_PF *= weight_P1
        grad_gate_up_P2F = torch.empty_like(gate_up_P2F)
        torch.mul(grad_act_PF, silu_PF, out=grad_gate_up_P2F[:, width:])
        grad_gate_up_P2F[:, :width] = torch.ops.aten.silu_backward(grad_act_PF.mul_(up_PF), gate_PF)
    if wants_gate_up:
        x_PD = x_TD.index_select(0, token_P)
        grad_gate_up = _new_gradient(gate_up_E2FD, spans)
        for e, a, b in spans:
            torch.mm(grad_gate_up_P2F[a:b].T, x_PD[a:b], out=grad_gate_up[e])
    if wants_x:
        grad_x_PD = grad_PD.new_empty(sorting.picks, grad_PD.shape[1])
        grad_x_PD[here:] = 0
        for e, a, b in spans:
            torch.mm(grad_gate_up_P2F[a:b], gate_up_E2FD[e], out=grad_x_PD[a:b])
        grad_x = sorting.sum_picks(grad_x_PD)
    return grad_x, grad_gate_up, grad_down, grad_weights


def _new_gradient(weight: torch.Tensor, spans: list[tuple[int, int, int]]) -> torch.Tensor:
    """Memory for a gradient: zeros for experts without a pick; the rows of the others are not yet written."""
    gradient = empty_gradient(weight)
    for e in set(range(len(weight))) - {e for e, _, _ in spans}:
        gradient[e].zero_()
    return gradient


@torch.library.custom_op("transformers_emo::experts", mutates_args=(), device_types="cpu")
def _experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    index: torch.Tensor,
    native: bool,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One operator for compiled graphs, since the sizes of its products depend on the routing."""
    return _compute(x, gate_up, down, weights, index, native, save)


def _kernels_for(x, gate_up, down, index, *, backward: bool = False) -> Kernels | None:
    """The compiled kernels, if they can compute this and are the fastest way to do so."""
    if x.dtype not in _COMPILED_DTYPES or not (gate_up.is_contiguous() and down.is_contiguous()):
        return None
    if gate_up.is_neg() or down.is_neg():  # a view whose memory holds other numbers
        return None
    kernels = find_kernels()
    sizes = down.shape[1:]
    if kernels is None or kernels.fits_tiles(*sizes):
        return kernels
    if backward:
        return kernels if kernels.has_panels and kernels.fits_gradients(*sizes) else None
    many_rows = x.dtype == torch.float32 and index.numel() >= _MANY_ROWS * len(down)
    return None if many_rows and not kernels.has_panels else kernels


def _compute(x, gate_up, down, weights, index, native: bool, save: bool):
    """The output, and gate and up of every pick in the sorted order (no rows without `save`)."""
    kernels = _kernels_for(x, gate_up, down, index) if native else None
    if kernels is None:
        out, saved = _sorted_forward(x, gate_up, down, weights, index)
        return out, saved if save else saved.new_empty(0, saved.shape[1])
    weights, index = weights.float().contiguous(), index.long().contiguous()
    return kernels.experts(x.contiguous(), gate_up, down, weights, index, save=save)


@_experts.register_fake
def _(x, gate_up, down, weights, index, native, save):
    saved = x.new_empty(index.shape[0] * index.shape[1] if save else 0, gate_up.shape[1])
    return torch.empty_like(x, memory_format=torch.contiguous_format), saved


@torch.library.custom_op("transformers_emo::experts_backward", mutates_args=(), device_types="cpu")
def _experts_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    index: torch.Tensor,
    saved: torch.Tensor,
    wants: list[bool],
    native: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    kernels = _kernels_for(x, gate_up, down, index, backward=True) if native else None
    if kernels is None:
        gradients = _sorted_backward(grad, x, gate_up, down, weights, index, saved, wants)
    else:
        routing = weights.float().contiguous(), index.long().contiguous()
        inputs = grad.contiguous(), x.contiguous(), gate_up, down, *routing, saved
        *gradients, grad_weights = kernels.experts_backward(*inputs, wants)
        gradients = *gradients, None if grad_weights is None else grad_weights.to(weights.dtype)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)  # type: ignore


@_experts_backward.register_fake
def _(grad, x, gate_up, down, weights, index, saved, wants, native):
    tensors = zip((x, gate_up, down, weights), wants, strict=True)
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if wanted else x.new_empty(0)
        for tensor, wanted in tensors
    )


def _keep(ctx: Any, inputs, output) -> None:
    x, gate_up, down, weights, index, native, _ = inputs
    ctx.native = native
    ctx.save_for_backward(x, gate_up, down, weights, index, output[1])


def _backward(ctx: Any, grad, _):
    wants = list(ctx.needs_input_grad[:4])
    if torch.is_grad_enabled():  # the gradients are to be differentiated themselves
        x_TD, gate_up_E2FD, down_EDF, weights_TK, index_TK = ctx.saved_tensors[:5]
        gradients = _differentiable_backward(grad, x_TD, gate_up_E2FD, down_EDF, weights_TK, index_TK, wants)
        return *gradients, None, None, None
    gradients = torch.ops.transformers_emo.experts_backward(grad, *ctx.saved_tensors, wants, ctx.native)
    return *(g if wanted else None for g, wanted in zip(gradients, wants, strict=True)), None, None, None


def _plain_forward(x_TD, gate_up_E2FD, down_EDF, weights_TK, index_TK):
    """The output, by operations that PyTorch differentiates in every way and transforms.

    Every expert runs on all tokens, since under some transforms nobody can see which tokens take it.
    """
    output_TD = torch.zeros_like(x_TD)
    for expert, (gate_up, down) in enumerate(zip(gate_up_E2FD, down_EDF, strict=True)):
        gate_TF, up_TF = F.linear(x_TD, gate_up).chunk(2, dim=-1)
        expert_TD = F.linear(F.silu(gate_TF) * up_TF, down)
        takes_TK = index_TK == expert
        weight_T1 = weights_TK.masked_fill(~takes_TK, 0).sum(dim=-1, keepdim=True).to(x_TD.dtype)
        # Where nobody takes it a large output stays out, which times 0 may be NaN.
        output_TD = output_TD + expert_TD.masked_fill(~takes_TK.any(dim=-1, keepdim=True), 0) * weight_T1
    return output_TD


def _differentiable_backward(grad, x, gate_up, down, weights, index, wants):
    # Views, so that a gradient is that of one input and leaves out the way by which the others depend on it.
    inputs = [tensor.view_as(tensor) for tensor in (x, gate_up, down, weights)]
    output = _plain_forward(inputs[0], inputs[1], inputs[2], inputs[3], index)
    wanted = [tensor for tensor, want in zip(inputs, wants, strict=True) if want]
    found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
    return [next(found) if want else None for want in wants]


_experts.register_autograd(_backward, setup_context=_keep)


def _check_weights(self: nn.Module, hidden: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> None:
    """Check tensors that somebody may have put in by hand. PyTorch's own products do not refuse all of them.

    They read nothing from the meta device, and take numbers of 8 bits without their scale.
    """
    sizes = down.shape
    if (
        len(sizes) == 3
        and sizes[0] == self.num_experts
        and sizes[1] == hidden.shape[-1]
        and gate_up.shape == (sizes[0], 2 * sizes[2], sizes[1])
        and gate_up.dtype in _DTYPES
        and down.dtype in _DTYPES
        and gate_up.device == down.device == hidden.device
    ):
        return
    found = ", ".join(
        f"{name} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
        for name, tensor in (
            ("tokens (T, D)", hidden),
            ("gate_up (E, 2F, D)", gate_up),
            ("down (E, D, F)", down),
        )
    )
    raise ValueError(
        f"Tokens and the weights of {self.num_experts} experts do not fit each other, or are not all on one "
        f"device and floating point of 16 to 64 bits: {found}. Change those that differ. "
        "(`quantization_config=PackedConfig(bits=4)` keeps experts in fewer bits.)"
    )


def _forward(self: nn.Module, hidden_states, top_k_index, top_k_weights, native: bool) -> torch.Tensor:
    gate_up: torch.Tensor = self.gate_up_proj  # type: ignore[assignment]
    down: torch.Tensor = self.down_proj  # type: ignore[assignment]
    if isinstance(gate_up, PackedTensor) and isinstance(down, PackedTensor):
        return _packed_forward(self, hidden_states, gate_up, down, top_k_index, top_k_weights)
    # An adapter on one of them makes numbers of it.
    gate_up, down = (w.dequantize() if isinstance(w, PackedTensor) else w for w in (gate_up, down))
    is_ours = (
        hidden_states.device.type == "cpu"
        and self.config.hidden_act == "silu"  # type: ignore[union-attr]
        and not torch.compiler.is_exporting()  # other programs do not know this operator
        and not torch.jit.is_tracing()  # nor do they here
        and not _is_wrapper(gate_up)  # quantised or distributed
    )
    if not is_ours:
        return integrations.moe.grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    _check_weights(self, hidden_states, gate_up, down)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_states.dtype
    gate_up, down = gate_up.to(dtype), down.to(dtype)
    inputs = hidden_states.to(dtype), gate_up, down, top_k_weights, top_k_index
    if is_transformed():
        return _plain_forward(*inputs).to(hidden_states.dtype)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs[:4])
    is_plain = type(hidden_states) is torch.Tensor
    if is_plain and not (save or torch.compiler.is_compiling() or is_observed()):
        # The dispatcher of operators takes as long as the experts of a small model.
        return _compute(*inputs, native, save=False)[0].to(hidden_states.dtype)
    output_TD, _ = torch.ops.transformers_emo.experts(*inputs, native, save)
    return output_TD.to(hidden_states.dtype)


def _packed_forward(
    self: nn.Module, hidden_states, gate_up: PackedTensor, down: PackedTensor, top_k_index, top_k_weights
) -> torch.Tensor:
    if self.config.hidden_act != "silu":  # type: ignore[union-attr]
        plain = inspect.unwrap(type(self).forward)
        return plain(self, hidden_states, top_k_index, top_k_weights)
    dtype = hidden_states.dtype
    if torch.is_autocast_enabled(hidden_states.device.type):
        dtype = torch.get_autocast_dtype(hidden_states.device.type)
    output = packed_experts(hidden_states.to(dtype), gate_up.weight, down.weight, top_k_weights, top_k_index)
    return output.to(hidden_states.dtype)


def emo_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Weighted sum of each token's experts, for `ExpertsInterface`: the default on a CPU.

    The results are those of `eager` within the tolerance of the dtype. Gradients are dense, and written once.
    bfloat16 and float32 run compiled code (`native_library.find_kernels`), which gives the same bits with any
    number of threads. With neither AMX nor AVX-512, gradients and float32 with very many tokens for each
    expert run PyTorch's products. On other devices, for activations other than SiLU and for quantised
    experts, Transformers' `grouped_mm` runs.

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
    >>> model = EmoForCausalLM.from_pretrained("model_cards/toy-emo")
    >>> ids = torch.tensor([[5, 6, 7]])
    >>> model(ids, labels=ids).loss.backward()

    ```
    """
    return _forward(self, hidden_states, top_k_index, top_k_weights, native=True)


def sorted_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """As `emo_experts_forward`, but only with PyTorch's own matrix products: `"emo_sorted"`.

    Args:
        self, hidden_states, top_k_index, top_k_weights: as in `emo_experts_forward`.

    Returns:
        `torch.Tensor`: (T, D) in the dtype of `hidden_states`.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoForCausalLM
    >>> model = EmoForCausalLM.from_pretrained(
    ...     "model_cards/toy-emo", experts_implementation="emo_sorted"
    ... )
    >>> logits = model(torch.tensor([[5, 6, 7]])).logits

    ```
    """
    return _forward(self, hidden_states, top_k_index, top_k_weights, native=False)
