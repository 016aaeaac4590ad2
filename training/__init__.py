"""Training EMO: choosing what trains."""

from .fine_tuning import KeepFrozenRows, keep_frozen_rows, train_only

__all__ = ["KeepFrozenRows", "keep_frozen_rows", "train_only"]
