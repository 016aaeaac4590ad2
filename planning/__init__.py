"""Before anything is downloaded or run: what a model takes, and what fits a machine or many."""

from .machine import Machine, this_machine
from .model_info import ModelInfo, model_info
from .model_sizes import ModelSizes, Size

__all__ = ["Machine", "ModelInfo", "ModelSizes", "Size", "model_info", "this_machine"]
