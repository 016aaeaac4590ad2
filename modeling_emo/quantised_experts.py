"""The former place of `kernels.quantised_experts`, for programs that import it from here."""

from .kernels.quantised_experts import EXPERTS, Int4Experts, Int4ExpertsConfig, quantised_experts

__all__ = ["EXPERTS", "Int4Experts", "Int4ExpertsConfig", "quantised_experts"]
