"""The EMO tokenizer."""

from .tokenization_emo import EmoTokenizer

__all__ = ["EmoTokenizer"]
