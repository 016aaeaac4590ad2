"""The EMO network."""

from ..imports.lazy_names import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__spec__)
