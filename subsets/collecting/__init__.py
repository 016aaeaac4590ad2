"""Scores of experts, collected in parts: a killed run goes on, and parts of many processes are merged."""

from .collect import collect_statistics
from .folder import SelectionStatistics
from .merge import merged_subsets

__all__ = ["SelectionStatistics", "collect_statistics", "merged_subsets"]
