"""A number with its interval and its level by chance.

Shape suffixes: W resamplings of the documents, C shufflings that give the level by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

_NORMAL_95 = 1.96  # standard deviations on each side that hold 95 % of a normal distribution


@dataclass(frozen=True)
class Number:
    """One number.

    Args:
        name (`str`): what it is, such as `"topic cosine"`.
        layer (`int`, *optional*): the layer; `None` for all layers together.
        value (`float`): the number.
        low (`float`): the lower end of its 95 % interval over documents.
        high (`float`): the upper end.
        chance (`float`, *optional*): what it would be by chance.
        chance_low (`float`, *optional*): the lower end of what 95 % of the shufflings give.
        chance_high (`float`, *optional*): the upper end.
        unit (`str`, defaults to `""`): such as `"bits"`; with `"%"` the values are parts of 1.

    Example:

    ```python
    >>> from transformers_emo.analysis.numbers import Number
    >>> str(Number("topic cosine", None, 0.512, 0.5, 0.524, 0.99, 0.98, 1.0))
    '0.512 [0.500, 0.524], by chance 0.990'

    ```
    """

    name: str
    layer: int | None
    value: float
    low: float
    high: float
    chance: float | None = None
    chance_low: float | None = None
    chance_high: float | None = None
    unit: str = ""

    def __str__(self) -> str:
        text = f"{self.text('value')} [{self.text('low')}, {self.text('high')}]"
        text += f" {self.unit}" if self.unit else ""
        return text if self.chance is None else f"{text}, by chance {self.text('chance')}"

    def text(self, field: str) -> str:
        """One of the number's values, with as many digits as it is shown with, without the unit.

        Args:
            field (`str`): its name, such as `"value"` or `"chance"`.
        """
        value = getattr(self, field)
        if value is None:
            return "–"
        digits = 1 if self.unit == "%" else 3
        return f"{round(100 * value if self.unit == '%' else value, digits) + 0.0:.{digits}f}"

    def data(self) -> dict[str, Any]:
        """The number as JSON data."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Sampled:
    """A number, the same for resampled documents, and the same by chance.

    Args:
        value (`float`): the number.
        again_W (`np.ndarray`): (W,) the number with the documents drawn again (the bootstrap). All numbers
            are of the same draws, so they can be added and divided before the interval is taken.
        chance_C (`np.ndarray`, *optional*): (C,) the number with labels shuffled.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers_emo.analysis.numbers import Sampled
    >>> layers = [Sampled(0.2, np.array([0.1, 0.3])), Sampled(0.4, np.array([0.3, 0.5]))]
    >>> Sampled.mean(layers).number("share", unit="%").layer is None
    True

    ```
    """

    value: float
    again_W: np.ndarray
    chance_C: np.ndarray | None = None

    @classmethod
    def mean(cls, layers: Sequence[Sampled]) -> Sampled:
        """The mean over layers.

        Args:
            layers (`Sequence[Sampled]`): the number in each layer.
        """
        return cls.of(lambda *values: sum(values) / len(values), *layers)

    @classmethod
    def of(cls, function: Callable[..., Any], *numbers: Sampled) -> Sampled:
        """A number computed of others, draw by draw.

        Args:
            function (`Callable`): takes as many numbers or arrays as there are `numbers`.
            numbers (`Sampled`): the others.
        """
        chances = [one.chance_C for one in numbers]
        return cls(
            float(function(*(one.value for one in numbers))),
            function(*(one.again_W for one in numbers)),
            None if any(chance is None for chance in chances) else function(*chances),
        )

    def above_chance(self, most: Sampled) -> Sampled:
        """How far the number is from its level by chance, as a part of the way to the most it could be.

        0 is the level by chance, 1 the most.

        Args:
            most (`Sampled`): the most it could be.
        """
        assert self.chance_C is not None
        base = float(self.chance_C.mean())
        return Sampled(
            (self.value - base) / (most.value - base),
            (self.again_W - self.again_W.mean() + self.value - base) / (most.again_W - base),
            (self.chance_C - base) / (most.value - base),
        )

    def number(self, name: str, layer: int | None = None, unit: str = "") -> Number:
        """The number with its interval.

        The interval is the standard deviation over the draws, 1.96 times to each side.

        Args:
            name (`str`): what it is.
            layer (`int`, *optional*): the layer.
            unit (`str`, defaults to `""`): its unit.
        """
        spread = _NORMAL_95 * float(np.std(self.again_W))
        low, high = self.value - spread, self.value + spread
        if self.chance_C is None:
            return Number(name, layer, self.value, low, high, unit=unit)
        chance, around = float(self.chance_C.mean()), _NORMAL_95 * float(np.std(self.chance_C))
        return Number(name, layer, self.value, low, high, chance, chance - around, chance + around, unit)
