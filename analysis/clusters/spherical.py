"""Spherical k-means: clusters of directions. scikit-learn has k-means of places only.

Shape suffixes: S vectors, C clusters, D their size.
"""

from __future__ import annotations

import numpy as np

from ...imports.optional_packages import require

_MOST_ROUNDS = 100


def spherical_k_means(
    vectors_SD: np.ndarray, num_clusters: int, *, num_starts: int = 4, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Group vectors of length 1 by their direction.

    Each vector goes to the centre with the largest cosine, and each centre is the mean of its vectors, made
    as long as 1. It begins with the centres of scikit-learn's k-means++.

    Args:
        vectors_SD (`np.ndarray`): (S, D), each of length 1.
        num_clusters (`int`): how many clusters (C).
        num_starts (`int`, defaults to 4): how often to begin; the result with the largest sum of cosines is
            taken.
        seed (`int`, defaults to 0): the seed of the beginnings.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: int (S,) the cluster of each vector, and (C, D) the centres.

    Raises:
        ValueError: if there are fewer vectors than clusters.
        ImportError: if scikit-learn is not installed.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers_emo.analysis.clusters.spherical import spherical_k_means
    >>> vectors = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, -1.0]])
    >>> cluster, centres = spherical_k_means(vectors, 2)
    >>> bool(cluster[0] == cluster[1] != cluster[2])
    True

    ```
    """
    require("Clusters need", "sklearn")
    from sklearn.cluster import kmeans_plusplus

    if len(vectors_SD) < num_clusters:
        raise ValueError(
            f"There are {len(vectors_SD)} tokens for {num_clusters} clusters: give more text, or take fewer "
            "clusters."
        )
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for start in range(num_starts):
        centre_CD, _ = kmeans_plusplus(vectors_SD, num_clusters, random_state=seed + start)
        total, cluster_S, centre_CD = _settle(vectors_SD, centre_CD)
        if best is None or total > best[0]:
            best = total, cluster_S, centre_CD
    assert best is not None
    return best[1], best[2]


def nearest(vectors_SD: np.ndarray, centre_CD: np.ndarray) -> np.ndarray:
    """The centre with the largest cosine to each vector, int (S,).

    Args:
        vectors_SD (`np.ndarray`): (S, D).
        centre_CD (`np.ndarray`): (C, D), each of length 1.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers_emo.analysis.clusters.spherical import nearest
    >>> nearest(np.array([[3.0, 1.0]]), np.eye(2)).tolist()
    [0]

    ```
    """
    return (vectors_SD @ centre_CD.T).argmax(-1)


def _settle(vectors_SD: np.ndarray, centre_CD: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    cluster_S = np.full(len(vectors_SD), -1)
    for _ in range(_MOST_ROUNDS):
        cosine_SC = vectors_SD @ centre_CD.T
        now_S = cosine_SC.argmax(-1)
        if (now_S == cluster_S).all():
            break
        cluster_S = now_S
        sum_CD = np.zeros_like(centre_CD)
        np.add.at(sum_CD, cluster_S, vectors_SD)
        length_C = np.linalg.norm(sum_CD, axis=-1, keepdims=True)
        # An empty cluster begins anew at the vector that is farthest from its centre.
        far = vectors_SD[cosine_SC.max(-1).argmin()]
        centre_CD = np.where(length_C > 0, sum_CD / np.maximum(length_C, 1e-12), far)
    return float((vectors_SD @ centre_CD.T).max(-1).sum()), cluster_S, centre_CD
