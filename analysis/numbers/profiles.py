"""Numbers of domains' mean routing: how many experts they use, how evenly, and how alike domains are.

Each function takes the mean probabilities (..., M, R) of M domains over R routed experts, and returns (...).
"""

from __future__ import annotations

import numpy as np


def coverage(mean_MR: np.ndarray) -> np.ndarray:
    """How many experts have more than an even share, 1 / R, in the mean over domains.

    Args:
        mean_MR (`np.ndarray`): (..., M, R).

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers_emo.analysis.numbers.profiles import coverage
    >>> float(coverage(np.array([[0.7, 0.3, 0.0, 0.0], [0.1, 0.1, 0.1, 0.7]])))
    1.5

    ```
    """
    return (mean_MR > 1 / mean_MR.shape[-1]).sum(-1).mean(-1)


def entropy(mean_MR: np.ndarray) -> np.ndarray:
    """The entropy of a domain's mean probabilities in bits, in the mean over domains.

    Args:
        mean_MR (`np.ndarray`): (..., M, R).

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers_emo.analysis.numbers.profiles import entropy
    >>> float(entropy(np.array([[0.5, 0.5], [1.0, 0.0]])))
    0.5

    ```
    """
    return entropy_of(mean_MR).mean(-1)


def entropy_of(counts_R: np.ndarray) -> np.ndarray:
    """The entropy in bits of what counts or probabilities (..., R) say.

    Args:
        counts_R (`np.ndarray`): (..., R), from 0.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers_emo.analysis.numbers.profiles import entropy_of
    >>> float(entropy_of(np.array([3, 3, 3, 3])))
    2.0

    ```
    """
    total = counts_R.sum(-1)
    plogp = np.where(counts_R > 0, counts_R * np.log2(np.where(counts_R > 0, counts_R, 1)), 0).sum(-1)
    return np.log2(total) - plogp / total


def off_diagonal(matrix_MM: np.ndarray) -> np.ndarray:
    """The mean of a symmetric matrix (..., M, M) without its diagonal.

    Args:
        matrix_MM (`np.ndarray`): (..., M, M).

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers_emo.analysis.numbers.profiles import off_diagonal
    >>> float(off_diagonal(np.array([[1.0, 0.25], [0.25, 1.0]])))
    0.25

    ```
    """
    number = matrix_MM.shape[-1]
    diagonal = np.trace(matrix_MM, axis1=-2, axis2=-1)
    return (matrix_MM.sum((-2, -1)) - diagonal) / (number * (number - 1))


def cosines(products_MM: np.ndarray) -> np.ndarray:
    """The cosine of each two domains, from the products of their vectors.

    Args:
        products_MM (`np.ndarray`): (..., M, M), the inner products.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers_emo.analysis.numbers.profiles import cosines
    >>> cosines(np.array([[4.0, 1.0], [1.0, 1.0]])).tolist()
    [[1.0, 0.5], [0.5, 1.0]]

    ```
    """
    length_M = np.sqrt(np.diagonal(products_MM, axis1=-2, axis2=-1))
    return products_MM / (length_M[..., :, None] * length_M[..., None, :])


def top_experts(mean_MR: np.ndarray, kept: int) -> np.ndarray:
    """Which experts each domain uses most, as a mask. Of two alike the one with the smaller id counts.

    Args:
        mean_MR (`np.ndarray`): (..., M, R).
        kept (`int`): how many.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers_emo.analysis.numbers.profiles import top_experts
    >>> top_experts(np.array([[0.2, 0.5, 0.2, 0.1]]), 2).tolist()
    [[True, True, False, False]]

    ```
    """
    order = np.argsort(-mean_MR, axis=-1, kind="stable")[..., :kept]
    mask = np.zeros(mean_MR.shape, dtype=bool)
    np.put_along_axis(mask, order, True, axis=-1)
    return mask


def jaccards(mask_MR: np.ndarray) -> np.ndarray:
    """Experts in both over experts in either, for each two domains.

    Args:
        mask_MR (`np.ndarray`): bool (..., M, R).

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers_emo.analysis.numbers.profiles import jaccards
    >>> jaccards(np.array([[True, True, False], [False, True, True]]))[0, 1].round(3)
    np.float64(0.333)

    ```
    """
    numbers = mask_MR.astype(np.float64)
    both_MM = numbers @ np.swapaxes(numbers, -1, -2)
    size_M = numbers.sum(-1)
    return both_MM / (size_M[..., :, None] + size_M[..., None, :] - both_MM)
