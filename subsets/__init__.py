"""Subsets of experts: what they are, and reading only their part of a checkpoint."""

from ..imports.lazy_imports import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
