"""Training EMO: batches for `Trainer`, adapters that know their experts, and the choice of what trains."""

from ..imports.lazy_imports import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
