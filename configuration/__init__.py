"""What an EMO network is made of, as data."""

from .configuration_emo import LEGACY_MODEL_TYPE, EmoConfig, LegacyEmoConfig
from .layer_experts import LayerExperts

__all__ = ["LEGACY_MODEL_TYPE", "EmoConfig", "LayerExperts", "LegacyEmoConfig"]
