"""What the routers learned, in numbers: each with its level by chance and an interval."""

from .measured import Number, Sampled
from .routing_numbers import RoutingNumbers, routing_numbers

__all__ = ["Number", "RoutingNumbers", "Sampled", "routing_numbers"]
