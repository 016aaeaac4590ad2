"""From training checkpoints to the released layout and back, and from that to expert shards."""

from ..imports.lazy_imports import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
