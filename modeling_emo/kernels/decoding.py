"""A layer of experts for one token of each sequence, in two calls of compiled code.

Called one by one, the parts of a layer take longer than their work: a token's weights are read in two to four
milliseconds, and every call of Python or PyTorch leaves the memory idle.

Shape suffixes: B sequences, D hidden size, H heads, G heads of keys and values, W head size, N tokens so far,
E experts, F expert width.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .expert_kernels import emo_experts_forward
from .layer_kernels import is_faster, kernels_for
from .native_calls import Kernels, holds_all
from .observers import is_observed

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


class _Attention(ctypes.Structure):
    """`EmoAttention` of `native/decoding.h`."""

    _fields_ = (
        *((name, _POINTER) for name in ("query", "keys", "values", "mask")),
        *((name, _SIZE) for name in ("B", "H", "G", "N", "W")),
        ("key_strides", _SIZE * 3),
        ("value_strides", _SIZE * 3),
        ("mask_strides", _SIZE * 2),
        ("scaling", ctypes.c_float),
    )


class _Decoding(ctypes.Structure):
    """`EmoDecoding` of `native/decoding.h`."""

    _fields_ = (
        *((name, _POINTER) for name in ("hidden", "norm", "output", "output_bias", "attended", "router")),
        *((name, _POINTER) for name in ("gate_up", "down", "allowed", "out")),
        *((name, _SIZE) for name in ("allowed_stride", "E", "D", "F", "shared", "top_k")),
        ("normalise", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
    )


def _are_weights(dtype: torch.dtype, weights: list[torch.Tensor]) -> bool:
    """Whether C++ can read them all: plain, whole and of one dtype."""
    for weight in weights:  # noqa: SIM110  `all` of a generator takes twice as long
        if not (
            type(weight) in (nn.Parameter, torch.Tensor)
            and weight.dtype is dtype
            and weight.is_cpu
            and weight.is_contiguous()
            and not weight.is_neg()
            and weight.data_ptr()
            and holds_all(weight)
        ):
            return False
    return True


class DecodedLayer:
    """One forward of a layer for one token of each sequence; made by `decode_layer`.

    Example: see `decode_layer`.
    """

    def __init__(self, kernels: Kernels, layer: Any, hidden_BSD: torch.Tensor, head_size: int):
        self._kernels, self._layer, self._hidden_BSD = kernels, layer, hidden_BSD
        self._head_size = head_size
        self._is_bf16 = hidden_BSD.dtype == torch.bfloat16

    def heads(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (B, H, 1, W), keys and values (B, G, 1, W), with positions.

        Args:
            cos, sin (`torch.Tensor`): (B or 1, 1, W) float32, as `decode_layer` has checked.
        """
        attention, norm = self._layer.self_attn, self._layer.pre_attention_layernorm
        batch, _, hidden = self._hidden_BSD.shape
        width = self._head_size
        linears = attention.q_proj, attention.k_proj, attention.v_proj
        weights = [linear.weight for linear in linears]
        heads = [len(weight) // width for weight in weights]
        found = [self._hidden_BSD.new_empty(batch, each, 1, width) for each in heads]
        cos, sin = cos.contiguous(), sin.contiguous()
        three = _POINTER * 3
        failed = self._kernels.library.emo_decode_heads(
            self._is_bf16,
            _POINTER(self._hidden_BSD.data_ptr()),
            _POINTER(norm.weight.data_ptr()),
            ctypes.c_float(norm.variance_epsilon),
            three(*(weight.data_ptr() for weight in weights)),
            three(*(None if linear.bias is None else linear.bias.data_ptr() for linear in linears)),
            _POINTER(cos.data_ptr()),
            _POINTER(sin.data_ptr()),
            _SIZE(len(cos)),
            three(*(tensor.data_ptr() for tensor in found)),
            _SIZE(batch),
            _SIZE(hidden),
            (_SIZE * 3)(*heads),
            _SIZE(width),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"No memory for {batch} tokens of {hidden} numbers: decode fewer sequences.")
        return found[0], found[1], found[2]

    def rest(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        expert_mask: torch.Tensor | None,
        attend: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """What the layer gives (B, 1, D), once keys and values are in the cache.

        Args:
            query (`torch.Tensor`): (B, H, 1, W), from `heads`.
            key, value (`torch.Tensor`): (B, G, N, W), of all tokens.
            attention_mask (`torch.Tensor`, *optional*): (B or 1, 1, 1, N) bool, or another one.
            expert_mask (`torch.Tensor`, *optional*): bool, (E,) or (B, E), as `decode_layer` has checked.
            attend (`Callable`): the attention (B, 1, H, W) by PyTorch, for keys or masks of other kinds.
        """
        layer, hidden_BSD = self._layer, self._hidden_BSD
        mlp, norm = layer.mlp, layer.pre_feedforward_layernorm
        batch, _, hidden = hidden_BSD.shape
        experts, _, width = mlp.experts.down_proj.shape
        heads, head_size = query.shape[1], query.shape[3]
        attention = _Attention(
            query=query.data_ptr(), B=batch, H=heads, W=head_size, scaling=layer.self_attn.scaling
        )
        kept = None  # tensors whose memory is in use during the call
        if _is_seen(query, key, value, attention_mask):
            attention.G, attention.N = key.shape[1:3]
            attention.keys, attention.values = key.data_ptr(), value.data_ptr()
            attention.key_strides[:], attention.value_strides[:] = key.stride()[:3], value.stride()[:3]
            if attention_mask is not None:
                mask_BN = attention_mask[:, 0, 0].expand(batch, -1)
                attention.mask, attention.mask_strides[:] = mask_BN.data_ptr(), mask_BN.stride()
        else:
            kept = attend().reshape(batch, heads * head_size).contiguous()
        out_BSD = torch.empty_like(hidden_BSD)
        output, choice = layer.self_attn.o_proj, mlp.gate.layer
        decoding = _Decoding(
            hidden=hidden_BSD.data_ptr(),
            norm=norm.weight.data_ptr(),
            output=output.weight.data_ptr(),
            output_bias=None if output.bias is None else output.bias.data_ptr(),
            attended=None if kept is None else kept.data_ptr(),
            router=mlp.gate.weight.data_ptr(),
            gate_up=mlp.experts.gate_up_proj.data_ptr(),
            down=mlp.experts.down_proj.data_ptr(),
            allowed=None if expert_mask is None else expert_mask.data_ptr(),
            out=out_BSD.data_ptr(),
            allowed_stride=0 if expert_mask is None or expert_mask.dim() == 1 else expert_mask.stride(0),
            E=experts,
            D=hidden,
            F=width,
            shared=choice.num_shared,
            top_k=choice.top_k,
            normalise=mlp.gate.norm_topk_prob,
            epsilon=norm.variance_epsilon,
        )
        if self._kernels.library.emo_decode(
            self._is_bf16, ctypes.byref(attention), ctypes.byref(decoding), torch.get_num_threads()
        ):
            raise MemoryError(f"No memory for {batch} tokens of {hidden} numbers: decode fewer sequences.")
        return out_BSD


def _is_seen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether C++ can read keys, values and mask: a cache may hand out other tensors than it was given."""
    (batch, heads, _, width), length = query.shape, key.shape[-2]
    for tensor in (key, value):
        if not (
            type(tensor) is torch.Tensor
            and tensor.dtype is query.dtype
            and tensor.is_cpu
            and not tensor.is_neg()
            and tensor.dim() == 4
            and tensor.shape == (batch, key.shape[1], length, width)
            and (tensor.stride(3) == 1 or width == 1)
            and tensor.data_ptr()
        ):
            return False
    if heads % key.shape[1]:
        return False
    return mask is None or (
        type(mask) is torch.Tensor
        and mask.dtype is torch.bool
        and mask.is_cpu
        and mask.shape in ((batch, 1, 1, length), (1, 1, 1, length))
    )


def decode_layer(
    layer: Any,
    experts_forward: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    expert_mask: torch.Tensor | None,
) -> DecodedLayer | None:
    """Begin the forward of a layer for one token of each sequence.

    Args:
        layer (`nn.Module`): an `EmoDecoderLayer` of experts, each of whose modules does no more than its own
            class.
        experts_forward: what Transformers would call for the experts.
        hidden_states (`torch.Tensor`): (B, 1, D).
        position_embeddings (`tuple[torch.Tensor, torch.Tensor]`): cosines and sines.
        expert_mask (`torch.Tensor`, *optional*): bool, (E,) or (B, E).

    Returns:
        `DecodedLayer` or `None`: `None` where the layer should run its parts one by one: for more sequences
        than compiled code is faster for, other experts, routers with always-active experts, activations other
        than SiLU, and as for `few_rows_linear`.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoForCausalLM
    >>> from transformers_emo.modeling_emo.kernels.decoding import decode_layer
    >>> layer = EmoForCausalLM.from_pretrained("model_cards/toy-emo").model.layers[0]
    >>> angles = torch.ones(1, 1, 32), torch.zeros(1, 1, 32)
    >>> decode_layer(layer, None, torch.ones(1, 1, 128), angles, None) is None  # another experts_forward
    True

    ```
    """
    if experts_forward is not emo_experts_forward or is_observed():
        return None
    attention, mlp, dtype = layer.self_attn, layer.mlp, hidden_states.dtype
    query, key, value, output = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    gate_up, down, router = mlp.experts.gate_up_proj, mlp.experts.down_proj, mlp.gate.weight
    weights = [query.weight, key.weight, value.weight, output.weight, gate_up, down, router]
    norms = [layer.pre_attention_layernorm.weight, layer.pre_feedforward_layernorm.weight]
    if (kernels := kernels_for(hidden_states, router)) is None or not _are_weights(dtype, weights + norms):
        return None
    choice, width = mlp.gate.layer, attention.head_dim
    batch, hidden = hidden_states.shape[0], hidden_states.shape[2]
    experts, taken = len(down), choice.top_k - choice.num_shared
    fits = (
        hidden_states.is_contiguous()
        and layer.self_attn.config.hidden_act == "silu"
        and is_faster(kernels, batch, output.weight)
        and not getattr(mlp.experts, "_is_expert_parallel", False)  # older versions of Transformers lack it
        and not choice.always_active
        and 0 <= taken <= choice.num_routed
        and experts == choice.num_routed + choice.num_shared
        and width % 2 == 0
        and len(query.weight) % width == len(key.weight) % width == 0
        and query.weight.shape[1] == hidden
        and key.weight.shape[1] == hidden
        and value.weight.shape == key.weight.shape
        and output.weight.shape == (hidden, len(query.weight))
        and router.shape == (experts, hidden)
        and down.shape[1] == hidden
        and gate_up.shape == (experts, 2 * down.shape[2], hidden)
        and norms[0].shape == norms[1].shape == (hidden,)
        and _fit_biases((query, key, value, output), dtype)
        and _fit_angles(position_embeddings, batch, width)
        and (expert_mask is None or _fits_mask(expert_mask, batch, experts))
    )
    return DecodedLayer(kernels, layer, hidden_states, width) if fits else None


def _fit_biases(linears: tuple, dtype: torch.dtype) -> bool:
    biases = [(linear.bias, linear.weight) for linear in linears if linear.bias is not None]
    return all(bias.shape == weight.shape[:1] for bias, weight in biases) and _are_weights(
        dtype, [bias for bias, _ in biases]
    )


def _fit_angles(angles: tuple[torch.Tensor, torch.Tensor], batch: int, width: int) -> bool:
    return (
        all(
            type(each) is torch.Tensor
            and each.dtype is torch.float32
            and each.is_cpu
            and each.shape in ((batch, 1, width), (1, 1, width))
            for each in angles
        )
        and angles[0].shape == angles[1].shape
    )


def _fits_mask(mask: torch.Tensor, batch: int, experts: int) -> bool:
    return (
        type(mask) is torch.Tensor
        and mask.dtype is torch.bool
        and mask.is_cpu
        and mask.shape in ((experts,), (batch, experts))
        and mask.stride(-1) == 1
    )
