"""The EMO tokenizer, packing documents into windows, and prompts with answers for fine-tuning."""

from ..imports.lazy_imports import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
