from .in_use.routed_experts import GenerateWithExpertsOutput, RoutedExperts
from .losses import BalanceCounts, document_pool_losses, lm_z_loss, load_balancing_loss
from .modeling_emo import (
    EmoForCausalLM,
    EmoForSequenceClassification,
    EmoForTokenClassification,
    EmoModel,
    EmoPreTrainedModel,
)
from .pools.document_pool import pool_mask
from .pools.pool_sizes import draw_pool_sizes, step_seed
from .pools.segments import (
    flatten_segments,
    lengths_from_segments,
    segments_from_eos,
    segments_from_lengths,
    segments_from_positions,
)

__all__ = [
    "BalanceCounts",
    "EmoForCausalLM",
    "EmoForSequenceClassification",
    "EmoForTokenClassification",
    "EmoModel",
    "EmoPreTrainedModel",
    "GenerateWithExpertsOutput",
    "RoutedExperts",
    "document_pool_losses",
    "draw_pool_sizes",
    "flatten_segments",
    "lengths_from_segments",
    "lm_z_loss",
    "load_balancing_loss",
    "pool_mask",
    "segments_from_eos",
    "segments_from_lengths",
    "segments_from_positions",
    "step_seed",
]
