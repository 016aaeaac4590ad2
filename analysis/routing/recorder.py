"""What is written down of a layer's router while documents pass it.

Shape suffixes: T tokens of a batch that are no padding, E experts of a layer, R its routed ones, K those that
a token picks, N documents of a part, S tokens of these that are kept one by one, V those kept with all their
probabilities, P prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...configuration import LayerExperts
from ...subsets.choosing.scores import RouterProbability


@dataclass(frozen=True)
class Layout:
    """Which tokens of which documents the tokens of one batch are.

    Args:
        document_T (`torch.Tensor`): int64 (T,), the document of each token within the part.
        position_T (`torch.Tensor`): int64 (T,), the place of each token in its document.

    Example: see `LayerRecorder`.
    """

    document_T: torch.Tensor
    position_T: torch.Tensor


class LayerRecorder(RouterProbability):
    """Adds up the router probabilities and picks of each document, and keeps those of its first tokens.

    It takes the batches in the order of their layouts, as `pass_full_model` gives them.

    Args:
        layer (`LayerExperts`): the experts of the layer.
        layouts (`Sequence[Layout]`): of each batch that will come.
        lengths (`Sequence[int]`): how many tokens each document has.
        prefixes (`Sequence[int]`): numbers of first tokens for which probabilities are added up too.
        num_picks (`int`): of how many first tokens of each document to keep the picks.
        num_vectors (`int`): of how many to keep all probabilities.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.configuration import LayerExperts
    >>> from transformers_emo.analysis.routing.recorder import LayerRecorder, Layout
    >>> layer = LayerExperts(num_experts=3, num_shared=1, always_active=(), top_k=2)
    >>> layout = Layout(torch.tensor([0, 0]), torch.tensor([0, 1]))
    >>> recorder = LayerRecorder(layer, [layout], [2], prefixes=[1], num_picks=2, num_vectors=1)
    >>> recorder.add_logits(torch.tensor([[0.0, 0.0, 9.0], [0.0, 9.0, 0.0]]), torch.ones(2))
    >>> recorder.picks_NR.tolist(), recorder.prefix_NPR.tolist()
    ([[1, 1]], [[[0.5, 0.5]]])

    ```
    """

    def __init__(
        self,
        layer: LayerExperts,
        layouts: Sequence[Layout],
        lengths: Sequence[int],
        *,
        prefixes: Sequence[int],
        num_picks: int,
        num_vectors: int,
    ):
        super().__init__(layer)
        self.routed = routed_ids(layer)
        self.top_k = picks_of(layer)
        self.prefixes = prefixes
        self.num_vectors = num_vectors
        number, experts = len(lengths), len(self.routed)
        self.probability_NR = torch.zeros(number, experts, dtype=torch.float64)
        self.picks_NR = torch.zeros(number, experts, dtype=torch.int64)
        self.entropy_N = torch.zeros(number, dtype=torch.float64)
        self.prefix_NPR = torch.zeros(number, len(prefixes), experts, dtype=torch.float64)
        self.first_N = _starts([min(length, num_picks) for length in lengths])
        self.picks_SK = torch.zeros(int(self.first_N[-1]), self.top_k, dtype=torch.int32)
        self.vector_N = _starts([min(length, num_vectors) for length in lengths])
        self.vectors_VR = torch.zeros(int(self.vector_N[-1]), experts, dtype=torch.float16)
        self._num_picks = num_picks
        self._layouts = iter(layouts)

    def add_logits(self, logits_TE: torch.Tensor, weight_T: torch.Tensor) -> None:
        """Add the tokens of the next batch.

        Args:
            logits_TE (`torch.Tensor`): (T, E) raw router logits.
            weight_T (`torch.Tensor`): (T,) is not used: every token counts 1.
        """
        layout = next(self._layouts)
        document_T, position_T = layout.document_T, layout.position_T
        scored = self.layer.num_experts if self.layer.always_active else self.layer.num_routed
        probs_TR = logits_TE[:, :scored].softmax(-1, dtype=torch.float32)[:, self.routed].cpu()
        picks_TK = probs_TR.topk(self.top_k, dim=-1).indices
        exact_TR = probs_TR.double()
        self.probability_NR.index_add_(0, document_T, exact_TR)
        self.picks_NR.index_add_(
            0, document_T, torch.zeros_like(exact_TR, dtype=torch.int64).scatter_(1, picks_TK, 1)
        )
        bits_T = torch.special.entr(exact_TR).sum(-1) / torch.log(torch.tensor(2.0, dtype=torch.float64))
        self.entropy_N.index_add_(0, document_T, bits_T)
        for index, prefix in enumerate(self.prefixes):
            within_T = position_T < prefix
            self.prefix_NPR[:, index].index_add_(0, document_T[within_T], exact_TR[within_T])
        for kept, start_N, values, limit in (
            (self.picks_SK, self.first_N, picks_TK.int(), self._num_picks),
            (self.vectors_VR, self.vector_N, probs_TR.half(), self.num_vectors),
        ):
            within_T = position_T < limit
            kept[start_N[document_T[within_T]] + position_T[within_T]] = values[within_T]


def routed_ids(layer: LayerExperts) -> list[int]:
    """The experts of a layer that the router picks from. With always-active experts it picks from all others.

    Args:
        layer (`LayerExperts`): the experts of the layer.

    Example:

    ```python
    >>> from transformers_emo.configuration import LayerExperts
    >>> from transformers_emo.analysis.routing.recorder import routed_ids
    >>> routed_ids(LayerExperts(num_experts=4, num_shared=1, always_active=(), top_k=3))
    [0, 1, 2]

    ```
    """
    if layer.always_active:
        return [expert for expert in range(layer.num_experts) if expert not in layer.always_active]
    return list(range(layer.num_routed))


def picks_of(layer: LayerExperts) -> int:
    """How many experts the router picks for a token.

    Args:
        layer (`LayerExperts`): the experts of the layer.

    Example:

    ```python
    >>> from transformers_emo.configuration import LayerExperts
    >>> from transformers_emo.analysis.routing.recorder import picks_of
    >>> picks_of(LayerExperts(num_experts=128, num_shared=1, always_active=(), top_k=8))
    7

    ```
    """
    return layer.top_k - (len(layer.always_active) or layer.num_shared)


def _starts(counts: Sequence[int]) -> torch.Tensor:
    """Where the tokens of each document begin, and where the last ones end."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(counts, dtype=torch.int64).cumsum(0)])
