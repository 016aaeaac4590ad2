"""The former place of `kernels.quantised_experts`, for programs that import it from here."""

from .kernels.quantised_experts import quantised_experts

__all__ = ["quantised_experts"]
