"""Training EMO: batches for `Trainer`, adapters that know their experts, and the choice of what trains."""

from .adapters import expand_adapter, load_adapter, lora_config, save_adapter
from .collator import DocumentCollator
from .fine_tuning import KeepFrozenRows, keep_frozen_rows, train_only
from .trainer import EmoTrainer, accumulate_balance

__all__ = [
    "DocumentCollator",
    "EmoTrainer",
    "KeepFrozenRows",
    "accumulate_balance",
    "expand_adapter",
    "keep_frozen_rows",
    "load_adapter",
    "lora_config",
    "save_adapter",
    "train_only",
]
