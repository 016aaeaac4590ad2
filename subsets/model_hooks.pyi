from .adapter_record import check_adapter_config
from .hub_push import complete_card
from .loading import from_pretrained, kept_experts, load_adapter, load_weights
from .size_check import check_before_building
from .swapping import share_backbone, swap_experts

__all__ = [
    "check_adapter_config",
    "check_before_building",
    "complete_card",
    "from_pretrained",
    "kept_experts",
    "load_adapter",
    "load_weights",
    "share_backbone",
    "swap_experts",
]
