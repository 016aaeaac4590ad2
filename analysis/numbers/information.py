"""What a token's domain, id or word class says about the experts it takes, in bits.

Shape suffixes: S tokens, K experts that a token picks, W draws, C shufflings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .measured import Sampled
from .profiles import entropy_of

_MOST_CELLS = 1 << 23  # up to so many, counting in a table is quicker than sorting


@dataclass(frozen=True)
class Picks:
    """The experts that tokens take in one layer, and which documents the tokens are from.

    Args:
        expert_SK (`np.ndarray`): int (S, K).
        weight_WS (`np.ndarray`): (W, S) how often each token's document is drawn; row 0 is all ones.

    Example: see `information`.
    """

    expert_SK: np.ndarray
    weight_WS: np.ndarray

    def entropies(self, *labels_S: np.ndarray, with_expert: bool = False) -> np.ndarray:
        """The entropy of labels, or of labels and the expert, in each draw, (W,)."""
        code, size, times = np.zeros((1, len(self.expert_SK)), dtype=np.int64), 1, 1
        for label_S in labels_S:
            own = int(label_S.max(initial=0)) + 1
            code, size = code * own + label_S, size * own
        if with_expert:  # each pick is a draw of an expert: a token counts as often as it has picks
            own, times = int(self.expert_SK.max(initial=0)) + 1, self.expert_SK.shape[1]
            code, size = code * own + self.expert_SK.T, size * own
        if len(self.weight_WS) == 1 and (self.weight_WS == 1).all():
            return np.array([entropy_of(_counts(code.ravel(), size))])
        place = np.unique(code, return_inverse=True)[1].reshape(-1)
        return np.array(
            [entropy_of(np.bincount(place, weights=np.tile(weight_S, times))) for weight_S in self.weight_WS]
        )


def information(
    picks: Picks,
    label_S: np.ndarray,
    given_S: np.ndarray | None = None,
    *,
    num_shuffled: int = 5,
    seed: int = 0,
) -> tuple[Sampled, Sampled]:
    """What a label says about the expert, in bits: their mutual information.

    The level by chance is that of the label shuffled among the tokens. With few tokens of a label it is above
    0. What is `given` is known already: then the label says only what it adds to that, and is shuffled among
    tokens that have it in common.

    Args:
        picks (`Picks`): the experts.
        label_S (`np.ndarray`): int (S,), from 0, such as the token's id.
        given_S (`np.ndarray`, *optional*): int (S,), from 0, such as the domain.
        num_shuffled (`int`, defaults to 5): how often to shuffle (C).
        seed (`int`, defaults to 0): the seed of that.

    Returns:
        `tuple[Sampled, Sampled]`: the mutual information, and the most it could be: the entropy of the
        expert.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers_emo.analysis.numbers.information import Picks, information
    >>> expert, coin = np.array([[0], [0], [1], [1]]), np.array([0, 1, 0, 1])
    >>> picks = Picks(expert, np.ones((1, 4)))
    >>> [round(information(picks, label)[0].value, 3) for label in (expert[:, 0], coin)]
    [1.0, 0.0]

    ```
    """
    given = [] if given_S is None else [given_S]
    # What is open of the expert, if anything given is known.
    expert_W = picks.entropies(*given, with_expert=True) - picks.entropies(*given)

    def told(label_S: np.ndarray, picks: Picks, open_W: np.ndarray) -> np.ndarray:
        known_W = picks.entropies(label_S, *given, with_expert=True) - picks.entropies(label_S, *given)
        return open_W - known_W

    told_W = told(label_S, picks, expert_W)
    once, rng = Picks(picks.expert_SK, picks.weight_WS[:1]), np.random.default_rng(seed)
    chance_C = np.array(
        [told(_shuffled(label_S, given_S, rng), once, expert_W[:1])[0] for _ in range(num_shuffled)]
    )
    return Sampled(float(told_W[0]), told_W[1:], chance_C), Sampled(float(expert_W[0]), expert_W[1:])


def _counts(code: np.ndarray, size: int) -> np.ndarray:
    """How often each of the codes below `size` is there, without those that are not."""
    if size > _MOST_CELLS:
        return np.unique(code, return_counts=True)[1]
    counts = np.bincount(code, minlength=size)
    return counts[counts > 0]


def _shuffled(label_S: np.ndarray, given_S: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """The labels in another order, each within its group."""
    if given_S is None:
        return rng.permutation(label_S)
    mixed = rng.permutation(len(label_S))
    to_S = np.argsort(given_S, kind="stable")
    from_S = mixed[np.argsort(given_S[mixed], kind="stable")]
    shuffled_S = np.empty_like(label_S)
    shuffled_S[to_S] = label_S[from_S]
    return shuffled_S
