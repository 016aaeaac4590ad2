"""Experts chosen for each document from its own beginning, and the loss of what follows with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from ..modeling_emo import EmoForCausalLM
from ..subsets import select_experts
from .evaluation import DocumentLosses, document_losses


@dataclass(frozen=True)
class PromptMeasurement:
    """The losses of the text after a prompt, with experts chosen from the prompt.

    Args:
        prompt_length (`int`): how many tokens the experts were chosen from.
        num_experts (`int`): experts kept in each layer, shared ones included; all of them for the full model.
        method (`str`): how they were chosen; `"full"` for the full model.
        losses (`DocumentLosses`): the losses of the tokens after the prompt, for each document.

    Example: see `prompt_pools`.
    """

    prompt_length: int
    num_experts: int
    method: str
    losses: DocumentLosses


def prompt_pools(
    model: EmoForCausalLM,
    documents: Sequence[torch.Tensor],
    *,
    num_experts: Sequence[int],
    prompt_lengths: Sequence[int] = (16, 32, 64, 128),
    num_following: int = 192,
    method: str = "layerwise",
    seed: int = 0,
    progress: bool = True,
) -> list[PromptMeasurement]:
    """Choose experts for each document from its first tokens, and measure the loss of the next ones.

    The prompt too is read with the chosen experts, as a model that was loaded with them would read it. All
    prompt lengths are measured on the same documents: those that are long enough for the longest prompt and
    the tokens after it.

    Args:
        model (`EmoForCausalLM`): the model.
        documents (`Sequence[torch.Tensor]`): token ids (S,) of each.
        num_experts (`Sequence[int]`): experts to keep in each layer, shared ones included. The full model is
            measured in any case.
        prompt_lengths (`Sequence[int]`): from how many tokens to choose.
        num_following (`int`, defaults to 192): how many tokens after the prompt to measure.
        method (`str`, defaults to `"layerwise"`): as for `select_experts`.
        seed (`int`, defaults to 0): the seed of the random choice, which differs from document to document.
        progress (`bool`, defaults to `True`): show a progress bar.

    Raises:
        ValueError: if no document is long enough, or the method is unknown.
        SubsetError: if so many experts cannot be kept.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoForCausalLM
    >>> from transformers_emo.analysis import prompt_pools
    >>> model = EmoForCausalLM.from_pretrained("model_cards/toy-emo")
    >>> pools = prompt_pools(
    ...     model, [torch.arange(100, 140)], num_experts=[8], prompt_lengths=[16], num_following=20,
    ...     progress=False,
    ... )
    >>> [(pool.method, pool.num_experts, pool.losses.tokens_N.tolist()) for pool in pools]
    [('full', 32, [20]), ('layerwise', 8, [20])]

    ```
    """
    longest = max(prompt_lengths) + num_following
    long = [ids for ids in documents if len(ids) >= longest]
    if not long:
        raise ValueError(
            f"None of the {len(documents)} documents has {longest} tokens: give longer ones, or take a "
            "shorter prompt or fewer tokens after it."
        )
    all_experts = max(layer.num_experts for layer in model.config.layer_experts)
    measured = []
    with tqdm(total=len(prompt_lengths) * len(long), desc="Prompts", unit="doc", disable=not progress) as bar:
        for length in prompt_lengths:
            read = [ids[: length + num_following] for ids in long]
            full = document_losses(model, read, after=length)
            measured.append(PromptMeasurement(length, all_experts, "full", full))
            by_document: list[list[DocumentLosses]] = []
            for index, ids in enumerate(read):
                subsets = select_experts(
                    model,
                    input_ids=[ids[None, :length]],
                    num_experts=list(num_experts),
                    method=method,
                    seed=seed + index,
                    progress=False,
                )
                by_document.append(
                    [document_losses(model, [ids], expert_subset=subset, after=length) for subset in subsets]
                )
                bar.update()
            for k, losses in zip(num_experts, zip(*by_document, strict=True), strict=True):
                joined = DocumentLosses(
                    torch.cat([one.loss_N for one in losses]),
                    torch.cat([one.correct_N for one in losses]),
                    torch.cat([one.tokens_N for one in losses]),
                )
                measured.append(PromptMeasurement(length, k, method, joined))
    return measured
