"""EMO for Hugging Face Transformers; importing this package registers it with the auto-classes."""

from transformers_emo.imports.lazy_imports import lazy_names

from .registration import register

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)

register()
