"""Model files: read in part, written whole. Nothing here knows of experts."""

from ..imports.lazy_imports import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
