"""Next-token loss and accuracy, document by document.

Shape suffixes: N documents, B rows of a batch, S sequence, C tokens that are predicted, V vocabulary, D
hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..modeling_emo import EmoForCausalLM

# The most logits made at a time. On a CPU they fit a core's cache; elsewhere they are half a gigabyte in
# float32.
_LOGITS_AT_ONCE = {"cpu": 2**20}
_LOGITS_AT_ONCE_ELSEWHERE = 2**27


@dataclass(frozen=True)
class DocumentLosses:
    """Loss and correct predictions of a model for each of some documents.

    Args:
        loss_N (`torch.Tensor`): float64 (N,), the loss of each document in nats, summed over its tokens.
        correct_N (`torch.Tensor`): int64 (N,), how many tokens the model predicted: those to which it gave
            the largest probability.
        tokens_N (`torch.Tensor`): int64 (N,), how many tokens were to be predicted: all but the first.

    Example: see `document_losses`.
    """

    loss_N: torch.Tensor
    correct_N: torch.Tensor
    tokens_N: torch.Tensor

    @property
    def loss(self) -> float:
        """The mean loss of a token, in nats."""
        return float(self.loss_N.sum() / self.tokens_N.sum())

    @property
    def accuracy(self) -> float:
        """The share of tokens that the model predicted correctly."""
        return float(self.correct_N.sum() / self.tokens_N.sum())


@torch.inference_mode()
def document_losses(
    model: EmoForCausalLM,
    documents: Sequence[torch.Tensor],
    *,
    expert_subset: Any = None,
    batch_tokens: int = 2048,
    after: int = 0,
    on_batch: Callable[[int], Any] | None = None,
) -> DocumentLosses:
    """Loss and accuracy of the next token in every document, with all experts or with a subset of them.

    Documents of similar length share a batch and are padded at the end. Padding is not counted, and with
    causal attention it changes nothing before it. Sums are float64.

    Args:
        model (`EmoForCausalLM`): the model. It is in evaluation mode meanwhile.
        documents (`Sequence[torch.Tensor]`): token ids (S,) of each.
        expert_subset (*optional*): route to these experts only, as `use_experts` does.
        batch_tokens (`int`, defaults to 2048): the most tokens in a batch, padding included. A longer
            document is a batch of its own.
        after (`int`, defaults to 0): leave out the first so many tokens of each document when counting.
        on_batch (`Callable[[int], Any]`, *optional*): called after each batch with the number of its
            documents.

    Raises:
        ValueError: if no token is predicted.
        SubsetError: if the subset does not fit the model.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoForCausalLM
    >>> from transformers_emo.analysis import document_losses
    >>> model = EmoForCausalLM.from_pretrained("model_cards/toy-emo")
    >>> documents = [torch.arange(100, 140), torch.arange(200, 210)]
    >>> full = document_losses(model, documents)
    >>> full.tokens_N.tolist()
    [39, 9]
    >>> document_losses(model, documents, expert_subset=[[0, 1, 2, 31]] * 4).loss != full.loss
    True

    ```
    """
    check_batch_tokens(batch_tokens)
    first = max(after, 1)
    loss_N = torch.zeros(len(documents), dtype=torch.float64)
    correct_N = torch.zeros(len(documents), dtype=torch.long)
    tokens_N = torch.tensor([max(len(ids) - first, 0) for ids in documents], dtype=torch.long)
    if not tokens_N.sum():
        raise ValueError(
            f"No token to predict: each of the {len(documents)} documents has at most {first} tokens. "
            "Give longer ones."
        )
    training = model.training
    model.eval()
    try:
        with nullcontext() if expert_subset is None else model.use_experts(expert_subset):
            for rows in _batches(documents, batch_tokens):
                ids_BS = pad_sequence([documents[row] for row in rows], batch_first=True)
                length_B = torch.tensor([len(documents[row]) for row in rows])
                place_S = torch.arange(1, ids_BS.shape[1])
                row_C, place_C = torch.where((place_S >= first) & (place_S < length_B[:, None]))
                hidden_BSD = model.base_model(
                    input_ids=ids_BS.to(model.device), use_cache=False, output_router_logits=False
                ).last_hidden_state
                hidden_CD = hidden_BSD[row_C.to(hidden_BSD.device), place_C.to(hidden_BSD.device)]
                nats_C, correct_C = _predictions(model, hidden_CD, ids_BS[row_C, place_C + 1])
                document_C = torch.tensor(rows)[row_C]
                loss_N.index_add_(0, document_C, nats_C.double().cpu())
                correct_N.index_add_(0, document_C, correct_C.long().cpu())
                if on_batch is not None:
                    on_batch(len(rows))
    finally:
        model.train(training)
    return DocumentLosses(loss_N, correct_N, tokens_N)


def check_batch_tokens(batch_tokens: int) -> None:
    """Refuse a number of tokens in a batch that holds none.

    Args:
        batch_tokens (`int`): the number.

    Raises:
        ValueError: if it is below 1.

    Example:

    ```python
    >>> from transformers_emo.analysis.evaluation import check_batch_tokens
    >>> check_batch_tokens(2048)

    ```
    """
    if batch_tokens < 1:
        raise ValueError(f"`batch_tokens` is {batch_tokens}, expected at least 1 token.")


def _batches(documents: Sequence[torch.Tensor], batch_tokens: int) -> Iterator[list[int]]:
    """The indices of the documents in each batch, the longest first."""
    rows: list[int] = []
    for row in sorted(range(len(documents)), key=lambda row: (-len(documents[row]), row)):
        if rows and (len(rows) + 1) * len(documents[rows[0]]) > batch_tokens:
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def _predictions(
    model: EmoForCausalLM, hidden_CD: torch.Tensor, target_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each token in nats, and whether the model predicted it, (C,)."""
    head = model.get_output_embeddings()
    limit = _LOGITS_AT_ONCE.get(hidden_CD.device.type, _LOGITS_AT_ONCE_ELSEWHERE)
    at_once = max(limit // model.config.vocab_size, 256)
    nats, correct = [], []
    for hidden, target in zip(hidden_CD.split(at_once), target_C.split(at_once), strict=True):
        logits_CV = head(hidden).float()
        target_C1 = target.to(logits_CV.device)[:, None]
        wanted_C1 = logits_CV.gather(-1, target_C1)
        largest_C1 = logits_CV.amax(-1, keepdim=True)
        # In place, which is twice as fast on a CPU as `cross_entropy` and `argmax`. If several logits are the
        # largest, each of their tokens counts as predicted.
        correct.append((wanted_C1 == largest_C1)[:, 0])
        normaliser_C1 = logits_CV.sub_(largest_C1).exp_().sum(-1, keepdim=True).log_() + largest_C1
        nats.append((normaliser_C1 - wanted_C1)[:, 0])
    return torch.cat(nats), torch.cat(correct)
