"""The EMO network of vLLM's layers.

What a token computes is what `transformers-emo` computes. Shared experts are experts like the others here,
which the router gives to every token: so no part of vLLM has to know that there are any, and none can lose
them.

Shape suffixes: T tokens of the batch, D hidden size, E experts of the layer.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.sequence import IntermediateTensors

from .architecture import Layer, layers_of, rope_of
from .routing import first_tokens, restrict_to_pools, route, rows_of
from .startup import check_promise
from .usage import count_usage, usage_of


class EmoAttention(nn.Module):
    """Attention with rotary embedding, without norms on queries and keys."""

    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        width = config.hidden_size // heads
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            width,
            heads,
            kv_heads,
            bias=config.attention_bias,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            heads * width, config.hidden_size, bias=config.attention_bias, prefix=f"{prefix}.o_proj"
        )
        self.sizes = [self.qkv_proj.num_heads * width] + [self.qkv_proj.num_kv_heads * width] * 2
        self.rotary_emb = get_rope(
            width, max_position=config.max_position_embeddings, rope_parameters=rope_of(config)
        )
        self.attn = Attention(
            self.qkv_proj.num_heads,
            width,
            width**-0.5,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: torch.Tensor, hidden_TD: torch.Tensor) -> torch.Tensor:
        """(T, D) to (T, D)."""
        qkv, _ = self.qkv_proj(hidden_TD)
        query, key, value = qkv.split(self.sizes, dim=-1)
        query, key = self.rotary_emb(positions, query, key)
        output, _ = self.o_proj(self.attn(query, key, value))
        return output


class EmoMLP(nn.Module):
    """The feed-forward network of a dense layer."""

    def __init__(self, config: Any, prefix: str):
        super().__init__()
        width, bias = config.dense_intermediate_size, config.dense_mlp_bias
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [width] * 2, bias=bias, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(width, config.hidden_size, bias=bias, prefix=f"{prefix}.down_proj")
        self.act_fn = SiluAndMul()

    def forward(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """(T, D) to (T, D)."""
        gate_up, _ = self.gate_up_proj(hidden_TD)
        output, _ = self.down_proj(self.act_fn(gate_up))
        return output


class EmoExpertBlock(nn.Module):
    """Router and experts of a layer, the shared ones among them."""

    row_T: torch.Tensor
    allowed_NE: torch.Tensor
    usage_R: torch.Tensor
    counts_T: torch.Tensor

    def __init__(self, config: Any, layer: Layer, index: int, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.layer, self.index = layer, index
        self.normalise = bool(config.norm_topk_prob)
        self.gate = ReplicatedLinear(
            config.hidden_size, layer.num_experts, bias=False, prefix=f"{prefix}.gate"
        )
        self.experts = FusedMoEFactory(
            num_experts=layer.num_experts,
            top_k=layer.top_k,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            renormalize=False,
            prefix=f"{prefix}.experts",
            custom_routing_function=self._route,
        )
        rows = rows_of(vllm_config, self.gate.weight.device)
        self.per_request = rows is not None
        self.with_pools = rows is not None and not config.emo_serving["pools_refused"]
        if rows is not None:
            # Buffers: compiled code reads them anew in each forward.
            self.register_buffer("row_T", rows.row_T, persistent=False)
            self.register_buffer("allowed_NE", rows.allowed[index], persistent=False)
        usage = usage_of(vllm_config, self.gate.weight.device)
        self.counts_usage = usage is not None
        if usage is not None:
            self.register_buffer("usage_R", usage.sums[index], persistent=False)
            self.register_buffer("counts_T", usage.counts_T, persistent=False)

    def _route(
        self, hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return route(gating_output, self.layer, self.normalise)

    def forward(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """(T, D) to (T, D)."""
        logits_TE, _ = self.gate(hidden_TD)
        if self.counts_usage:
            count_usage(self.usage_R, logits_TE, self.counts_T)
        if self.per_request:
            logits_TE = logits_TE.float()
            allowed_TE = self.allowed_NE[self.row_T[: logits_TE.shape[0]]]
            logits_TE = logits_TE.masked_fill(~allowed_TE, float("-inf"))
            if self.with_pools:
                logits_TE = restrict_to_pools(logits_TE, self.row_T, self.index)
        return self.experts(hidden_states=hidden_TD, router_logits=logits_TE)


class EmoDecoderLayer(nn.Module):
    """Attention and experts, each behind a norm."""

    def __init__(self, config: Any, layer: Layer, index: int, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.self_attn = EmoAttention(config, vllm_config, f"{prefix}.self_attn")
        self.mlp: nn.Module
        if layer.is_dense:
            self.mlp = EmoMLP(config, f"{prefix}.mlp")
        else:
            self.mlp = EmoExpertBlock(config, layer, index, vllm_config, f"{prefix}.mlp")
        self.pre_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer adds, and what it adds to."""
        if residual_TD is None:
            residual_TD = hidden_TD
            hidden_TD = self.pre_attention_layernorm(hidden_TD)
        else:
            hidden_TD, residual_TD = self.pre_attention_layernorm(hidden_TD, residual_TD)
        hidden_TD = self.self_attn(positions, hidden_TD)
        hidden_TD, residual_TD = self.pre_feedforward_layernorm(hidden_TD, residual_TD)
        return self.mlp(hidden_TD), residual_TD


@support_torch_compile
class EmoModel(nn.Module):
    """The layers."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
        )
        self.layers = nn.ModuleList(
            EmoDecoderLayer(config, layer, index, vllm_config, f"{prefix}.layers.{index}")
            for index, layer in enumerate(layers_of(config))
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids (T,) to (T, D)."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states (T, D)."""
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_input_ids(input_ids)
        hidden_TD = inputs_embeds
        residual_TD = None
        for layer in self.layers:
            hidden_TD, residual_TD = layer(positions, hidden_TD, residual_TD)
        hidden_TD, _ = self.norm(hidden_TD, residual_TD)
        return hidden_TD


class EmoForCausalLM(nn.Module):
    """EMO with its head, as vLLM calls it."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".mlp.gate_proj": (".mlp.gate_up_proj", 0),
            ".mlp.up_proj": (".mlp.gate_up_proj", 1),
        }
    )
    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        self.model = EmoModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.rows = rows_of(vllm_config)
        check_promise(vllm_config)
        self.usage = usage_of(vllm_config, self.model.norm.weight.device)
        self.attention = f"{maybe_prefix(prefix, 'model')}.layers.0.self_attn.attn"

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids (T,) to (T, D)."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states (T, D). This method is not compiled: it says which token belongs to which request."""
        if self.rows is not None or self.usage is not None:
            starts = first_tokens(get_forward_context().attn_metadata, self.attention)
            if self.rows is not None:
                self.rows.prepare(starts, positions)
            if self.usage is not None:
                self.usage.prepare(starts, self.rows)
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """(T, D) to logits over the vocabulary."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Take the tensors of `WeightReader`."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
