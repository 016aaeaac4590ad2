from .adapter_record import check_adapter_config
from .default_choice import from_pretrained
from .hub_push import complete_card
from .loading import kept_experts, load_adapter, load_weights
from .size_check import check_before_building
from .swapping import share_backbone, swap_experts
from .tokenizer_copy import copy_tokenizer, tokenizer_to_push

__all__ = [
    "check_adapter_config",
    "check_before_building",
    "complete_card",
    "copy_tokenizer",
    "from_pretrained",
    "kept_experts",
    "load_adapter",
    "load_weights",
    "share_backbone",
    "swap_experts",
    "tokenizer_to_push",
]
