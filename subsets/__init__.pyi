from .authors_metadata import pruning_metadata, save_pruning_metadata
from .checkpoint import Checkpoint, LazyTensor, wanted_ranges
from .composition import (
    SubsetOverlap,
    difference,
    intersection,
    mix,
    read_subsets,
    subset_overlap,
    union,
)
from .expert_subset import ExpertSubset, SubsetError
from .extraction import extract_subset
from .hub_push import push_folder
from .library import find_subset, library_names
from .model_experts import local_experts, present_experts, root_experts, subset_config
from .safetensors_header import CheckpointError, TensorSpan
from .selection import select_experts
from .writing_back import WriteBack, write_back

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ExpertSubset",
    "LazyTensor",
    "SubsetError",
    "SubsetOverlap",
    "TensorSpan",
    "WriteBack",
    "difference",
    "extract_subset",
    "find_subset",
    "intersection",
    "library_names",
    "local_experts",
    "mix",
    "present_experts",
    "pruning_metadata",
    "push_folder",
    "read_subsets",
    "root_experts",
    "save_pruning_metadata",
    "select_experts",
    "subset_config",
    "subset_overlap",
    "union",
    "wanted_ranges",
    "write_back",
]
