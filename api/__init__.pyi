from .checkpoints import CheckpointError
from .configuration import EmoConfig
from .modeling_emo import (
    EmoForCausalLM,
    EmoForSequenceClassification,
    EmoForTokenClassification,
    EmoModel,
    EmoPreTrainedModel,
)
from .subsets import (
    ExpertSubset,
    SubsetError,
    SubsetOverlap,
    WriteBack,
    extract_subset,
    mix,
    select_experts,
    subset_overlap,
    write_back,
)
from .tokenization import EmoTokenizer
from .version import __version__

__all__ = [
    "__version__",
    "CheckpointError",
    "EmoConfig",
    "EmoForCausalLM",
    "EmoForSequenceClassification",
    "EmoForTokenClassification",
    "EmoModel",
    "EmoPreTrainedModel",
    "EmoTokenizer",
    "ExpertSubset",
    "SubsetError",
    "SubsetOverlap",
    "WriteBack",
    "extract_subset",
    "mix",
    "select_experts",
    "subset_overlap",
    "write_back",
]
