from .authors_metadata import pruning_metadata, save_pruning_metadata
from .choosing.selection import select_experts
from .choosing.usage import ExpertUsage
from .composition import (
    SubsetOverlap,
    difference,
    intersection,
    mix,
    read_subsets,
    subset_overlap,
    union,
)
from .expert_subset import ExpertSubset
from .library import find_subset, library_names
from .monitoring.domain_usage import DomainMonitor, DomainShare, RequestUsage, TopExpert
from .numbering import present_experts, root_experts
from .publishing.push_folder import push_folder
from .reduced_config import local_experts, subset_config
from .rewriting.extract import extract_subset
from .rewriting.write_back import WriteBack, write_back
from .validation import SubsetError

__all__ = [
    "DomainMonitor",
    "DomainShare",
    "ExpertSubset",
    "ExpertUsage",
    "RequestUsage",
    "SubsetError",
    "SubsetOverlap",
    "TopExpert",
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
    "write_back",
]
