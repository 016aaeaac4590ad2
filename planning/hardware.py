"""Hardware as a few numbers, and presets with the figures that its makers publish."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Hardware:
    """One device, and what connects it with others.

    All rates are the makers' peaks: a plan's times are what cannot be beaten, not what will be measured.

    Args:
        name (`str`): what it is called.
        memory (`float`): bytes of memory that a rank has.
        bandwidth (`float`): bytes a second that it reads from its memory.
        flops (`float`): operations a second in bfloat16, dense, sums in float32.
        link (`float`): bytes a second that a rank sends to others in its node, one way.
        node_link (`float`): bytes a second that a rank sends to other nodes, one way.
        per_node (`int`): ranks in a node.

    Raises:
        ValueError: if a number is not above 0 and finite.

    Example:

    ```python
    >>> from transformers_emo.planning import HARDWARE
    >>> HARDWARE["h200"].memory, HARDWARE["h200"].bandwidth
    (141000000000.0, 4800000000000.0)

    ```
    """

    name: str
    memory: float
    bandwidth: float
    flops: float
    link: float
    node_link: float
    per_node: int

    def __post_init__(self):
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise ValueError(f"`{field.name}` of the hardware is {value!r}, expected a number above 0.")
        if not isinstance(self.per_node, int):
            raise ValueError(f"`per_node` is {self.per_node!r}, expected a whole number of ranks.")

    def replace(self, **numbers: Any) -> Hardware:
        """The same with other numbers.

        Args:
            numbers: of the arguments of the class, those that are not `None`.
        """
        given = {name: value for name, value in numbers.items() if value is not None}
        return dataclasses.replace(self, **given)


# NVIDIA's data sheets of A100, H100, H200 and B200 (without sparsity, half of what they give with it; NVLink
# one way, half of what they give), AMD's of MI300X, NVIDIA's of the RTX 4090. Between nodes: one network card
# of 200 (A100) or 400 Gbit/s a GPU, as in DGX. The laptop is a class, not a product: two channels of
# DDR5-5600 read 2 * 8 * 5.6e9 bytes a second; its operations and links are round numbers.
HARDWARE: dict[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        Hardware("laptop", 32e9, 89.6e9, 1e12, 10e9, 0.125e9, 1),
        Hardware("rtx4090", 24e9, 1.008e12, 165e12, 32e9, 3.125e9, 2),
        Hardware("a100", 80e9, 2.039e12, 312e12, 300e9, 25e9, 8),
        Hardware("h100", 80e9, 3.35e12, 989e12, 450e9, 50e9, 8),
        Hardware("h200", 141e9, 4.8e12, 989e12, 450e9, 50e9, 8),
        Hardware("b200", 180e9, 8e12, 2250e12, 900e9, 50e9, 8),
        Hardware("mi300x", 192e9, 5.3e12, 1307e12, 448e9, 50e9, 8),
    )
}
"""Presets by name."""


def hardware_named(name: str) -> Hardware:
    """A preset.

    Args:
        name (`str`): its name.

    Raises:
        ValueError: if there is no such preset.

    Example:

    ```python
    >>> from transformers_emo.planning.hardware import hardware_named
    >>> hardware_named("h100").per_node
    8

    ```
    """
    if name not in HARDWARE:
        raise ValueError(
            f"There is no hardware {name!r}: expected one of {', '.join(HARDWARE)}. Give the numbers of "
            "another one by options, on top of the preset that is nearest."
        )
    return HARDWARE[name]
