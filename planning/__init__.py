"""Before anything is downloaded or run: what a model takes, and what fits a machine or many."""

from .hardware import HARDWARE, Hardware
from .machine import Machine, this_machine
from .model_info import ModelInfo, model_info
from .model_sizes import ModelSizes, Size
from .parallel_layout import ParallelLayout
from .plan import Plan, plan_run

__all__ = [
    "HARDWARE",
    "Hardware",
    "Machine",
    "ModelInfo",
    "ModelSizes",
    "ParallelLayout",
    "Plan",
    "Size",
    "model_info",
    "plan_run",
    "this_machine",
]
