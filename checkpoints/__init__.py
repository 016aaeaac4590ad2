"""Model files: reading parts of them, and writing whole ones. Nothing here knows about experts."""

from ..imports.lazy_names import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__spec__)
