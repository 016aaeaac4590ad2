"""Choosing the experts of a domain from calibration text (paper section 4, https://arxiv.org/abs/2605.06663).

Shape suffixes: T tokens (batch x sequence), E experts of a layer, R its routed ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..configuration import EmoConfig, LayerExperts
from ..modeling_emo import EmoModel, EmoPreTrainedModel
from .expert_subset import ExpertSubset, SubsetError, present_experts, root_experts

_METHODS = ("global", "random")


def select_experts(
    model: EmoPreTrainedModel | str | os.PathLike,
    texts: Sequence[str] | str | None = None,
    num_experts: int = 16,
    *,
    method: str = "global",
    input_ids: Sequence[torch.Tensor] | None = None,
    attention_mask: Sequence[torch.Tensor] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> ExpertSubset:
    """Choose the experts that a domain uses most.

    `"global"` takes, layer by layer, the experts with the largest mean router probability over all
    calibration tokens (the softmax over the routed experts, not the frequency of picks), measured in one pass
    of the full model; ties go to the smaller id. `"random"` needs no text; for one seed, a smaller choice is
    part of a larger one. Shared and always-active experts are always kept and count towards `num_experts`.

    Args:
        model (`EmoPreTrainedModel`, `str` or `os.PathLike`): an EMO model, or the folder or repository to
            load it from.
        texts (`Sequence[str]` or `str`, *optional*): calibration texts; one few-shot prompt of the domain is
            often enough.
        num_experts (`int`, defaults to 16): experts to keep in each layer. Dense layers stay as they are.
        method (`str`, defaults to `"global"`): `"global"` or `"random"`.
        input_ids (`Sequence[torch.Tensor]`, *optional*): ready batches (B, S) of token ids, instead of texts.
        attention_mask (`Sequence[torch.Tensor]`, *optional*): for each of them a mask (B, S), 0 for padding.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): for the texts; found beside the model by default.
        max_length (`int`, *optional*): cut texts to so many tokens; the model's context by default.
        batch_size (`int`, defaults to 8): texts in one forward pass.
        seed (`int`, defaults to 0): of the random choice.
        progress (`bool`, defaults to `True`): show a progress bar.

    Returns:
        `ExpertSubset`: the choice in root numbering, with the score of every expert (float32 softmax, float64
        sums).

    Raises:
        SubsetError: if a layer has fewer experts than asked for, or none of them would be routed.
        ValueError: if the method is unknown or there is no calibration token.

    Example:

    ```python
    >>> from transformers_emo import select_experts
    >>> text = "import os\\n\\ndef main():"
    >>> subset = select_experts("model_cards/toy-emo", [text], num_experts=8, progress=False)
    >>> [len(ids) for ids in subset.experts]
    [8, 8, 8, 8]

    ```
    """
    if method not in _METHODS:
        raise ValueError(f"Unknown method {method!r}, expected one of {', '.join(_METHODS)}.")
    network: EmoPreTrainedModel | None
    if isinstance(model, EmoPreTrainedModel):
        network, config, source = model, model.config, model.name_or_path
    elif isinstance(model, str | os.PathLike):
        network, config, source = None, EmoConfig.from_pretrained(model), os.fspath(model)
    else:
        raise ValueError(
            f"Cannot choose experts of {type(model).__name__}: give an EMO model (the one inside a wrapper), "
            "a folder or a Hub repository."
        )
    _check_number(config, num_experts)
    if method == "random":
        return _take_best(config, _random_scores(config, seed), num_experts, method, None, source)
    if (texts is None) == (input_ids is None):
        raise ValueError("Give either calibration `texts` or ready `input_ids`.")
    if input_ids is not None:
        batches = _ready_batches(input_ids, attention_mask)
    else:
        if tokenizer is None and not source:
            raise ValueError("The model was not loaded from anywhere: give the `tokenizer` too.")
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(source)
        texts = [texts] if isinstance(texts, str) else list(texts or [])
        batches = list(_tokenized(texts, tokenizer, batch_size, max_length or config.max_position_embeddings))
    if not any(mask.any() for _, mask in batches):
        raise ValueError("There is no calibration token: give at least one text that is not empty.")
    scores, num_tokens = _mean_probabilities(network or EmoModel.from_pretrained(source), batches, progress)
    return _take_best(config, scores, num_experts, method, num_tokens, source)


def _ready_batches(input_ids, attention_mask) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of ids and mask (B, S), from lists of batches or single ones."""

    def as_batches(value) -> list[torch.Tensor]:
        value = [value] if isinstance(value, torch.Tensor) and value.dim() == 2 else value
        return [torch.atleast_2d(torch.as_tensor(batch)) for batch in value]

    ids = as_batches(input_ids)
    masks = (
        [torch.ones_like(batch) for batch in ids] if attention_mask is None else as_batches(attention_mask)
    )
    if [batch.shape for batch in ids] != [mask.shape for mask in masks]:
        raise ValueError(
            f"`input_ids` has batches of shape {[tuple(b.shape) for b in ids]} and `attention_mask` of shape "
            f"{[tuple(m.shape) for m in masks]}: expected the same."
        )
    return list(zip(ids, masks, strict=True))


def _check_number(config: EmoConfig, num_experts: int) -> None:
    if not isinstance(num_experts, int):
        raise SubsetError(f"`num_experts` is {num_experts!r}, expected an integer.")
    for index, layer in enumerate(config.layer_experts):
        protected = len(_protected(layer))
        if not layer.is_dense and not protected < num_experts <= layer.num_experts:
            raise SubsetError(
                f"Cannot keep {num_experts} experts in layer {index}: it has {layer.num_experts}, of which "
                f"{protected} are always kept; expected {protected + 1} to {layer.num_experts}."
            )


def _protected(layer: LayerExperts) -> set[int]:
    """Local ids that are kept in any case."""
    return {*range(layer.num_routed, layer.num_experts), *layer.always_active}


def _tokenized(texts, tokenizer, batch_size, max_length) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    # Padded here, not by the tokenizer: one without a padding token serves as well, and padding never counts.
    texts = [text for text in texts if text]
    encoded = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"] if texts else []
    for start in range(0, len(encoded), batch_size):
        rows = [torch.tensor(ids, dtype=torch.long) for ids in encoded[start : start + batch_size]]
        yield (
            pad_sequence(rows, batch_first=True),
            pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        )


@torch.no_grad()
def _mean_probabilities(model, batches, progress) -> tuple[list[torch.Tensor | None], int]:
    """For each layer the mean router probability of its experts (E,), float64; and the number of tokens."""
    layers = [layer for layer in model.config.layer_experts if not layer.is_dense]
    sums = [torch.zeros(layer.num_experts, dtype=torch.float64) for layer in layers]
    num_tokens = 0
    training = model.training
    model.eval()
    try:
        for input_ids, mask in tqdm(batches, desc="Router statistics", unit="batch", disable=not progress):
            output = model.base_model(
                input_ids=input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                use_cache=False,
                output_router_logits=True,
            )
            counted_T = mask.flatten().bool()
            num_tokens += int(counted_T.sum())
            for total_E, logits_TE, layer in zip(sums, output.router_logits, layers, strict=True):
                # With always-active experts there is one softmax over all experts, as in the router.
                scored = layer.num_experts if layer.always_active else layer.num_routed
                probs_TE = logits_TE[counted_T.to(logits_TE.device), :scored].softmax(-1, dtype=torch.float32)
                total_E[:scored] += probs_TE.sum(0, dtype=torch.float64).cpu()
    finally:
        model.train(training)
    means = iter(total / num_tokens for total in sums)
    return [None if layer.is_dense else next(means) for layer in model.config.layer_experts], num_tokens


def _random_scores(config: EmoConfig, seed: int) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    return [
        None if layer.is_dense else torch.rand(layer.num_experts, generator=generator, dtype=torch.float64)
        for layer in config.layer_experts
    ]


def _take_best(config, scores, num_experts, method, num_tokens, source) -> ExpertSubset:
    experts: list[list[int] | None] = []
    root_scores: list[list[float | None] | None] = []
    sizes = root_experts(config)
    for layer, score_E, present, size in zip(
        config.layer_experts, scores, present_experts(config), sizes, strict=True
    ):
        if score_E is None:
            experts.append(None)
            root_scores.append(None)
            continue
        protected = _protected(layer)
        score_E[sorted(protected)] = 1.0  # as in the authors' files: no probability is larger
        ranked = [
            e for e in score_E.sort(descending=True, stable=True).indices.tolist() if e not in protected
        ]
        kept = [*protected, *ranked[: num_experts - len(protected)]]
        experts.append(sorted(present[e] for e in kept))
        by_root = dict(zip(present, score_E.tolist(), strict=True))
        root_scores.append([by_root.get(root) for root in range(size)])
    return ExpertSubset(
        experts,
        scores=root_scores,
        root_experts_per_layer=sizes,
        method=method,
        num_tokens=num_tokens,
        source=source or None,
    )
