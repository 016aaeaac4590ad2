from transformers_emo.checkpoints import CheckpointError
from transformers_emo.configuration import EmoConfig
from transformers_emo.modeling_emo import (
    EmoForCausalLM,
    EmoForSequenceClassification,
    EmoForTokenClassification,
    EmoModel,
    EmoPreTrainedModel,
)
from transformers_emo.quantization.calibrated import quantize_model
from transformers_emo.quantization.packed_config import PackedConfig
from transformers_emo.subsets import (
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
from transformers_emo.tokenization import EmoTokenizer

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
    "PackedConfig",
    "SubsetError",
    "SubsetOverlap",
    "WriteBack",
    "extract_subset",
    "mix",
    "quantize_model",
    "select_experts",
    "subset_overlap",
    "write_back",
]
