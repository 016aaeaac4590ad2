"""What the package adds to the network, which does not import this room: `EmoPreTrainedModel._package`."""

from ...lazy_names import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__spec__)
