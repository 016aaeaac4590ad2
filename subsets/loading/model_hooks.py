"""What the package adds to the network, which does not import this room: see `PackageHooks`.

`registration.py` imports it when the network first uses one of them.
"""

from ...modeling_emo.kernels.decoding import decode_layer
from ...modeling_emo.kernels.layer_kernels import few_rows_linear, rms_norm, rotate
from ..publishing.cards import complete_card
from .adapter_record import check_adapter_config, check_adapters
from .choice.default_choice import from_pretrained
from .from_pretrained import load_checked_adapter
from .masking import kept_experts
from .swapping import share_backbone, swap_experts
from .tokenizer_copy import copy_tokenizer, tokenizer_to_push
from .weight_loading import check_before_building, load_weights

__all__ = [
    "check_adapter_config",
    "check_adapters",
    "check_before_building",
    "complete_card",
    "copy_tokenizer",
    "decode_layer",
    "few_rows_linear",
    "from_pretrained",
    "kept_experts",
    "load_checked_adapter",
    "load_weights",
    "rms_norm",
    "rotate",
    "share_backbone",
    "swap_experts",
    "tokenizer_to_push",
]
