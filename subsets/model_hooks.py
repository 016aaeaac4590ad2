"""What the package adds to the network, which does not import this room: `EmoPreTrainedModel._package`."""

from .hub_push import complete_card
from .loading import from_pretrained, kept_experts, load_adapter, load_weights
from .swapping import share_backbone, swap_experts

__all__ = [
    "complete_card",
    "from_pretrained",
    "kept_experts",
    "load_adapter",
    "load_weights",
    "share_backbone",
    "swap_experts",
]
