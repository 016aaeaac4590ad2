"""EMO for Hugging Face Transformers; importing this package registers it with the auto-classes."""

from .configuration import EmoConfig
from .modeling_emo import (
    EmoForCausalLM,
    EmoForSequenceClassification,
    EmoForTokenClassification,
    EmoModel,
    EmoPreTrainedModel,
)
from .registration import register
from .subsets import (
    CheckpointError,
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

register()
