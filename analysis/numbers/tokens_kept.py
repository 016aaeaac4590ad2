"""The tokens that router statistics keep one by one, for one layer at a time.

Shape suffixes: S tokens, K experts that a token picks, W draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..routing import RoutingStatistics
from .draws import Draws
from .information import Picks

LABELS = {"domain": "domain", "token": "token", "characters": "word class by characters",
          "part_of_speech": "part of speech"}  # fmt: skip


@dataclass(frozen=True)
class KeptTokens:
    """Which tokens are taken, and their labels.

    Args:
        statistics (`RoutingStatistics`): where they are.
        stride (`int`): every so-many-th token is taken.
        document_S (`np.ndarray`): int (S,), the place of each one's document among all.
        labels (`dict[str, np.ndarray]`): int (S,) for each of `LABELS`; -1 for a token without that label.
        names (`dict[str, list[str]]`): what the labels mean.

    Example: see `kept_tokens`.
    """

    statistics: RoutingStatistics
    stride: int
    document_S: np.ndarray
    labels: dict[str, np.ndarray]
    names: dict[str, list[str]]

    def picks(self, layer: int, draws: Draws, chosen_S: np.ndarray | None = None) -> Picks:
        """The experts that these tokens take in a layer.

        Args:
            layer (`int`): the layer.
            draws (`Draws`): which documents are drawn.
            chosen_S (`np.ndarray`, *optional*): bool (S,), only these tokens.
        """
        found, skipped, name = [], 0, f"picks_{layer}"
        for part in self.statistics.each_token_part([name]):
            found.append(part[name][(-skipped) % self.stride :: self.stride])
            skipped += len(part[name])
        expert_SK, document_S = np.concatenate(found), self.document_S
        if chosen_S is not None:
            expert_SK, document_S = expert_SK[chosen_S], document_S[chosen_S]
        return Picks(expert_SK.astype(np.int64), draws.weight_WN[:, document_S].astype(np.float64))


def kept_tokens(statistics: RoutingStatistics, draws: Draws, max_tokens: int = 200_000) -> KeptTokens:
    """Take tokens, no more than a limit, evenly over all documents.

    Args:
        statistics (`RoutingStatistics`): where they are.
        draws (`Draws`): has the domain of each document.
        max_tokens (`int`, defaults to 200000): the most tokens.

    Example: see `routing_numbers`.
    """
    total = sum(len(part["token"]) for part in statistics.each_token_part(["token"]))
    stride = max(1, -(-total // max_tokens))
    columns: dict[str, list[np.ndarray]] = {}
    skipped = 0
    for part in statistics.each_token_part(["document", "token", "characters", "part_of_speech"]):
        for name, values in part.items():
            columns.setdefault(name, []).append(values[(-skipped) % stride :: stride])
        skipped += len(part["token"])
    joined = {name: np.concatenate(arrays) for name, arrays in columns.items()}
    place_S = np.searchsorted(statistics.documents()["document"], joined["document"])
    labels: dict[str, np.ndarray] = {"domain": draws.domain_N[place_S]}
    names = {"domain": draws.names}
    labels["token"] = np.unique(joined["token"], return_inverse=True)[1]
    names["token"] = []
    for name in ("characters", "part_of_speech"):
        present = np.array([value is not None for value in joined[name]])
        label_S = np.full(len(present), -1)
        values, label_S[present] = np.unique(joined[name][present].astype(str), return_inverse=True)
        labels[name], names[name] = label_S, [str(value) for value in values]
    return KeptTokens(statistics, stride, place_S, labels, names)
