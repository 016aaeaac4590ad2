"""Products with weights in 8 and 4 bits, and their gradients.

On a CPU bfloat16 and float32 run compiled code, which unpacks weights in registers and never writes them
back. Elsewhere a weight is unpacked, an expert at a time, and PyTorch multiplies.

Where gradients are recorded (`torch.is_grad_enabled()`), activations are multiplied as they are. Where none
are, activations in bfloat16 are rounded to whole numbers of 8 bits, with a scale for each 32 of a row, if the
processor multiplies bytes faster (`PackedKernels.has_bytes`), as llama.cpp does. A number is then off by at
most 1/254 of the largest among its 32. One row and many are rounded alike, so that a sequence gives the same
alone and in a batch, but for the order of sums; only with AMX are 32 rows and more not rounded. Processors
without such products multiply bfloat16 itself or whole numbers of 16 bits, which are finer. Activations in
float32 are never rounded.

Shape suffixes: T tokens, K experts taken per token, E experts, D hidden size, F expert width.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..observers import is_observed
from .packed_kernels import PackedKernels, find_packed_kernels, fits
from .packed_weights import PackedWeight

_DTYPES = (torch.bfloat16, torch.float32)
# From so many rows on, for each matrix, PyTorch's bfloat16 products make up for an unpacked copy, unless
# bytes are multiplied, or 4 bits as float32 (measured on an AMD EPYC with AVX-512 BF16). With AMX they always
# do (a guess).
_MANY_ROWS = 32
_OUTPUTS_AT_ONCE = 2048  # unpacked, so that they stay in the caches


def unpacked(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight as numbers: `PackedWeight.dequantise`, by compiled code where there is some.

    Args:
        weight (`PackedWeight`): (..., N, K).
        dtype (`torch.dtype`): of floating point.

    Returns:
        `torch.Tensor`: (..., N, K), each number rounded once.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.kernels.packed.packed_products import unpacked
    >>> from transformers_emo.modeling_emo.kernels.packed.packed_weights import PackedWeight
    >>> weight = PackedWeight.quantise(torch.ones(2, 32), bits=4, group=32)
    >>> torch.equal(unpacked(weight, torch.float32), weight.dequantise(torch.float32))
    True

    ```
    """
    if torch.compiler.is_compiling() or is_observed():
        return weight.dequantise(dtype)
    return _unpacked(weight, dtype)


def packed_linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` with a packed weight, differentiable in the activations and the bias.

    Args:
        x (`torch.Tensor`): (..., K), of floating point.
        weight (`PackedWeight`): (N, K).
        bias (`torch.Tensor`, *optional*): (N,).

    Returns:
        `torch.Tensor`: (..., N), in the dtype of `x`, or that of autocast.

    Raises:
        ValueError: if the shapes do not fit each other.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.kernels.packed.packed_products import packed_linear
    >>> from transformers_emo.modeling_emo.kernels.packed.packed_weights import PackedWeight
    >>> weight = PackedWeight.quantise(torch.ones(2, 32), bits=4, group=32)
    >>> packed_linear(torch.ones(3, 32), weight).shape
    torch.Size([3, 2])

    ```
    """
    shape = weight.shape
    if (
        len(shape) != 2
        or x.dim() == 0
        or x.shape[-1] != shape[1]
        or (bias is not None and bias.shape != shape[:1])
    ):
        raise ValueError(
            f"Activations {tuple(x.shape)}, a packed weight {tuple(shape)} and a bias "
            f"{None if bias is None else tuple(bias.shape)} do not fit each other: expected (..., K), (N, K) "
            "and (N,) or None."
        )
    x = _autocast(x)
    bias = None if bias is None else bias.to(x.dtype)
    if _shows_operations() or _is_elsewhere(x, weight):
        return F.linear(x, weight.dequantise(x.dtype), bias)
    needs = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if needs or torch.compiler.is_compiling() or type(x) is not torch.Tensor:
        return torch.ops.transformers_emo.packed_linear(x, *_parts(weight), bias, _may_round())
    return _linear(x, weight, bias, _may_round())


def packed_experts(
    x_TD: torch.Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    weights_TK: torch.Tensor,
    index_TK: torch.Tensor,
) -> torch.Tensor:
    """Weighted sum of each token's experts, SwiGLU with a SiLU, differentiable in activations and weights.

    Args:
        x_TD (`torch.Tensor`): (T, D), of floating point.
        gate_up (`PackedWeight`): (E, 2F, D), gate above up.
        down (`PackedWeight`): (E, D, F).
        weights_TK (`torch.Tensor`): (T, K), what each expert's output is multiplied with.
        index_TK (`torch.Tensor`): (T, K), the experts; E marks a pick that another rank computes.

    Returns:
        `torch.Tensor`: (T, D), in the dtype of `x_TD`.

    Raises:
        ValueError: if the shapes do not fit each other.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.kernels.packed.packed_products import packed_experts
    >>> from transformers_emo.modeling_emo.kernels.packed.packed_weights import PackedWeight
    >>> gate_up = PackedWeight.quantise(torch.randn(2, 64, 32), bits=4, group=32)
    >>> down = PackedWeight.quantise(torch.randn(2, 32, 32), bits=4, group=32)
    >>> index = torch.tensor([[0], [1], [2]])  # the last is another rank's
    >>> packed_experts(torch.randn(3, 32), gate_up, down, torch.ones(3, 1), index)[2].any()
    tensor(False)

    ```
    """
    experts, hidden, width = down.shape if len(down.shape) == 3 else (-1, -1, -1)
    picks = tuple(index_TK.shape)
    if (
        tuple(gate_up.shape) != (experts, 2 * width, hidden)
        or len(picks) != 2
        or tuple(weights_TK.shape) != picks
        or tuple(x_TD.shape) != (picks[0], hidden)
    ):
        raise ValueError(
            f"Tokens {tuple(x_TD.shape)}, experts gate_up {tuple(gate_up.shape)} and down "
            f"{tuple(down.shape)}, weights {tuple(weights_TK.shape)} and index {picks} do not fit each "
            "other: expected (T, D), (E, 2F, D), (E, D, F), (T, K) and (T, K)."
        )
    dtype = x_TD.dtype
    x_TD = _autocast(x_TD)
    if _shows_operations() or _is_elsewhere(x_TD, gate_up, down):
        return _plain_experts(x_TD, gate_up, down, weights_TK, index_TK).to(dtype)
    needs = torch.is_grad_enabled() and (x_TD.requires_grad or weights_TK.requires_grad)
    if needs or torch.compiler.is_compiling() or type(x_TD) is not torch.Tensor:
        op = torch.ops.transformers_emo.packed_experts
        return op(x_TD, *_parts(gate_up), *_parts(down), weights_TK, index_TK, _may_round()).to(dtype)
    return _experts(x_TD, gate_up, down, weights_TK, index_TK, _may_round()).to(dtype)


# ---- which way ---------------------------------------------------------------------------------------------


def _shows_operations() -> bool:
    """Whether others look at the operations of a call, or write them down for programs without ours."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return is_observed()


def _may_round() -> bool:
    """Whether activations may be rounded to 8 bits: nobody trains, who would train on the rounding."""
    return not torch.is_grad_enabled()


def _autocast(x: torch.Tensor) -> torch.Tensor:
    device = x.device.type
    if not torch.is_autocast_enabled(device) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))


def _is_elsewhere(x: torch.Tensor, *weights: PackedWeight) -> bool:
    """Whether the operators below, which are for the CPU, cannot take these."""
    return not x.is_cpu or not all(weight.packed.is_cpu for weight in weights)


def _kernels_for(x: torch.Tensor, *weights: PackedWeight) -> PackedKernels | None:
    """The compiled kernels, if they can compute with these."""
    if x.dtype not in _DTYPES or x.is_neg() or not all(map(fits, weights)):
        return None
    if len({(weight.bits, weight.scale.dtype) for weight in weights}) > 1:
        return None
    return find_packed_kernels()


def _is_for_copies(
    kernels: PackedKernels, x: torch.Tensor, weight: PackedWeight, rows: int, may_round: bool
) -> bool:
    """Whether an unpacked copy and PyTorch's product are faster."""
    if rows < _MANY_ROWS or x.dtype != torch.bfloat16:
        return False
    if kernels.has_tiles:
        return True
    if may_round and kernels.has_bytes(weight.bits):
        return False
    return weight.bits == 8 or kernels.has_bytes(8)  # processors with these multiply bfloat16 too


def _unpacked(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    kernels = find_packed_kernels() if dtype in _DTYPES and fits(weight) else None
    return weight.dequantise(dtype) if kernels is None else kernels.unpack(weight, dtype)


def _linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, may_round: bool
) -> torch.Tensor:
    kernels = _kernels_for(x, weight)
    if kernels is None:
        return F.linear(x, _unpacked(weight, x.dtype), bias)
    if _is_for_copies(kernels, x, weight, x.numel() // max(x.shape[-1], 1), may_round):
        return _linear_by_copies(x, weight, bias)
    rows_MK = x.reshape(-1, x.shape[-1]).contiguous()
    bias = None if bias is None else bias.contiguous()
    found = kernels.linear(rows_MK, weight, bias, may_round=may_round)
    return found.view(*x.shape[:-1], weight.shape[0])


def _linear_by_copies(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Some outputs after the other, so that a copy of a large weight takes no memory."""
    output = x.new_empty(*x.shape[:-1], weight.shape[0])
    for start in range(0, weight.shape[0], _OUTPUTS_AT_ONCE):
        some = slice(start, start + _OUTPUTS_AT_ONCE)
        copy = _unpacked(weight.map(lambda part, some=some: part[some]), x.dtype)
        output[..., some] = F.linear(x, copy, None if bias is None else bias[some])
    return output


def _experts(
    x_TD, gate_up: PackedWeight, down: PackedWeight, weights_TK, index_TK, may_round: bool
) -> torch.Tensor:
    kernels = _kernels_for(x_TD, gate_up, down)
    rows = index_TK.numel() // max(down.shape[0], 1)
    if kernels is None or _is_for_copies(kernels, x_TD, down, rows, may_round):
        return _experts_one_by_one(x_TD, gate_up, down, weights_TK, index_TK)
    weights_TK, index_TK = weights_TK.float().contiguous(), index_TK.long().contiguous()
    return kernels.experts(x_TD.contiguous(), gate_up, down, weights_TK, index_TK, may_round=may_round)


# ---- experts by PyTorch's products -------------------------------------------------------------------------


def _expert(weight: PackedWeight, expert: int, dtype: torch.dtype) -> torch.Tensor:
    return _unpacked(weight.map(lambda part: part[expert]), dtype)


def _taken(index_TK: torch.Tensor, experts: int) -> list[int]:
    return [expert for expert in index_TK.unique().tolist() if 0 <= expert < experts]


def _experts_one_by_one(x_TD, gate_up, down, weights_TK, index_TK) -> torch.Tensor:
    """The experts that are taken, each unpacked once for its tokens."""
    output_TD = torch.zeros_like(x_TD, dtype=_sums(x_TD.dtype))
    for expert in _taken(index_TK, down.shape[0]):
        token, slot = torch.where(index_TK == expert)
        gate, up = (x_TD[token] @ _expert(gate_up, expert, x_TD.dtype).T).chunk(2, dim=-1)
        out = (F.silu(gate) * up) @ _expert(down, expert, x_TD.dtype).T
        output_TD.index_add_(
            0, token, out.to(output_TD.dtype) * weights_TK[token, slot, None].to(output_TD.dtype)
        )
    return output_TD.to(x_TD.dtype)


def _plain_experts(x_TD, gate_up, down, weights_TK, index_TK) -> torch.Tensor:
    """The same by operations that PyTorch differentiates in every way and transforms.

    Every expert runs on all tokens, since under some transforms nobody can see which tokens take it.
    """
    output_TD = torch.zeros_like(x_TD)
    for expert in range(down.shape[0]):
        first, second = (
            weight.map(lambda part, e=expert: part[e]).dequantise(x_TD.dtype) for weight in (gate_up, down)
        )
        gate_TF, up_TF = F.linear(x_TD, first).chunk(2, dim=-1)
        expert_TD = F.linear(F.silu(gate_TF) * up_TF, second)
        takes_TK = index_TK == expert
        weight_T1 = weights_TK.masked_fill(~takes_TK, 0).sum(dim=-1, keepdim=True).to(x_TD.dtype)
        # Where nobody takes it a large output stays out, which times 0 may be NaN.
        output_TD = output_TD + expert_TD.masked_fill(~takes_TK.any(dim=-1, keepdim=True), 0) * weight_T1
    return output_TD


# ---- operators, with gradients -----------------------------------------------------------------------------
# They take a weight as its tensors, with or without zero points, and as its bits and group.


def _parts(weight: PackedWeight) -> tuple[list[torch.Tensor], list[int]]:
    return list(weight.tensors.values()), [weight.bits, weight.group]


def _weight(tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> PackedWeight:
    packed, scale, *zero = tensors
    return PackedWeight(packed, scale, zero[0] if zero else None, *sizes)


@torch.library.custom_op("transformers_emo::packed_linear", mutates_args=(), device_types="cpu")
def _linear_op(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    sizes: Sequence[int],
    bias: torch.Tensor | None,
    may_round: bool,
) -> torch.Tensor:
    return _linear(x, _weight(weight, sizes), bias, may_round)


@_linear_op.register_fake
def _(x, weight, sizes, bias, may_round):
    return x.new_empty(*x.shape[:-1], weight[0].shape[0])


def _keep_linear(ctx: Any, inputs, output) -> None:
    _, weight, ctx.sizes, bias, _ = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(*weight)


def _linear_backward(ctx: Any, grad: torch.Tensor):
    weight = ctx.saved_tensors
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        of_x = grad @ torch.ops.transformers_emo.unpacked(weight, ctx.sizes, grad.dtype)
    if ctx.has_bias and ctx.needs_input_grad[3]:
        of_bias = grad.flatten(0, -2).sum(dim=0) if grad.dim() > 1 else grad
    return of_x, [None] * len(weight), None, of_bias, None


_linear_op.register_autograd(_linear_backward, setup_context=_keep_linear)


@torch.library.custom_op("transformers_emo::unpacked", mutates_args=(), device_types="cpu")
def _unpacked_op(weight: Sequence[torch.Tensor], sizes: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return _unpacked(_weight(weight, sizes), dtype)


@_unpacked_op.register_fake
def _(weight, sizes, dtype):
    packed = weight[0]
    return packed.new_empty(*packed.shape[:-1], packed.shape[-1] * (32 // sizes[0]), dtype=dtype)


@torch.library.custom_op("transformers_emo::packed_experts", mutates_args=(), device_types="cpu")
def _experts_op(
    x: torch.Tensor,
    gate_up: Sequence[torch.Tensor],
    gate_up_sizes: Sequence[int],
    down: Sequence[torch.Tensor],
    down_sizes: Sequence[int],
    weights: torch.Tensor,
    index: torch.Tensor,
    may_round: bool,
) -> torch.Tensor:
    return _experts(x, _weight(gate_up, gate_up_sizes), _weight(down, down_sizes), weights, index, may_round)


@_experts_op.register_fake
def _(x, *others):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("transformers_emo::packed_experts_backward", mutates_args=(), device_types="cpu")
def _experts_backward_op(
    grad: torch.Tensor,
    x: torch.Tensor,
    gate_up: Sequence[torch.Tensor],
    gate_up_sizes: Sequence[int],
    down: Sequence[torch.Tensor],
    down_sizes: Sequence[int],
    weights: torch.Tensor,
    index: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the tokens and the weights. Each expert is unpacked again."""
    first, second = _weight(gate_up, gate_up_sizes), _weight(down, down_sizes)
    of_x, of_weights = torch.zeros_like(x, dtype=_sums(x.dtype)), torch.zeros_like(weights)
    for expert in _taken(index, second.shape[0]):
        token, slot = torch.where(index == expert)
        gate_up_2FD, down_DF = _expert(first, expert, x.dtype), _expert(second, expert, x.dtype)
        gate, up = (x[token] @ gate_up_2FD.T).chunk(2, dim=-1)
        silu = F.silu(gate)
        # A pick's weight times its output: the gradient is <grad, W act> = <W^T grad, act>.
        of_act = grad[token] @ down_DF
        of_weights[token, slot] = torch.linalg.vecdot(of_act, silu * up).to(weights.dtype)
        of_act *= weights[token, slot, None].to(of_act.dtype)
        of_gate = torch.ops.aten.silu_backward(of_act * up, gate)
        of_x.index_add_(0, token, (torch.cat([of_gate, of_act * silu], dim=-1) @ gate_up_2FD).to(of_x.dtype))
    return of_x.to(x.dtype), of_weights


def _sums(dtype: torch.dtype) -> torch.dtype:
    """In which to sum over the experts of a token."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


@_experts_backward_op.register_fake
def _(grad, x, *others):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(others[-2])


def _keep_experts(ctx: Any, inputs, output) -> None:
    x, gate_up, gate_up_sizes, down, down_sizes, weights, index, _ = inputs
    ctx.lengths, ctx.sizes = (len(gate_up), len(down)), (gate_up_sizes, down_sizes)
    ctx.save_for_backward(x, weights, index, *gate_up, *down)


def _experts_backward(ctx: Any, grad: torch.Tensor):
    x, weights, index, *parts = ctx.saved_tensors
    cut = ctx.lengths[0]
    first, second = _weight(parts[:cut], ctx.sizes[0]), _weight(parts[cut:], ctx.sizes[1])
    wants = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
    if torch.is_grad_enabled():  # the gradients are to be differentiated themselves
        # Views, so that a gradient is that of one input and leaves out how the others depend on it.
        inputs = [tensor.view_as(tensor) for tensor in (x, weights)]
        output = _plain_experts(inputs[0], first, second, inputs[1], index)
        wanted = [tensor for tensor, want in zip(inputs, wants, strict=True) if want]
        found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
        of_x, of_weights = (next(found) if want else None for want in wants)
    else:
        op = torch.ops.transformers_emo.packed_experts_backward
        of_x, of_weights = op(grad, x, *_parts(first), *_parts(second), weights, index)
    nothing = ([None] * ctx.lengths[0], None, [None] * ctx.lengths[1], None)
    return of_x if wants[0] else None, *nothing, of_weights if wants[1] else None, None, None


_experts_op.register_autograd(_experts_backward, setup_context=_keep_experts)
