from .adapters import expand_adapter, load_adapter, lora_config, save_adapter
from .collator import DocumentCollator
from .fine_tuning import KeepFrozenRows, keep_frozen_rows, train_only
from .recipe_files import Recipe
from .recipes import training_arguments
from .routing_monitor import RoutingMonitor
from .runs import build_trainer, last_checkpoint, train
from .trainer import EmoTrainer, accumulate_balance

__all__ = [
    "DocumentCollator",
    "EmoTrainer",
    "KeepFrozenRows",
    "Recipe",
    "RoutingMonitor",
    "accumulate_balance",
    "build_trainer",
    "expand_adapter",
    "keep_frozen_rows",
    "last_checkpoint",
    "load_adapter",
    "lora_config",
    "save_adapter",
    "train",
    "train_only",
    "training_arguments",
]
