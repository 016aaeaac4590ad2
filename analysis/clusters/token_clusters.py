"""Clusters of tokens by their router probabilities in all layers (paper section 5).

Shape suffixes: S tokens, P routed experts of all layers, D directions kept, C clusters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...imports.optional_packages import require
from ..numbers import Number
from ..numbers.draws import Draws
from ..routing import RoutingStatistics
from .cluster_numbers import cluster_numbers
from .spherical import nearest, spherical_k_means

_VARIANCE = 0.95  # of the probabilities, as in the paper


@dataclass(frozen=True)
class TokenClusters:
    """Clusters of tokens, and what they are made of.

    Args:
        document_S (`np.ndarray`): int (S,), the document of each token.
        position_S (`np.ndarray`): int (S,), its place in it.
        piece_S (`np.ndarray`): the text of each token.
        domain_S (`np.ndarray`): int (S,), the domain of each token.
        domains (`list[str]`): the names of the domains.
        cluster_S (`np.ndarray`): int (S,), the cluster of each token. The largest cluster is 0.
        numbers (`list[Number]`): see `cluster_numbers`.
        plane_S2 (`np.ndarray`): (S, 2), where each token is in the two directions that differ most.

    Example: see `cluster_tokens`.
    """

    document_S: np.ndarray
    position_S: np.ndarray
    piece_S: np.ndarray
    domain_S: np.ndarray
    domains: list[str]
    cluster_S: np.ndarray
    numbers: list[Number] = field(default_factory=list)
    plane_S2: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))

    @property
    def num_clusters(self) -> int:
        """How many clusters there are."""
        return int(self.cluster_S.max(initial=-1)) + 1

    def composition(self) -> np.ndarray:
        """How many tokens of each domain are in each cluster, int (C, M)."""
        counts = np.zeros((self.num_clusters, len(self.domains)), dtype=np.int64)
        np.add.at(counts, (self.cluster_S, self.domain_S), 1)
        return counts

    def typical(self, cluster: int, num: int = 12) -> list[tuple[str, int]]:
        """The pieces of text that a cluster has most of, beside their share everywhere.

        Args:
            cluster (`int`): the cluster.
            num (`int`, defaults to 12): how many.

        Returns:
            `list[tuple[str, int]]`: pieces and how often the cluster has them, by the part that it has of
            them
                all. Pieces that it has fewer than three of come last.
        """
        pieces, index_S = np.unique(self.piece_S.astype(str), return_inverse=True)
        everywhere = np.bincount(index_S, minlength=len(pieces))
        here = np.bincount(index_S[self.cluster_S == cluster], minlength=len(pieces))
        order = np.lexsort((-here, -(here / everywhere) * np.sqrt(here), here < 3))
        return [(str(pieces[place]), int(here[place])) for place in order[:num] if here[place]]


def cluster_tokens(
    statistics: RoutingStatistics,
    *,
    num_clusters: int = 32,
    max_tokens: int = 20_000,
    num_draws: int = 100,
    seed: int = 0,
) -> TokenClusters:
    """Group tokens by how they are routed, as in the paper.

    The router probabilities of all layers are put one after the other, centred, and brought to the directions
    that hold 95 % of their variance. These vectors are made as long as 1 and grouped by spherical k-means.
    The centres are found with at most `max_tokens` tokens; the others go to the nearest one.

    Args:
        statistics (`RoutingStatistics`): from `router_statistics`. The tokens are those whose probabilities
            it keeps.
        num_clusters (`int`, defaults to 32): how many clusters; 32 in the paper.
        max_tokens (`int`, defaults to 20000): with how many tokens to find them.
        num_draws (`int`, defaults to 100): how often documents are drawn again for intervals.
        seed (`int`, defaults to 0): the seed.

    Raises:
        ValueError: if there are fewer tokens than clusters, or fewer than two domains.
        ImportError: if scikit-learn is not installed.

    Example:

    ```python
    >>> from transformers_emo.analysis.clusters import cluster_tokens
    >>> from transformers_emo.analysis.routing import documents_of, router_statistics
    >>> documents = documents_of("model_cards/toy-emo/documents")
    >>> statistics = router_statistics("model_cards/toy-emo", documents, tmp_path, window=64, progress=False)
    >>> clusters = cluster_tokens(statistics, num_clusters=8)
    >>> clusters.num_clusters, int(clusters.composition().sum()) == len(clusters.cluster_S)
    (8, True)

    ```
    """
    require("Clusters need", "sklearn")
    from sklearn.decomposition import PCA

    documents = statistics.documents()
    draws = Draws(documents["domain"], num=num_draws, seed=seed)
    tokens = _tokens(statistics)
    place_S = np.searchsorted(documents["document"], tokens["document"])
    number = len(tokens["document"])
    stride = max(1, -(-number // max_tokens))
    some_SP = _vectors(statistics, stride)
    if len(some_SP) < num_clusters:
        raise ValueError(
            f"There are {len(some_SP)} tokens for {num_clusters} clusters: give more text, or take fewer "
            "clusters."
        )
    pca = PCA(n_components=_VARIANCE, svd_solver="full", random_state=seed).fit(some_SP)
    plane = pca.transform(some_SP)
    some_SD = _of_length_1(plane)
    _, centre_CD = spherical_k_means(some_SD, num_clusters, seed=seed)
    cluster_S, plane_S2 = _assigned(statistics, pca, centre_CD)
    order = np.argsort(-np.bincount(cluster_S, minlength=num_clusters), kind="stable")
    rank = np.empty(num_clusters, dtype=np.int64)
    rank[order] = np.arange(num_clusters)
    cluster_S = rank[cluster_S]
    found = TokenClusters(
        tokens["document"],
        tokens["position"],
        tokens["piece"],
        draws.domain_N[place_S],
        draws.names,
        cluster_S,
        plane_S2=plane_S2,
    )
    labels = {name: tokens[name] for name in ("token", "characters", "part_of_speech")}
    labels["domain"] = found.domain_S
    numbers = cluster_numbers(cluster_S, labels, draws, place_S, some_SD, cluster_S[::stride], seed)
    return TokenClusters(**{**found.__dict__, "numbers": numbers})


def _tokens(statistics: RoutingStatistics) -> dict[str, np.ndarray]:
    """The tokens whose probabilities are kept."""
    names = ["document", "position", "token", "piece", "characters", "part_of_speech"]
    columns: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for part in statistics.each_token_part(names):
        has_vector = part["position"] < statistics.settings["vectors_per_document"]
        for name in names:
            columns[name].append(part[name][has_vector])
    return {name: np.concatenate(arrays) for name, arrays in columns.items()}


def _part_vectors(statistics: RoutingStatistics, part: int) -> np.ndarray:
    names = [f"probability_{layer}" for layer in statistics.layers]
    found = statistics.tokens(part, names)
    return np.concatenate([found[name].astype(np.float32) for name in names], axis=1)


def _vectors(statistics: RoutingStatistics, stride: int) -> np.ndarray:
    """The probabilities of every so-many-th token in all layers, (S, P)."""
    found, skipped = [], 0
    for part in statistics.parts():
        vectors = _part_vectors(statistics, part)
        found.append(vectors[(-skipped) % stride :: stride])
        skipped += len(vectors)
    return np.concatenate(found)


def _assigned(
    statistics: RoutingStatistics, pca: Any, centre_CD: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The cluster of every token, part by part, and its place in the first two directions."""
    clusters, places = [], []
    for part in statistics.parts():
        vectors = pca.transform(_part_vectors(statistics, part))
        clusters.append(nearest(_of_length_1(vectors), centre_CD))
        places.append(np.pad(vectors[:, :2], ((0, 0), (0, max(0, 2 - vectors.shape[1])))))
    return np.concatenate(clusters), np.concatenate(places)


def _of_length_1(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
