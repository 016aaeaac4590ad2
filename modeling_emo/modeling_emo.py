"""The EMO network (https://arxiv.org/abs/2605.06663): a pre-norm decoder with routed and shared experts.

Attention, rotary embedding and norm are those of FlexOlmo in Transformers; what stands here is what EMO has
of its own. It is one file because Transformers reads the source of a model's module to learn which attention
and experts implementations it takes (`PreTrainedModel._can_set_experts_implementation`).

Shape suffixes: B batch, S sequence, T = B * S tokens, D hidden size, E experts of the layer (R routed, then
the shared ones), K experts taken per token, F expert width.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_modules

from ..imports.transformers_versions import private_names

with private_names("network"):  # the versions are looked at before anything can fail for want of them
    from transformers import initialization as init
    from transformers.activations import ACT2FN
    from transformers.cache_utils import Cache, DynamicCache
    from transformers.integrations import use_experts_implementation
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.loss.loss_utils import ForCausalLMLoss
    from transformers.modeling_layers import (
        GenericForSequenceClassification,
        GenericForTokenClassification,
        GradientCheckpointingLayer,
    )
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.flex_olmo.modeling_flex_olmo import (
        FlexOlmoAttention,
        FlexOlmoRMSNorm,
        FlexOlmoRotaryEmbedding,
        apply_rotary_pos_emb,
        eager_attention_forward,
    )
    from transformers.processing_utils import Unpack
    from transformers.utils import TransformersKwargs, can_return_tuple
    from transformers.utils.generic import merge_with_config_defaults
    from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..configuration.configuration_emo import EmoConfig
from ..configuration.layer_experts import LayerExperts
from .expert_switching import Masks, check_layers, masks_here, move_masks
from .forward_inputs import (
    ForwardInputs,
    attention_inputs,
    behind_virtual_tokens,
    pools_that_hold,
    positions_after,
    trains_without_labels,
    with_default_pool,
)
from .generation import EmoGenerationMixin
from .in_use.routed_experts import ExpertRecord, LayerRecord
from .losses import BalanceCounts, RouterStatistics, total_loss
from .package_hooks import PackageHooks, package
from .parallel import refuse_split_sequences
from .pools.document_pool import DocumentPools, PoolRequest, mean_pool_size
from .pools.prompt_pool import FrozenPool, Pools, PromptPool, keep_pools
from .pools.segments import ids_on
from .pretrained import PartialModel
from .transformers_differences import (
    CACHE,
    BothCacheNames,
    both_cache_names,
    kept_positions,
    one_cache_name,
    refuse_unknown_caches,
    takes_cache,
    update_cache,
)
from .weight_names import register_weight_names


def _wants_router_logits(config: EmoConfig, training: bool) -> bool:
    """What the config says; `"training"` (what a released `true` is read as) asks in training only."""
    return training if config.output_router_logits == "training" else bool(config.output_router_logits)


def _resolve_output_router_logits(forward: Callable) -> Callable:
    """Give `forward` a plain `output_router_logits`; Transformers takes it from the config as it is."""

    @wraps(forward)
    def wrapper(self, *args, **kwargs):
        if kwargs.get("output_router_logits") is None:
            kwargs["output_router_logits"] = _wants_router_logits(self.config, self.training)
        return forward(self, *args, **kwargs)

    return wrapper


def _compiled() -> PackageHooks | None:
    """The package's compiled code for what a layer does beside its experts: for inference only."""
    return None if torch.is_grad_enabled() or torch.compiler.is_compiling() else package.hooks


class EmoRMSNorm(FlexOlmoRMSNorm):
    """FlexOlmo's norm: it multiplies by its weight in float32, before casting down."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., D) to (..., D)."""
        hooks = _compiled()
        output = None if hooks is None else hooks.rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return super().forward(hidden_states) if output is None else output


class EmoRotaryEmbedding(FlexOlmoRotaryEmbedding):
    """FlexOlmo's rotary embedding unchanged: cosines and sines stay float32."""


def _product(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(..., inputs) and (outputs, inputs) to (..., outputs).

    When a CPU decodes, the package's kernel runs: it reads weights faster than PyTorch's.
    """
    hooks = _compiled()
    output = None if hooks is None else hooks.few_rows_linear(input, weight, bias)
    return F.linear(input, weight, bias) if output is None else output


_LINEAR_FORWARD = nn.Linear.forward


def _project(linear: nn.Module, input: torch.Tensor) -> torch.Tensor:
    """What a layer gives: as by `_product`, if calling it would do no more than that.

    The layers stay plain `nn.Linear`, because quantisers and adapters look for that very class. What they, or
    hooks, put in its place is called.
    """
    hooks = _compiled()
    if hooks is None or type(linear) is not nn.Linear or _does_more(linear):
        return linear(input)
    output = hooks.few_rows_linear(input, linear.weight, linear.bias)
    return linear(input) if output is None else output


def _does_more(module: nn.Module) -> bool:
    """Whether calling a module runs anything but its own forward."""
    own = vars(module)
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own  # accelerate replaces it to move weights
        or own.get("_compiled_call_impl") is not None
        or nn.Linear.forward is not _LINEAR_FORWARD
        or torch_modules._global_forward_hooks
        or torch_modules._global_forward_pre_hooks
    )


class EmoAttention(FlexOlmoAttention):
    """FlexOlmo's attention without its norm on queries and keys, which EMO does not have."""

    def __init__(self, config: EmoConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        del self.q_norm, self.k_norm

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, S, D) to (B, S, D), and what the attention implementation tells of its weights."""
        batch, length, _ = hidden_states.shape

        def heads(projection: nn.Module) -> torch.Tensor:
            return _project(projection, hidden_states).view(batch, length, -1, self.head_dim)

        query, key = _rotate_both(heads(self.q_proj), heads(self.k_proj), *position_embeddings)
        value = heads(self.v_proj).transpose(1, 2)
        if past_key_values is not None:
            key, value = update_cache(past_key_values, key, value, self.layer_idx, kwargs)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return _project(self.o_proj, output.reshape(batch, length, -1).contiguous()), weights


def _rotate_both(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embeddings of queries and keys, (B, S, H, W) to (B, H, S, W)."""
    if (hooks := _compiled()) is not None:
        rotated = hooks.rotate(query, cos, sin), hooks.rotate(key, cos, sin)
        if rotated[0] is not None and rotated[1] is not None:
            return rotated[0].transpose(1, 2), rotated[1].transpose(1, 2)
    return apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), cos, sin)


class EmoMLP(nn.Module):
    """SwiGLU feed-forward network of a dense layer, with biases where `config.dense_mlp_bias` says so."""

    def __init__(self, config: EmoConfig):
        super().__init__()
        width = config.dense_intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=config.dense_mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.dense_mlp_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.dense_mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self,
        hidden_states: torch.Tensor,
        expert_mask: None = None,
        pools: Pools | None = None,
        record: LayerRecord | None = None,
    ) -> tuple[torch.Tensor, None]:
        """(B, S, D) to (B, S, D). The other arguments are those of an expert block, and not used."""
        gate, up = _project(self.gate_proj, hidden_states), _project(self.up_proj, hidden_states)
        return _project(self.down_proj, self.act_fn(gate) * up), None


class EmoTopKRouter(nn.Module):
    """Picks each token's experts: the top routed ones, and every shared one.

    Routed and shared experts have softmaxes of their own, in float32, and the weights are not renormalised,
    so that a single shared expert always has weight 1. With always-active experts there is one softmax over
    all experts instead.
    """

    def __init__(self, config: EmoConfig, layer: LayerExperts):
        super().__init__()
        self.layer = layer
        self.num_experts = layer.num_experts  # which older versions of Transformers share among processes
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(layer.num_experts, config.hidden_size))

    def forward(
        self,
        hidden_states: torch.Tensor,
        expert_mask: torch.Tensor | None = None,
        pools: Pools | None = None,
        record: LayerRecord | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, RouterStatistics | None]:
        """Route tokens.

        Args:
            hidden_states (`torch.Tensor`): (T, D).
            expert_mask (`torch.Tensor`, *optional*): bool, (E,) or (T, E), false for experts that must not be
                taken.
            pools (`DocumentPools` or `FrozenPool`, *optional*): the documents and the sizes of their pools in
                this layer, or pools of prompts. Each shared expert then has weight 1, as when EMO was
                trained.
            record (`LayerRecord`, *optional*): what notes the picks of a generation.

        Returns:
            `tuple`: raw logits (T, E), before any mask; weights (T, K) in the logits' dtype; expert ids (T,
            K), int64; with pools in training what the losses need, else `None`.
        """
        logits_TE = _product(hidden_states, self.weight)
        masked_TE = logits_TE
        if expert_mask is not None:
            masked_TE = logits_TE.masked_fill(~expert_mask.to(logits_TE.device), float("-inf"))
        statistics = None
        if self.layer.always_active:
            weights_TK, index_TK = self._take_always_active(masked_TE)
        else:
            weights_TK, index_TK, statistics = self._take_routed_and_shared(masked_TE, pools)
        if self.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        if record is not None:  # here: what shares experts among processes changes the ids behind
            record.take(index_TK, weights_TK)
        return logits_TE, weights_TK.to(logits_TE.dtype), index_TK, statistics

    def _take_routed_and_shared(
        self, logits_TE: torch.Tensor, pools: Pools | None
    ) -> tuple[torch.Tensor, torch.Tensor, RouterStatistics | None]:
        num_routed, num_shared = self.layer.num_routed, self.layer.num_shared
        logits_TR, shared_TS = logits_TE.float().split([num_routed, num_shared], dim=-1)
        statistics = None
        if pools is not None:
            logits_TR = pools.restrict(logits_TR)
        probs_TR = F.softmax(logits_TR, dim=-1)
        weights_TK, index_TK = probs_TR.topk(self.layer.top_k - num_shared, dim=-1)
        if isinstance(pools, DocumentPools) and self.training:
            statistics = RouterStatistics.of(logits_TR, probs_TR, index_TK, pools.token_mask_T)
        if num_shared == 0:
            return weights_TK, index_TK, statistics
        shared_TS = F.softmax(shared_TS, dim=-1) if pools is None else torch.ones_like(shared_TS)
        shared_index_S = torch.arange(num_routed, num_routed + num_shared, device=logits_TE.device)
        return (
            torch.cat([weights_TK, shared_TS], dim=-1),
            torch.cat([index_TK, shared_index_S.expand(logits_TE.shape[0], -1)], dim=-1),
            statistics,
        )

    def _take_always_active(self, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        probs_TE = F.softmax(logits_TE, dim=-1, dtype=torch.float32)
        always_A = ids_on(self.layer.always_active, logits_TE.device)
        # -1 is below every probability, so that an always-active expert is never picked a second time.
        others_TE = probs_TE.index_fill(-1, always_A, -1.0)
        picked_TK = others_TE.topk(self.layer.top_k - len(always_A), dim=-1).indices
        index_TK = torch.cat([always_A.expand(logits_TE.shape[0], -1), picked_TK], dim=-1)
        return probs_TE.gather(-1, index_TK), index_TK


_EXPERT_PARTS = ("gate", "up", "down")


def _stack_experts(
    module: nn.Module,
    state_dict: dict[str, torch.Tensor],
    prefix: str,
    metadata: dict,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Let plain `load_state_dict` read experts as they are saved, one by one.

    The Trainer resumes so, and not through `from_pretrained`: it would leave the experts as they were
    initialised. With several files, each call brings some of the experts: these are put in their places.
    """
    found: dict[tuple[int, str], torch.Tensor] = {}
    for name in [name for name in state_dict if name.startswith(prefix)]:
        if match := _EXPERT_NAME.fullmatch(name, len(prefix)):
            found[int(match["expert"]), match["part"]] = state_dict.pop(name)
    if not found:
        return
    shapes = dict.fromkeys(("gate", "up"), (module.intermediate_dim, module.hidden_dim))
    shapes["down"] = (module.hidden_dim, module.intermediate_dim)
    outside = sorted({expert for expert, _ in found} - set(range(module.num_experts)))
    wrong = [key for key, tensor in found.items() if tuple(tensor.shape) != shapes[key[1]]]
    if outside:
        errors.append(
            f"{prefix}{outside[0]}: the weights have this expert, and the model only {module.num_experts} in "
            "this layer. Load the subset with `from_pretrained(..., expert_subset=...)`."
        )
    elif wrong:
        name = f"{prefix}{wrong[0][0]}.{wrong[0][1]}_proj.weight"
        errors.append(
            f"size mismatch for {name}: its shape is {tuple(found[wrong[0]].shape)}, expected "
            f"{shapes[wrong[0][1]]}."
        )
    stacked = {name: getattr(module, name) for name in ("gate_up_proj", "down_proj")}
    for name, parameter in stacked.items():
        twice = state_dict.get(f"{prefix}{name}", parameter)
        if _is_plain(twice) and _is_plain(parameter) and twice.data_ptr() != parameter.data_ptr():
            errors.append(f"{prefix}{name} is there stacked and expert by expert: leave out one of the two.")
    lacking = [
        f"{prefix}{expert}.{part}_proj.weight"
        for expert in range(module.num_experts)
        for part in _EXPERT_PARTS
        if (expert, part) not in found
    ]
    if not (outside or wrong or lacking):
        gate, up, down = (
            torch.stack([found[expert, part] for expert in range(module.num_experts)])
            for part in _EXPERT_PARTS
        )
        state_dict[f"{prefix}gate_up_proj"] = torch.cat([gate, up], dim=1)
        state_dict[f"{prefix}down_proj"] = down
        return
    missing += lacking
    if lacking and not all(map(_is_plain, stacked.values())):
        errors.append(
            f"{lacking[0]} is missing. Some of a layer's experts can only be loaded where the model's own "
            f"are plain tensors in memory, not {type(stacked['down_proj'].data).__name__} on "
            f"{stacked['down_proj'].device}: load all of them at once, or use `from_pretrained`."
        )
    elif lacking and not (outside or wrong):
        with torch.no_grad():
            for (expert, part), tensor in found.items():
                rows = stacked["down_proj" if part == "down" else "gate_up_proj"][expert]
                half = slice(None)
                if part != "down":
                    half = slice(0, shapes[part][0]) if part == "gate" else slice(shapes[part][0], None)
                rows[half].copy_(tensor)
    # What stays is in the model: PyTorch copies it onto itself, and misses nothing.
    state_dict |= {f"{prefix}{name}": parameter.data for name, parameter in stacked.items()}


def _one(stack: torch.Tensor, expert: int) -> torch.Tensor:
    """The weights of one expert. Of quantised ones PyTorch makes no views in inference mode."""
    if type(stack) in (torch.Tensor, nn.Parameter) or not torch.is_inference_mode_enabled():
        return stack[expert]
    with torch.inference_mode(False), torch.no_grad():
        return stack[expert]


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is a tensor with memory here: not distributed, quantised or on the meta device."""
    return type(tensor.data) is torch.Tensor and not tensor.is_meta


_EXPERT_NAME = re.compile(r"(?P<expert>\d+)\.(?P<part>gate|up|down)_proj\.weight")


@use_experts_implementation
class EmoExperts(nn.Module):
    """A layer's experts, stacked: `gate_up_proj` (E, 2F, D), gate above up, and `down_proj` (E, D, F)."""

    def __init__(self, config: EmoConfig, num_experts: int):
        super().__init__()
        self.num_experts = num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]
        self.register_load_state_dict_pre_hook(_stack_experts)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of each token's experts, one expert after the other (the `eager` implementation).

        Args:
            hidden_states (`torch.Tensor`): (T, D).
            top_k_index (`torch.Tensor`): (T, K) expert ids; under expert parallelism `num_experts` marks a
                pick that another rank computes.
            top_k_weights (`torch.Tensor`): (T, K).

        Returns:
            `torch.Tensor`: (T, D) in the dtype of `hidden_states`.

        Raises:
            RuntimeError: if `torch.jit.trace` records it.
        """
        if torch.jit.is_tracing():
            raise RuntimeError(
                "`torch.jit.trace` would keep the experts that this input takes, and compute others wrongly: "
                "set `experts_implementation` to 'grouped_mm' or 'batched_mm'."
            )
        output_TD = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:
                continue
            token, slot = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], _one(self.gate_up_proj, expert)).chunk(2, dim=-1)
            expert_output = F.linear(self.act_fn(gate) * up, _one(self.down_proj, expert))
            expert_output = expert_output * top_k_weights[token, slot, None]
            output_TD.index_add_(0, token, expert_output.to(output_TD.dtype))
        return output_TD


class EmoSparseMoeBlock(nn.Module):
    """Router and experts of one layer."""

    def __init__(self, config: EmoConfig, layer: LayerExperts):
        super().__init__()
        self.gate = EmoTopKRouter(config, layer)
        self.experts = EmoExperts(config, layer.num_experts)

    def forward(
        self,
        hidden_states: torch.Tensor,
        expert_mask: torch.Tensor | None = None,
        pools: Pools | None = None,
        record: LayerRecord | None = None,
    ) -> tuple[torch.Tensor, RouterStatistics | None]:
        """(B, S, D) to (B, S, D); the other arguments and the statistics as in `EmoTopKRouter.forward`."""
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights_TK, index_TK, statistics = self.gate(hidden_TD, expert_mask, pools, record)
        inputs = (hidden_TD, index_TK, weights_TK)
        if isinstance(pools, FrozenPool) and pools.tokens_at_once is not None:
            parts = zip(*(tensor.split(pools.tokens_at_once) for tensor in inputs), strict=True)
            output_TD = torch.cat([self.experts(*part) for part in parts])
        else:
            output_TD = self.experts(*inputs)
        return output_TD.reshape(hidden_states.shape), statistics


class EmoDecoderLayer(GradientCheckpointingLayer):
    """One layer, normed before attention and before the feed-forward block (FlexOlmo norms after them)."""

    def __init__(self, config: EmoConfig, layer_idx: int):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.number = layer_idx  # the entry of the config's lists that is about this layer
        layer = config.layer_experts[layer_idx]
        self.self_attn = EmoAttention(config, layer_idx)
        self.mlp = EmoMLP(config) if layer.is_dense else EmoSparseMoeBlock(config, layer)
        self.pre_attention_layernorm = EmoRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.pre_feedforward_layernorm = EmoRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, *args, **kwargs):
        """Run the layer; gradient checkpointing leaves a cache out, which it knows by one name."""
        return super().__call__(*args, **one_cache_name(kwargs))

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        expert_mask: torch.Tensor | None = None,
        pools: Pools | None = None,
        record: LayerRecord | None = None,
        last_tokens: int = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """(B, S, D) to (B, S, D); `expert_mask`, `pools` and `record` as in `EmoTopKRouter.forward`.

        With `last_tokens` that many tokens come out: the others are there to be attended to.

        With pools in training the router's statistics follow: as outputs of the layer, and not through a
        hook, so that their gradient survives every kind of gradient checkpointing.
        """
        is_seen = pools is not None or record is not None
        if hidden_states.shape[1] == 1 and not is_seen and not kwargs.keys() - _NOT_OF_LAYERS:
            output = self._decode(
                hidden_states, attention_mask, past_key_values, position_embeddings, expert_mask, kwargs
            )
            if output is not None:
                return output
        residual = hidden_states
        hidden_states, _ = self.self_attn(
            hidden_states=self.pre_attention_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = residual + hidden_states
        if last_tokens:
            hidden_states = hidden_states[:, -last_tokens:]
        normed = self.pre_feedforward_layernorm(hidden_states)
        output, statistics = self.mlp(normed, expert_mask, pools, record)
        hidden_states = hidden_states + output
        return hidden_states if statistics is None else (hidden_states, *statistics)

    def _decode(
        self,
        hidden_BSD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        expert_mask: torch.Tensor | None,
        kwargs: dict,
    ) -> torch.Tensor | None:
        """One token of each sequence by compiled code, if the parts would do no more than their classes."""
        hooks, config = _compiled(), self.self_attn.config
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, None)
        if hooks is None or self.training or attend is not _SDPA or not _are_plain(self):
            return None
        forward = ALL_EXPERTS_FUNCTIONS.get_interface(config._experts_implementation, None)
        decoding = hooks.decode_layer(self, forward, hidden_BSD, position_embeddings, expert_mask)
        if decoding is None:
            return None
        attention = self.self_attn
        query, key, value = decoding.heads(*position_embeddings)
        if cache is not None:
            key, value = update_cache(cache, key, value, attention.layer_idx, kwargs)

        def attended() -> torch.Tensor:
            scaling = attention.scaling
            return attend(attention, query, key, value, attention_mask, scaling=scaling, **kwargs)[0]

        return decoding.rest(query, key, value, attention_mask, expert_mask, attended)


_NOT_OF_LAYERS = {"output_router_logits", "output_hidden_states", "output_attentions", "use_cache"}
_SDPA = ALL_ATTENTION_FUNCTIONS["sdpa"]
_FORWARDS = {
    kind: kind.forward
    for kind in (EmoAttention, EmoRMSNorm, EmoSparseMoeBlock, EmoTopKRouter, EmoExperts, nn.Linear)
}


def _are_plain(layer: EmoDecoderLayer) -> bool:
    """Whether all modules of a layer are of experts, and calling each does no more than its class."""
    attention, block = layer.self_attn, layer.mlp
    if type(block) is not EmoSparseMoeBlock or type(attention) is not EmoAttention:
        return False
    linears = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    norms = layer.pre_attention_layernorm, layer.pre_feedforward_layernorm
    return all(
        _FORWARDS.get(type(module)) is type(module).forward and not _does_more(module)
        for module in (attention, block, block.gate, block.experts, *norms, *linears)
    )


def _has_hooks(model: "EmoModel") -> bool:
    """Whether somebody looks at the last layer, or at what comes out of the decoder."""
    if torch_modules._global_forward_hooks:
        return True
    last = model.layers[: model.config.num_hidden_layers][-1]
    watched = (model, model.norm, *last.modules())
    hooks = (hook for m in watched for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
    # Transformers' own stay where hidden states were once asked for, and look only when they are again.
    return any(getattr(hook, "__module__", "") != OutputRecorder.__module__ for hook in hooks)


def _init_truncated_normal(weight: torch.Tensor, std: float) -> None:
    """Initialise as OLMo-core did for EMO: a normal distribution cut off at three standard deviations."""
    init.trunc_normal_(weight, mean=0.0, std=std, a=-3 * std, b=3 * std)


class EmoPreTrainedModel(PartialModel):
    """What every EMO model has: initialisation here, loading, saving and masking of experts by its bases.

    Example: see `EmoForCausalLM`.
    """

    config: EmoConfig
    config_class = EmoConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EmoDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # The package's experts implementation, registered by it alone; on other devices it is `grouped_mm`.
    _cpu_experts = "emo"
    _can_record_outputs = {
        "router_logits": OutputRecorder(EmoTopKRouter, index=0),
        "hidden_states": EmoDecoderLayer,
        "attentions": EmoAttention,
    }

    def __init__(self, config: EmoConfig, *args, **kwargs):
        if package.hooks is not None:
            package.hooks.check_before_building(config)
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, EmoExperts):
            _init_truncated_normal(module.gate_up_proj, std)
            _init_truncated_normal(module.down_proj, std)
        elif isinstance(module, EmoTopKRouter):
            _init_truncated_normal(module.weight, std)
        elif isinstance(module, nn.Linear):
            _init_truncated_normal(module.weight, std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            _init_truncated_normal(module.weight, std)
        else:
            super()._init_weights(module)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Transformers asks here which experts run; when nobody chose, the package's own do."""
        quantised = getattr(self.config, "quantization_config", None)
        packed = quantised is not None and getattr(quantised, "quant_method", None) == "emo-packed"
        if packed and requested_experts not in (None, "emo", "eager"):
            raise ValueError(
                f"`experts_implementation` is {requested_experts!r}, which experts in few bits have not: "
                "leave it out."
            )
        if (
            requested_experts is None
            and self._cpu_experts in ALL_EXPERTS_FUNCTIONS
            and (packed or not quantised)
        ):
            return self._cpu_experts
        return super().get_correct_experts_implementation(requested_experts)


@dataclass
class EmoModelOutputWithPast(BothCacheNames, MoeModelOutputWithPast):
    """As every mixture of experts, and with pools in training what the routers did.

    `router_statistics` of each expert layer, and the mean `document_pool_size` over documents and layers.
    """

    router_statistics: tuple[RouterStatistics, ...] | None = None
    document_pool_size: torch.FloatTensor | None = None


class EmoModel(EmoPreTrainedModel):
    """The EMO decoder without a head.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoConfig, EmoModel
    >>> config = EmoConfig(
    ...     vocab_size=64, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
    ...     num_experts=4, num_experts_per_tok=2, pad_token_id=0, eos_token_id=1,
    ... )
    >>> EmoModel(config)(torch.tensor([[3, 4, 5]])).last_hidden_state.shape
    torch.Size([1, 3, 16])

    ```
    """

    # What the heads' checkpoints have beside the decoder.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^lm_head\.", r"^score\."]

    def __init__(self, config: EmoConfig):
        super().__init__(config)
        config.check_heads()
        padding, size = config.pad_token_id, config.vocab_size
        if padding is not None and not -size <= padding < size:
            raise ValueError(
                f"`pad_token_id` is {padding}, expected one of the {size} ids of the vocabulary, or None."
            )
        self.padding_idx = padding
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            EmoDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = EmoRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = EmoRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        # What compiled code sees of open `use_experts`; see `expert_masks`.
        self.compiled_masks: Masks = [None] * config.num_hidden_layers
        self.compiled_masks_differ = False
        # What sizes of pools in training are drawn from; `EmoTrainer` sets it (`step_seed`). Where it is
        # `None`, each forward draws one from the generator: by default the device's global one.
        self.pool_seed: torch.Tensor | None = None
        self.pool_generator: torch.Generator | None = None
        # Size of the pools where the caller says nothing of pools: `emo run --document-pool`.
        self.default_document_pool: int | None = None
        self.post_init()

    def _apply(self, fn, *args, **kwargs):
        """What `to`, `cuda` and so on do: masks follow the layers, once and not in every forward."""
        if self._expert_memory is not None:
            self._expert_memory.follow(fn)
        super()._apply(fn, *args, **kwargs)
        move_masks(self)
        return self

    def __getstate__(self):
        """A copy, or what is pickled, is not masked."""
        unmasked = {"compiled_masks": [None] * len(self.layers), "compiled_masks_differ": False}
        return self.__dict__ | unmasked

    @property
    def expert_masks(self) -> Masks:
        """For each layer the mask (E,) of the caller's `use_experts`, or `None` for all experts."""
        if torch.compiler.is_compiling():
            if self.compiled_masks_differ:
                raise RuntimeError(
                    "Several callers have a `use_experts` open on this model, and compiled code cannot tell "
                    "whose choice this call has: run it without `torch.compile`, or one caller at a time."
                )
            return self.compiled_masks
        return masks_here(self) or [None] * len(self.layers)

    @takes_cache
    @_resolve_output_router_logits
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        document_pool: int | bool | None = None,
        document_pool_sizes: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        attention_within_documents: bool | None = None,
        prompt_pool: PromptPool | None = None,
        expert_record: ExpertRecord | None = None,
        last_tokens: int = 0,
        training_step: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EmoModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids (`torch.LongTensor`): (B, S) token ids; or `inputs_embeds` (B, S, D) instead.
            attention_mask (`torch.Tensor`, *optional*): (B, S), 0 for padding; or a ready 4-D mask.
            position_ids (`torch.LongTensor`, *optional*): (B, S); 0, 1, 2 ... after the cached tokens by
                default.
            past_key_values (`Cache`, *optional*): keys and values of the tokens before; or `cache`, as
                Transformers calls it from 5.24 on. The output has it under both names.
            use_cache (`bool`, *optional*): return `past_key_values`.
            document_pool (`int` or `bool`, *optional*): route every document within a pool of so many routed
                experts; `True` for the config's size, `False` for no pools. By default pools are on in a step
                of training, when the config has them.
            document_pool_sizes (`torch.Tensor`, *optional*): (L, N) the size of each pool, for each layer and
                segment, in the order of rows and of segments within them.
            document_ids (`torch.Tensor`, *optional*): (B, S) the document of each token; otherwise `seq_idx`,
                `cu_seq_lens_q` or what `config.document_boundaries` says.
            attention_within_documents (`bool`, *optional*): let tokens attend to their own document only; an
                EOS is the last token of its document here. By default as the config says, in training. Flash
                attention needs the lengths of the documents on the host: waiting for them breaks a compiled
                graph, unless the caller gives `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and
                `max_length_k`, and neither a mask nor `document_ids`.
            prompt_pool (`PromptPool`, *optional*): choose pools from prompts, and keep them in the cache (set
                by `generate`). Pools that are in the cache already hold, unless `document_pool` is `False`.
            expert_record (`ExpertRecord`, *optional*): what notes the experts that each token takes (set by
                `generate`).
            last_tokens (`int`, defaults to 0): let only so many tokens at the end through the feed-forward
                block of the last layer, where nobody wants the others (0: all). `last_hidden_state` has no
                more then, unless there are pools, which the last layer too chooses from all tokens.
            training_step (`bool`, *optional*): whether this is a step of training: with the config's pools,
                if nothing else is asked for, and with what their losses need. Tokens in a cache then are a
                prefix that every document sees (prefix tuning). By default only where the model computes its
                own loss: in training mode with `labels`. A trainer with a loss of its own (DPO, GRPO) gets
                the plain network, as in evaluation, and a warning if the config has pools.
            kwargs: `output_router_logits`, `output_hidden_states`, `output_attentions` and what the attention
                implementation takes.

        Returns:
            `EmoModelOutputWithPast`: `last_hidden_state` (B, S, D); `router_logits`, where asked for: raw
            logits (T, E) of each expert layer; `router_statistics`, with pools in training.

        Raises:
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given; if `past_key_values`
                and `cache` are two caches; if pools are asked for behind tokens in a cache, documents cannot
                be told apart, or the attention implementation cannot keep them apart.
            TypeError: if a cache is given by a name that is none of these.
        """
        refuse_unknown_caches(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`: leave the other one out.")
        if training_step is None:
            asks = self.training and past_key_values is None
            training_step = asks and trains_without_labels(self.config, document_pool, document_pool_sizes)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = positions_after(past_key_values, inputs_embeds)
        given = (input_ids, inputs_embeds, attention_mask, position_ids, past_key_values)
        inputs = ForwardInputs(self.config, *given, training_step)
        if input_ids is None:  # perhaps with virtual tokens of an adapter in front
            document_ids, prompt_pool = behind_virtual_tokens(inputs_embeds, document_ids, prompt_pool)
        documents = kwargs.get("seq_idx"), kwargs.get("cu_seq_lens_q")
        request = PoolRequest(document_pool, document_pool_sizes, document_ids, *documents)
        request, prompt_pool = with_default_pool(inputs, request, prompt_pool, self.default_document_pool)
        causal_mask, lengths = attention_inputs(inputs, request, attention_within_documents, kwargs)
        kwargs |= lengths
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        expert_masks = self.expert_masks
        draws = {"seed": self.pool_seed, "generator": self.pool_generator}
        frozen, pools = pools_that_hold(inputs, request, prompt_pool, expert_masks, **draws)
        for pool in frozen or () if self._expert_memory is not None else ():
            pool.memory = self._expert_memory
        hidden_states = inputs_embeds
        statistics: list[RouterStatistics] = []
        layers = self.layers[: self.config.num_hidden_layers]
        if pools is not None:
            check_layers(self)
            refuse_split_sequences()
        for index, layer in enumerate(layers):
            is_last = index == len(layers) - 1
            output = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                expert_mask=expert_masks[index],
                pools=None if pools is None else pools[index],
                record=None if expert_record is None else expert_record.layer(index),
                last_tokens=last_tokens if is_last and pools is None else 0,
                **{CACHE: past_key_values},
                **kwargs,
            )
            if isinstance(output, tuple):
                output, *layer_statistics = output
                statistics.append(RouterStatistics(*layer_statistics))
            hidden_states = output
        keep_pools(past_key_values, frozen)
        return EmoModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            **{CACHE: past_key_values},
            router_statistics=tuple(statistics) or None,
            document_pool_size=mean_pool_size(pools, self.config) if pools and statistics else None,
        )


@dataclass
class EmoCausalLMOutputWithPast(BothCacheNames, MoeCausalLMOutputWithPast):
    """As every mixture of experts, and the parts of the loss, without gradient and without coefficients.

    `ce_loss` is the cross entropy. In training with document pools there are `router_z_loss`, `lm_z_loss`,
    `expert_counts`, for each expert layer the picks of its routed experts (R,), and `document_pool_size`,
    the mean over documents and layers.

    Example: see `EmoForCausalLM`.
    """

    ce_loss: torch.FloatTensor | None = None
    router_z_loss: torch.FloatTensor | None = None
    lm_z_loss: torch.FloatTensor | None = None
    expert_counts: tuple[torch.LongTensor, ...] | None = None
    document_pool_size: torch.FloatTensor | None = None


class EmoForCausalLM(EmoPreTrainedModel, EmoGenerationMixin):
    """EMO with its language-model head.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> import transformers_emo
    >>> model = AutoModelForCausalLM.from_pretrained("model_cards/toy-emo")
    >>> tokenizer = AutoTokenizer.from_pretrained("model_cards/toy-emo")
    >>> model.generate(**tokenizer("import os", return_tensors="pt"), max_new_tokens=4).shape[-1] > 4
    True

    ```
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}
    _pp_plan: ClassVar[dict] = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan: ClassVar[dict[str, str]] = {"lm_head": "keep_full_weight"}

    def __init__(self, config: EmoConfig):
        super().__init__(config)
        self.model = EmoModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # What the balance loss counts beside the forward at hand, while an optimiser step is accumulated.
        self.balance_counts: BalanceCounts | None = None
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EmoCausalLMOutputWithPast:
        """Next-token logits, and the loss where labels are given.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache: as in
                `EmoModel.forward`.
            labels (`torch.LongTensor`, *optional*): (B, S), the input ids themselves (they are shifted
                inside), -100 where a token does not count.
            output_router_logits (`bool`, *optional*): return the raw router logits and compute the balance
                loss. By default as `config.output_router_logits` says.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): compute the logits of the last so many
                tokens only (0: all), or of these positions.
            kwargs: `num_items_in_batch` for the losses, and what the attention implementation takes.

        Returns:
            `EmoCausalLMOutputWithPast`: `logits` (B, S, vocabulary); with labels `loss`, the cross entropy
            plus, where the router logits are output, `router_aux_loss_coef` times `aux_loss`, the balance
            loss; `ce_loss`.
        """
        if output_router_logits is None:
            output_router_logits = _wants_router_logits(self.config, self.training and labels is not None)
        if output_router_logits:
            check_layers(self.model)
        # A prompt's other tokens need not go through the last layer's experts, unless somebody looks at them.
        recorded = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        is_seen = output_router_logits or recorded not in (None, False) or torch.is_grad_enabled()
        is_seen = is_seen or _has_hooks(self.model) or kwargs.get("expert_record") is not None
        last_tokens = logits_to_keep if isinstance(logits_to_keep, int) and labels is None else 0
        if self.training and labels is not None:
            kwargs.setdefault("training_step", True)  # behind a prefix too, which comes in a cache
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            last_tokens=0 if is_seen else max(last_tokens, 0),
            **kwargs,
        )
        logits = _project(self.lm_head, kept_positions(outputs.last_hidden_state, logits_to_keep))

        # With pools, one pass over the logits gives cross entropy and z loss, unless the loss is another.
        altered = {"shift_labels", "ignore_index"} & set(kwargs)
        is_standard = self.loss_function is ForCausalLMLoss and not altered
        own_loss = partial(self.loss_function, vocab_size=self.vocab_size, **kwargs)
        losses = total_loss(
            self.config,
            logits,
            labels,
            router_statistics=outputs.router_statistics,
            router_logits=outputs.router_logits if output_router_logits else None,
            attention_mask=attention_mask,
            num_items_in_batch=kwargs.get("num_items_in_batch"),
            balance_counts=self.balance_counts,
            own_loss=None if is_standard and outputs.router_statistics is not None else own_loss,
        )
        return EmoCausalLMOutputWithPast(
            logits=logits,
            **losses._asdict(),
            **{CACHE: outputs.past_key_values},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            expert_counts=tuple(layer.count_R for layer in outputs.router_statistics or ()) or None,
            document_pool_size=outputs.document_pool_size,
        )


def _trains_with_labels(forward: Callable) -> Callable:
    """The forward of a head: in training mode with labels it is a step of training, as `EmoForCausalLM`'s."""
    position = list(inspect.signature(forward).parameters).index("labels") - 1

    @wraps(forward)
    def wrapper(self, *args, **kwargs):
        labels = args[position] if len(args) > position else kwargs.get("labels")
        if self.training and labels is not None:
            kwargs.setdefault("training_step", True)
        return forward(self, *args, **kwargs)

    return wrapper


class EmoForSequenceClassification(GenericForSequenceClassification, EmoPreTrainedModel):
    """EMO with a classifier on the last token that is not padding (Transformers' generic head).

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoForSequenceClassification
    >>> model = EmoForSequenceClassification.from_pretrained("model_cards/toy-emo", num_labels=3)
    >>> model(torch.tensor([[5, 6, 7]])).logits.shape
    torch.Size([1, 3])

    ```
    """

    def __init__(self, config: EmoConfig):
        # The generic head asks `AutoModel` for the network, which code saved beside a model is unknown to.
        EmoPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = EmoModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    forward = _trains_with_labels(both_cache_names(GenericForSequenceClassification.forward))


class EmoForTokenClassification(GenericForTokenClassification, EmoPreTrainedModel):
    """EMO with a classifier on every token (Transformers' generic head).

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoForTokenClassification
    >>> model = EmoForTokenClassification.from_pretrained("model_cards/toy-emo", num_labels=3)
    >>> model(torch.tensor([[5, 6, 7]])).logits.shape
    torch.Size([1, 3, 3])

    ```
    """

    def __init__(self, config: EmoConfig):
        EmoPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = EmoModel(config)
        dropouts = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
        self.dropout = nn.Dropout(next((rate for rate in dropouts if rate is not None), 0.1))
        bias = getattr(config, "token_classification_bias", True)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=bias)
        self.post_init()

    forward = _trains_with_labels(both_cache_names(GenericForTokenClassification.forward))


register_weight_names(EmoConfig.model_type)
