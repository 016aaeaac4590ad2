"""How ranks share a model, and what each of them then holds.

The ways and their order are those of Transformers: tensor parallelism within FSDP2 within replicas.
Experts go to ranks of the first two.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from ..configuration import EmoConfig
from ..modeling_emo import EmoForCausalLM
from ..modeling_emo.parallel import check_distribution

_NUMBER = re.compile(r"\.\d+\.")
_EXPERTS = re.compile(r".*\.mlp\.experts\.\w+")
# The dimension that each style cuts a weight along, and a bias, `None` where each rank has all of it.
_CUTS: dict[str, tuple[int, int | None]] = {
    "colwise": (0, 0),
    "colwise_gather_output": (0, 0),
    "embedding_rowwise": (0, None),
    "packed_colwise": (-2, None),
    "rowwise": (-1, None),
}


@dataclass(frozen=True)
class ParallelLayout:
    """How many ranks share a model in which way.

    Args:
        tp_size (`int`, defaults to 1): ranks that share each matrix.
        fsdp_size (`int`, defaults to 1): ranks that share all weights, and gather those of a layer to use it.
        ep_size (`int`, defaults to 1): ranks that share the experts, of the ranks of the first two.
        replicas (`int`, defaults to 1): copies of all that, each with texts of its own.

    Raises:
        ValueError: if a number is below 1, or the experts' ranks are not a part of the others.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.planning import ParallelLayout
    >>> layout = ParallelLayout(fsdp_size=8, ep_size=8, replicas=128)
    >>> layout.ranks, layout.ranks_with_texts
    (1024, 1024)
    >>> held = layout.held(EmoConfig(num_hidden_layers=1))
    >>> held["model.layers.0.mlp.experts.down_proj"] == 128 * 2048 * 1024 // 8
    True

    ```
    """

    tp_size: int = 1
    fsdp_size: int = 1
    ep_size: int = 1
    replicas: int = 1

    tp_plan = None  # as `DistributedConfig` has it: the model's own

    def __post_init__(self):
        for name in ("tp_size", "fsdp_size", "ep_size", "replicas"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` is {value!r}, expected a whole number from 1.")
        if self.ep_size > 1 and (self.ep_size % self.tp_size or self.tp_size * self.fsdp_size % self.ep_size):
            raise ValueError(
                f"Experts cannot go to {self.ep_size} of {self.tp_size} x {self.fsdp_size} ranks: `ep_size` "
                f"must be a multiple of `tp_size` ({self.tp_size}) that divides `tp_size` times `fsdp_size` "
                f"({self.tp_size * self.fsdp_size})."
            )

    @property
    def ranks(self) -> int:
        """`int`: how many there are."""
        return self.tp_size * self.fsdp_size * self.replicas

    @property
    def ranks_with_texts(self) -> int:
        """`int`: how many of them have texts of their own."""
        return self.fsdp_size * self.replicas

    @property
    def expert_fsdp_size(self) -> int:
        """`int`: how many ranks share the experts that one of `ep_size` has."""
        return self.fsdp_size * self.tp_size // self.ep_size if self.ep_size > 1 else self.fsdp_size

    def check(self, config: EmoConfig) -> None:
        """Check that a model can be shared so, by the check that loading makes.

        Args:
            config (`EmoConfig`): the model's config.

        Raises:
            ValueError: if a layer's experts, or the heads of the attention, do not go round.
        """
        check_distribution(config, self)

    def held(self, config: EmoConfig, rank: int = 0) -> dict[str, int]:
        """How many numbers of each parameter a rank holds.

        Args:
            config (`EmoConfig`): the model's config.
            rank (`int`, defaults to 0): which rank; the first has the most where a size does not divide.

        Raises:
            ValueError: if the model cannot be shared so.
        """
        self.check(config)
        with torch.device("meta"):
            model: Any = EmoForCausalLM(config)
        tensor = rank % self.tp_size
        fully, of_experts = rank // self.tp_size % self.fsdp_size, rank % max(self.ep_size, 1)
        of_fewer = rank % (self.tp_size * self.fsdp_size) // self.ep_size
        held = {}
        for name, parameter in model.named_parameters():
            shape = list(parameter.shape)
            if self.ep_size > 1 and _EXPERTS.fullmatch(name):
                shape[0] = _part(shape[0], self.ep_size, of_experts)
                shape[0] = _part(shape[0], self.expert_fsdp_size, of_fewer)
            else:
                dimension = self._cut(name, model.tp_plan or {})
                if dimension is not None:
                    shape[dimension] = _part(shape[dimension], self.tp_size, tensor)
                shape[0] = _part(shape[0], self.fsdp_size, fully)
            held[name] = math.prod(shape)
        return held

    def _cut(self, name: str, plan: dict[str, str]) -> int | None:
        """The dimension along which tensor parallelism cuts a parameter."""
        if self.tp_size == 1:
            return None
        pattern = _NUMBER.sub(".*.", name)
        module, _, kind = pattern.rpartition(".")
        style = plan.get(pattern) or plan.get(module)
        if style is None or style not in _CUTS:
            return None
        return _CUTS[style][1 if kind == "bias" else 0]


def _part(size: int, ranks: int, rank: int) -> int:
    """How much of a dimension a rank has: all have equally much, but for the last."""
    each = -(-size // ranks)
    return min(each, max(size - rank * each, 0))
