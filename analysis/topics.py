"""Whether domains use different experts: the cosine of their mean router probabilities (paper section 5).

Shape suffixes: M domains, P routed experts of all layers, one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from ..modeling_emo import EmoForCausalLM
from ..subsets import present_experts, select_experts
from ..subsets.choosing.calibration import CalibrationText
from .evaluation import check_batch_tokens


@dataclass(frozen=True)
class TopicCosine:
    """How alike the routing of several domains is.

    Args:
        domains (`list[str]`): their names.
        cosine_MM (`torch.Tensor`): float64 (M, M), the cosine of each two; 1 on the diagonal.

    Example: see `topic_cosine`.
    """

    domains: list[str]
    cosine_MM: torch.Tensor

    @property
    def mean(self) -> float:
        """The mean over all pairs of different domains."""
        number = len(self.domains)
        return float((self.cosine_MM.sum() - self.cosine_MM.trace()) / (number * (number - 1)))


def mean_routing(
    model: EmoForCausalLM, documents: Sequence[torch.Tensor], *, batch_tokens: int = 2048
) -> torch.Tensor:
    """The mean router probability of every routed expert over the tokens of documents, layer after layer.

    Args:
        model (`EmoForCausalLM`): the model.
        documents (`Sequence[torch.Tensor]`): token ids (S,) of each.
        batch_tokens (`int`, defaults to 2048): the most tokens in a batch.

    Returns:
        `torch.Tensor`: float64 (P,); the probabilities of each layer sum to 1.

    Raises:
        ValueError: if there is no token.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoForCausalLM
    >>> from transformers_emo.analysis import mean_routing
    >>> model = EmoForCausalLM.from_pretrained("model_cards/toy-emo")
    >>> routing = mean_routing(model, [torch.arange(100, 140)])
    >>> routing.shape, round(float(routing.sum()), 4)
    (torch.Size([124]), 4.0)

    ```
    """
    check_batch_tokens(batch_tokens)
    rows = max(1, batch_tokens // max(map(len, documents), default=1))
    layers = [layer for layer in model.config.layer_experts if not layer.is_dense]
    chosen = select_experts(
        model,
        CalibrationText.of_documents(documents, rows),
        min(layer.num_experts for layer in layers),
        method="global",
        progress=False,
    )
    parts = []
    for layer, score, present in zip(
        model.config.layer_experts, chosen.scores or [], present_experts(model.config), strict=True
    ):
        if score is not None:
            routed = [e for e in range(layer.num_experts) if e not in layer.always_used]
            parts.append(torch.tensor([score[present[e]] for e in routed], dtype=torch.float64))
    return torch.cat(parts)


def topic_cosine(
    model: EmoForCausalLM,
    domains: Mapping[str, Sequence[torch.Tensor]],
    *,
    batch_tokens: int = 2048,
    progress: bool = True,
) -> TopicCosine:
    """Compare which experts the tokens of domains go to.

    The paper finds a mean below 0.4 for EMO and above 0.6 for a standard mixture of experts.

    Args:
        model (`EmoForCausalLM`): the model.
        domains (`Mapping[str, Sequence[torch.Tensor]]`): for each domain token ids (S,) of its documents; see
            `encode_documents`.
        batch_tokens (`int`, defaults to 2048): the most tokens in a batch.
        progress (`bool`, defaults to `True`): show a progress bar.

    Raises:
        ValueError: if there are fewer than two domains, or a domain has no token.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoForCausalLM
    >>> from transformers_emo.analysis import topic_cosine
    >>> model = EmoForCausalLM.from_pretrained("model_cards/toy-emo")
    >>> domains = {"first": [torch.arange(100, 140)], "second": [torch.arange(900, 990)]}
    >>> 0 < topic_cosine(model, domains, progress=False).mean < 1
    True

    ```
    """
    if len(domains) < 2:
        raise ValueError(
            f"Domains are compared with each other: expected at least 2, got {list(domains)}. Add one."
        )
    routing_MP = torch.stack(
        [
            mean_routing(model, documents, batch_tokens=batch_tokens)
            for documents in tqdm(
                domains.values(), desc="Topics", unit="domain", leave=False, disable=not progress
            )
        ]
    )
    routing_MP = torch.nn.functional.normalize(routing_MP, dim=-1)
    return TopicCosine(list(domains), routing_MP @ routing_MP.T)
