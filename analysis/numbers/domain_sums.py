"""Sums over the documents of each domain: as they are, drawn again, and with shuffled domains.

Shape suffixes: N documents of a part, M domains, R values of a document, W draws, C shufflings.
"""

from __future__ import annotations

import numpy as np

from .draws import Draws


class DomainSums:
    """Adds up the rows of documents by domain. Documents come part by part, and are not held.

    Args:
        draws (`Draws`): which documents are drawn, and how domains are shuffled.
        size (`int`): how many values a document has (R).

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers_emo.analysis.numbers.domain_sums import DomainSums
    >>> from transformers_emo.analysis.numbers.draws import Draws
    >>> sums = DomainSums(Draws(["a", "b", "b"], num=3, num_shuffled=2), size=2)
    >>> sums.add(np.array([0, 1, 2]), np.array([[1.0, 0.0], [2.0, 1.0], [3.0, 0.0]]))
    >>> sums.drawn_WMR[0].tolist(), sums.shuffled_CMR.shape
    ([[1.0, 0.0], [5.0, 1.0]], (2, 2, 2))

    ```
    """

    def __init__(self, draws: Draws, size: int):
        self.draws = draws
        self.drawn_WMR = np.zeros((len(draws.weight_WN), draws.num_domains, size))
        self.shuffled_CMR = np.zeros((len(draws.shuffled_CN), draws.num_domains, size))

    def add(self, documents: np.ndarray, rows_NR: np.ndarray) -> None:
        """Add documents.

        Args:
            documents (`np.ndarray`): int (N,), their places among all documents.
            rows_NR (`np.ndarray`): (N, R) their values.
        """
        rows_NR = rows_NR.astype(np.float64)
        domain_N = self.draws.domain_N[documents]
        for domain in np.unique(domain_N):
            own = domain_N == domain
            weight_WN = self.draws.weight_WN[:, documents[own]].astype(np.float64)
            self.drawn_WMR[:, domain] += weight_WN @ rows_NR[own]
        each_M = np.arange(self.draws.num_domains)
        for sums_MR, label_N in zip(self.shuffled_CMR, self.draws.shuffled_CN[:, documents], strict=True):
            sums_MR += (label_N == each_M[:, None]).astype(np.float64) @ rows_NR

    def both(self) -> list[np.ndarray]:
        """The sums of all draws (W, M, R), and those of all shufflings (C, M, R)."""
        return [self.drawn_WMR, self.shuffled_CMR]
