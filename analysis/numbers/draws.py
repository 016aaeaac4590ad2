"""How documents are drawn again, and how their domains are shuffled: the same for every number.

Shape suffixes: N documents, M domains, W draws, C shufflings.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np


class Draws:
    """The weights of documents in each draw, and the shuffled domains.

    A draw takes as many documents of each domain as there are, some of them several times. Row 0 is no draw:
    every document counts once, and has its own domain.

    Args:
        domains (`Sequence[str]` or `np.ndarray`): the domain of each document.
        num (`int`, defaults to 200): how many draws.
        num_shuffled (`int`, defaults to 50): how often domains are shuffled.
        seed (`int`, defaults to 0): the seed of both.

    Raises:
        ValueError: if there are fewer than two domains.

    Example:

    ```python
    >>> from transformers_emo.analysis.numbers.draws import Draws
    >>> draws = Draws(["python", "coq", "coq"], num=5)
    >>> draws.weight_WN.shape, draws.weight_WN[0].tolist(), draws.names
    ((6, 3), [1, 1, 1], ['coq', 'python'])

    ```
    """

    def __init__(
        self, domains: Sequence[str] | np.ndarray, *, num: int = 200, num_shuffled: int = 50, seed: int = 0
    ):
        names, domain_N = np.unique(np.asarray(domains), return_inverse=True)
        self.names = [str(name) for name in names]
        if len(self.names) < 2:
            raise ValueError(
                f"Domains are compared with each other: expected at least 2, got {self.names}. Add one."
            )
        self.domain_N = domain_N.astype(np.int32)
        rng = np.random.default_rng(seed)
        self.weight_WN = np.ones((num + 1, len(domain_N)), dtype=np.uint8)
        for domain in range(len(names)):
            places = np.flatnonzero(domain_N == domain)
            even = np.full(len(places), 1 / len(places))
            self.weight_WN[1:, places] = rng.multinomial(len(places), even, num).astype(np.uint8)
        self.shuffled_CN = np.stack([rng.permutation(self.domain_N) for _ in range(num_shuffled)])

    def first(self, num: int) -> Draws:
        """The same with the first draws only.

        Args:
            num (`int`): how many.
        """
        fewer = copy(self)
        fewer.weight_WN = self.weight_WN[: num + 1]
        return fewer

    @property
    def num_domains(self) -> int:
        """M."""
        return len(self.names)
