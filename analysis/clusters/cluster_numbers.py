"""How clear clusters are, and what they follow: domains, tokens, or classes of words.

Shape suffixes: S tokens, W draws, C clusters.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..numbers import Number, Sampled
from ..numbers.draws import Draws
from ..numbers.profiles import entropy_of

_NAMES = {
    "domain": "domain",
    "token": "token",
    "characters": "word class by characters",
    "part_of_speech": "part of speech",
}
MEANING = {
    "silhouette": "how much nearer tokens are to their own cluster than to the next; from -1 to 1",
    "domains in a cluster": "entropy of a cluster's domains, as a part of that of all; 0 is one domain",
    "purity": "share of tokens that have the most frequent label of their cluster",
    "agreement": "what cluster and label have in common; 0 is chance, 100 % the same grouping",
}
_SHUFFLED = 10
_SILHOUETTE_TOKENS = 4000  # every pair of them is compared


def cluster_numbers(
    cluster_S: np.ndarray,
    labels: Mapping[str, np.ndarray],
    draws: Draws,
    document_S: np.ndarray,
    vectors_SD: np.ndarray,
    cluster_of_vectors_S: np.ndarray,
    seed: int = 0,
) -> list[Number]:
    """Numbers of clusters.

    - Silhouette: how much nearer tokens are to their own cluster than to the next, by the cosine; from -1 to
    1. By
      chance: clusters shuffled among the tokens.
    - Domains in a cluster: the entropy of the domains of a cluster's tokens, in the mean over tokens, as a
    part of
      the entropy of all domains. A cluster of one domain has 0.
    - Purity for domains, tokens and classes of words: the share of tokens that have the most frequent label
    of their
      cluster.
    - Agreement with the same: the mutual information of cluster and label, without what chance gives, as a
    part of
      the mean of both entropies. 0 is chance, 100 % is the same grouping.

    Args:
        cluster_S (`np.ndarray`): int (S,), the cluster of each token.
        labels (`Mapping[str, np.ndarray]`): for `domain`, `token`, `characters` and `part_of_speech` the
            label of each token; `None` for a token without one.
        draws (`Draws`): which documents are drawn.
        document_S (`np.ndarray`): int (S,), the document of each token.
        vectors_SD (`np.ndarray`): vectors of length 1 of some tokens.
        cluster_of_vectors_S (`np.ndarray`): their clusters.
        seed (`int`, defaults to 0): the seed of shuffling.

    Example: see `cluster_tokens`.
    """
    rng = np.random.default_rng(seed)
    numbers = [_silhouette(vectors_SD, cluster_of_vectors_S, rng)]
    for label, values_S in labels.items():
        has_S = np.array([value is not None for value in values_S])
        if not has_S.any():
            continue
        value_S = np.unique(values_S[has_S].astype(str), return_inverse=True)[1]
        own_S, weight_WS = cluster_S[has_S], draws.weight_WN[:, document_S[has_S]].astype(np.float64)
        shuffled = [rng.permutation(value_S) for _ in range(_SHUFFLED)]
        if label == "domain":
            numbers.append(
                _sampled(_domain_entropy, own_S, value_S, weight_WS, shuffled).number(
                    "domains in a cluster", unit="%"
                )
            )
        name = _NAMES[label]
        purity = _sampled(_purity, own_S, value_S, weight_WS, shuffled)
        numbers.append(purity.number(f"purity, {name}", unit="%"))
        information = _sampled(_information, own_S, value_S, weight_WS, shuffled)
        most = _sampled(_mean_entropy, own_S, value_S, weight_WS, shuffled)
        numbers.append(information.above_chance(most).number(f"agreement with {name}", unit="%"))
    return numbers


def _silhouette(vectors_SD: np.ndarray, cluster_S: np.ndarray, rng: np.random.Generator) -> Number:
    from sklearn.metrics import silhouette_samples

    some = rng.permutation(len(vectors_SD))[:_SILHOUETTE_TOKENS]
    if not 1 < len(np.unique(cluster_S[some])) < len(some):
        return Number("silhouette", None, 0.0, 0.0, 0.0)
    value_S = silhouette_samples(vectors_SD[some], cluster_S[some], metric="cosine")
    again_W = rng.choice(value_S, (200, len(some))).mean(-1)
    mixed_S = rng.permutation(cluster_S[some])
    chance = silhouette_samples(vectors_SD[some], mixed_S, metric="cosine").mean()
    return Sampled(float(value_S.mean()), again_W, np.full(1, chance)).number("silhouette")


def _sampled(function, cluster_S, label_S, weight_WS, shuffled) -> Sampled:
    """A number of the table of clusters and labels, in each draw and for shuffled labels."""
    value_W = np.array([function(_table(cluster_S, label_S, weight_S)) for weight_S in weight_WS])
    even_S = np.ones(len(cluster_S))
    chance_C = np.array([function(_table(cluster_S, other_S, even_S)) for other_S in shuffled])
    return Sampled(float(value_W[0]), value_W[1:], chance_C)


def _table(cluster_S: np.ndarray, label_S: np.ndarray, weight_S: np.ndarray) -> np.ndarray:
    """How many tokens of each cluster have each label."""
    clusters, labels = int(cluster_S.max()) + 1, int(label_S.max()) + 1
    counts = np.bincount(cluster_S * labels + label_S, weights=weight_S, minlength=clusters * labels)
    return counts.reshape(clusters, labels)


def _purity(table: np.ndarray) -> float:
    return table.max(1).sum() / table.sum()


def _domain_entropy(table: np.ndarray) -> float:
    used = table[table.sum(1) > 0]
    return (entropy_of(used) * used.sum(1)).sum() / used.sum() / entropy_of(table.sum(0))


def _information(table: np.ndarray) -> float:
    return entropy_of(table.sum(1)) + entropy_of(table.sum(0)) - entropy_of(table.ravel())


def _mean_entropy(table: np.ndarray) -> float:
    return (entropy_of(table.sum(1)) + entropy_of(table.sum(0))) / 2
