"""Converting checkpoints: from OLMo-core's training layout to the released one and back, and to others."""

from ..imports.lazy_names import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__spec__)
