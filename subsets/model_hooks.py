"""What the package adds to the network, which does not import this room: `EmoPreTrainedModel._package`."""

from .loading import from_pretrained, kept_experts, load_adapter, load_weights
from .swapping import share_backbone, swap_experts

__all__ = [
    "from_pretrained",
    "kept_experts",
    "load_adapter",
    "load_weights",
    "share_backbone",
    "swap_experts",
]
