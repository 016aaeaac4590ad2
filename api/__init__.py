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
from .version import __version__



__all__ = [
    "EmoConfig",
    "EmoForCausalLM",
    "EmoForSequenceClassification",
    "EmoForTokenClassification",
    "EmoModel",
    "EmoPreTrainedModel",
]

register()
