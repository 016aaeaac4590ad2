"""Orders of domains and experts that show structure.

Shape suffixes: M domains, R routed experts of a layer.
"""

from __future__ import annotations

import numpy as np

from ...imports.optional_packages import require


def order_of_domains(alike_MM: np.ndarray) -> list[int]:
    """An order in which domains that are alike stand together: that of the leaves of a tree.

    Args:
        alike_MM (`np.ndarray`): (M, M), how alike each two are, at most 1.

    Raises:
        ImportError: if scikit-learn, which brings SciPy, is not installed.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers_emo.analysis.page.orders import order_of_domains
    >>> alike = np.array([[1.0, 0.1, 0.9], [0.1, 1.0, 0.2], [0.9, 0.2, 1.0]])
    >>> order_of_domains(alike)[1]
    2

    ```
    """
    require("The report needs", "scipy")
    from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
    from scipy.spatial.distance import squareform

    if len(alike_MM) < 3:
        return list(range(len(alike_MM)))
    far_MM = 1 - (alike_MM + alike_MM.T) / 2
    np.fill_diagonal(far_MM, 0)
    distance = squareform(np.maximum(far_MM, 0), checks=False)
    tree = optimal_leaf_ordering(linkage(distance, "average"), distance)
    return [int(place) for place in leaves_list(tree)]


def order_of_experts(mean_MR: np.ndarray, domains: list[int]) -> list[int]:
    """An order in which the experts of a domain stand together: by their domain, the strongest first.

    An expert's domain is the one that gives it the largest mean probability.

    Args:
        mean_MR (`np.ndarray`): (M, R), each domain's mean probabilities.
        domains (`list[int]`): the order of the domains.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers_emo.analysis.page.orders import order_of_experts
    >>> order_of_experts(np.array([[0.1, 0.6, 0.3], [0.7, 0.2, 0.1]]), [0, 1])
    [1, 2, 0]

    ```
    """
    ranked_MR = mean_MR[domains]
    domain_R = ranked_MR.argmax(0)
    strength_R = ranked_MR.max(0)
    return [int(expert) for expert in np.lexsort((-strength_R, domain_R))]
