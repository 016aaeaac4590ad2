"""Subsets of experts: what they are, and reading only their part of a checkpoint."""

from .checkpoint import Checkpoint, LazyTensor, wanted_ranges
from .expert_subset import (
    ExpertSubset,
    SubsetError,
    local_experts,
    present_experts,
    root_experts,
    subset_config,
)
from .safetensors_header import CheckpointError, TensorSpan
from .selection import select_experts

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ExpertSubset",
    "LazyTensor",
    "SubsetError",
    "TensorSpan",
    "local_experts",
    "present_experts",
    "root_experts",
    "select_experts",
    "subset_config",
    "wanted_ranges",
]
