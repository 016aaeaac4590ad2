"""The scores that experts are chosen by: how much a domain uses an expert.

Every score is a sum over calibration tokens, each with its weight. The sum is float64, so that the order of
tokens and their batches make no difference.

Shape suffixes: T tokens, D hidden size, E experts of a layer, R its routed ones, K experts taken per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...configuration import LayerExperts


class RouterProbability:
    """The mean probability that the router gives each expert (paper section 4,
    https://arxiv.org/abs/2605.06663).

    It is the softmax over the routed experts in float32, not how often an expert is picked. With
    always-active experts there is one softmax over all experts, as in the router. Experts that are always
    kept score 1.

    Args:
        layer (`LayerExperts`): the experts of the layer.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.configuration import LayerExperts
    >>> from transformers_emo.subsets.choosing.scores import RouterProbability
    >>> score = RouterProbability(LayerExperts(num_experts=3, num_shared=1, always_active=(), top_k=2))
    >>> score.add_logits(torch.tensor([[0.0, 0.0, 5.0]]), torch.ones(1))
    >>> score.result().tolist()
    [0.5, 0.5, 1.0]

    ```
    """

    needs_outputs = False

    def __init__(self, layer: LayerExperts):
        self.layer = layer
        self.sum_E = torch.zeros(layer.num_experts, dtype=torch.float64)
        self.weight = 0.0

    def add_logits(self, logits_TE: torch.Tensor, weight_T: torch.Tensor) -> None:
        """Add tokens.

        Args:
            logits_TE (`torch.Tensor`): (T, E) raw router logits.
            weight_T (`torch.Tensor`): (T,) how much each token counts. Tokens of weight 0 are left out.
        """
        weight_T = weight_T.double().cpu()
        scored = self.layer.num_experts if self.layer.always_active else self.layer.num_routed
        probs_TE = logits_TE[:, :scored].softmax(-1, dtype=torch.float32).cpu()
        counts_T = weight_T > 0
        self.sum_E[:scored] += weight_T[counts_T] @ probs_TE[counts_T].double()
        self.weight += float(weight_T.sum())

    def result(self) -> torch.Tensor:
        """`torch.Tensor`: (E,) the scores, float64."""
        mean_E = self.sum_E / self.weight
        mean_E[list(self.layer.always_used)] = 1.0  # the largest probability, as in the authors' files
        return mean_E


class ExpertOutput:
    """How much each expert contributes to the tokens that pick it, in the full model.

    - `"easy_ep"` (https://arxiv.org/abs/2504.06792): the sum over these tokens of the router's weight times
      the norm of the expert's output times `max(0, 1 - cos(h, h + y))`. Here h is the normed input of the
      block, and y its output.
    - `"reap"` (https://arxiv.org/abs/2510.13999): the mean over these tokens of weight times norm.

    Args:
        layer (`LayerExperts`): the experts of the layer.
        method (`str`): `"easy_ep"` or `"reap"`.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.configuration import LayerExperts
    >>> from transformers_emo.subsets.choosing.scores import ExpertOutput
    >>> score = ExpertOutput(LayerExperts(num_experts=3, num_shared=0, always_active=(), top_k=1), "reap")
    >>> picks, weights, norms = torch.tensor([[2], [2]]), torch.tensor([[0.5], [0.5]]), torch.ones(2, 1)
    >>> score.add_outputs(torch.ones(2, 4), torch.ones(2, 4), picks, weights, norms, torch.ones(2))
    >>> score.result().tolist()
    [0.0, 0.0, 0.5]

    ```
    """

    needs_outputs = True

    def __init__(self, layer: LayerExperts, method: str):
        self.method = method
        self.sum_E = torch.zeros(layer.num_experts, dtype=torch.float64)
        self.weight_E = torch.zeros(layer.num_experts, dtype=torch.float64)

    def add_outputs(
        self,
        input_TD: torch.Tensor,
        output_TD: torch.Tensor,
        index_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        norm_TK: torch.Tensor,
        weight_T: torch.Tensor,
    ) -> None:
        """Add tokens.

        Args:
            input_TD (`torch.Tensor`): (T, D) the normed input of the block.
            output_TD (`torch.Tensor`): (T, D) its output, of all experts together.
            index_TK (`torch.Tensor`): (T, K) the experts each token picked.
            weights_TK (`torch.Tensor`): (T, K) the router's weights of these experts.
            norm_TK (`torch.Tensor`): (T, K) the norms of their outputs, without the weights.
            weight_T (`torch.Tensor`): (T,) how much each token counts. Tokens of weight 0 are left out.
        """
        weight_T = weight_T.double().cpu()
        saliency_TK = (weights_TK.float() * norm_TK.float()).double().cpu()
        if self.method == "easy_ep":
            input_TD = input_TD.float()
            change_T = 1 - F.cosine_similarity(input_TD, input_TD + output_TD.float(), dim=-1)
            saliency_TK *= change_T.clamp(min=0).double().cpu()[:, None]
        counts_T = weight_T > 0
        weight_TK = weight_T[counts_T, None].expand(-1, index_TK.shape[1])
        index_P = index_TK.cpu()[counts_T].flatten()
        self.sum_E.index_add_(0, index_P, (weight_TK * saliency_TK[counts_T]).flatten())
        self.weight_E.index_add_(0, index_P, weight_TK.flatten())

    def result(self) -> torch.Tensor:
        """`torch.Tensor`: (E,) the scores, float64; 0 for an expert that no token picked."""
        if self.method == "easy_ep":
            return self.sum_E.clone()
        return torch.where(self.weight_E > 0, self.sum_E / self.weight_E, 0.0)


def new_score(method: str, layer: LayerExperts) -> RouterProbability | ExpertOutput | None:
    """A new score object for a method, without any token.

    Args:
        method (`str`): `"layerwise"`, `"global"`, `"easy_ep"` or `"reap"`.
        layer (`LayerExperts`): the experts of the layer.

    Returns:
        `RouterProbability` or `ExpertOutput`; `None` for a dense layer.

    Example:

    ```python
    >>> from transformers_emo.configuration import LayerExperts
    >>> from transformers_emo.subsets.choosing.scores import new_score
    >>> new_score("reap", LayerExperts(3, 1, (), 2)).method
    'reap'

    ```
    """
    if layer.is_dense:
        return None
    return ExpertOutput(layer, method) if method in ("easy_ep", "reap") else RouterProbability(layer)
