"""Choosing the experts of a domain from calibration text (paper section 4, https://arxiv.org/abs/2605.06663).

What is chosen on stands in `calibration.py`, what experts are chosen by in `statistics.py`, and how the model
is run for it in `streaming.py`.

Shape suffixes: E experts of a layer.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, overload

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..configuration import EmoConfig
from ..modeling_emo import EmoPreTrainedModel
from .calibration import TOKENS, Batch, encode, make_batches, read_column, ready_batches
from .expert_subset import ExpertSubset, SubsetError, best_experts, present_experts, root_experts
from .statistics import always_kept, new_score
from .streaming import HiddenStates, Layers, LoadedLayers, pass_full_model, pass_layerwise

_METHODS = ("layerwise", "global", "easy_ep", "reap", "random")
_WEIGHTS = ("token", "text")


@overload
def select_experts(model: Any, texts: Any = ..., num_experts: int = ..., **kwargs: Any) -> ExpertSubset: ...
@overload
def select_experts(
    model: Any, texts: Any = ..., num_experts: Sequence[int] = ..., **kwargs: Any
) -> list[ExpertSubset]: ...


def select_experts(
    model: EmoPreTrainedModel | str | os.PathLike,
    texts: Sequence | str | None = None,
    num_experts: int | Sequence[int] = 16,
    *,
    method: str = "layerwise",
    answers: Sequence[str] | str | None = None,
    dataset: Iterable[dict] | str | os.PathLike | None = None,
    column: str = "text",
    answer_column: str | None = None,
    max_texts: int | None = None,
    input_ids: Any = None,
    attention_mask: Any = None,
    labels: Any = None,
    tokens: str = "all",
    weight_by: str = "token",
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    hidden_memory: float = 4e9,
    seed: int = 0,
    progress: bool = True,
) -> ExpertSubset | list[ExpertSubset]:
    """Choose the experts that a domain uses most.

    - `"layerwise"`, the paper's choice and the default: layer by layer, the experts with the largest mean
      router probability over all calibration tokens (the softmax over the routed experts, not the frequency
      of picks), measured with the layers before cut down to their choice already.
    - `"global"`: the same, measured in the full model.
    - `"easy_ep"` (https://arxiv.org/abs/2504.06792) and `"reap"` (https://arxiv.org/abs/2510.13999): by what
      experts contribute in the full model, see `transformers_emo.subsets.statistics.ExpertOutput`.
    - `"random"` needs no text; for one seed, a smaller choice is part of a larger one.

    Ties go to the smaller id. Shared and always-active experts are always kept and count towards
    `num_experts`; dense layers stay as they are. Padding never counts. Every method takes one pass over the
    layers.

    Args:
        model (`EmoPreTrainedModel`, `str` or `os.PathLike`): an EMO model, or the folder or repository to
            load it from.
        texts (`Sequence` or `str`, *optional*): calibration texts, or chats (lists of messages) for the
            tokenizer's chat template; one few-shot prompt of the domain with its answer is often enough.
        num_experts (`int` or `Sequence[int]`, defaults to 16): experts to keep in each layer; several numbers
            give several subsets, in one go.
        method (`str`, defaults to `"layerwise"`): one of those above.
        answers (`Sequence[str]`, *optional*): an answer to each text, encoded by itself and put behind it.
        dataset (iterable of `dict`, `str` or `os.PathLike`, *optional*): rows that hold the texts, such as a
            `datasets.Dataset`, also a streamed one, or a JSONL file; instead of `texts`.
        column (`str`, defaults to `"text"`): the column of texts or chats.
        answer_column (`str`, *optional*): the column of answers.
        max_texts (`int`, *optional*): take only the first so many texts.
        input_ids (*optional*): ready batches (B, S) of token ids, lists or tensors, instead of texts.
        attention_mask (*optional*): for each of them a mask (B, S), 0 for padding.
        labels (*optional*): for each of them labels (B, S), -100 where a token is no answer.
        tokens (`str`, defaults to `"all"`): which tokens count: `"all"`, `"prompt"` or `"answer"`, told apart
            by answers, labels or who speaks in a chat. The others are still read by the model.
        weight_by (`str`, defaults to `"token"`): `"token"`: every token counts the same; `"text"`: every text
            does.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): for the texts; found beside the model by default.
        max_length (`int`, *optional*): cut texts to so many tokens, prompts with answers and chats on the
            left; the model's context by default.
        batch_size (`int`, defaults to 8): texts in one batch; fewer where they are long.
        hidden_memory (`float`, defaults to 4e9): bytes of hidden states to hold in memory; what is more goes
            to a temporary file.
        seed (`int`, defaults to 0): of the random choice.
        progress (`bool`, defaults to `True`): show a progress bar.

    Returns:
        `ExpertSubset`, or a list of them: the choice in root numbering, with the score of every expert
        (float32 softmax and norms, float64 sums). `subset.top` makes smaller choices of it.

    Raises:
        SubsetError: if a layer has fewer experts than asked for, or none of them would be routed.
        ValueError: if an argument is unknown, inputs do not fit each other, there is no calibration token,
            or the model's numbers are not finite.

    Example:

    ```python
    >>> from transformers_emo import select_experts
    >>> text = "import os\\n\\ndef main():"
    >>> subset = select_experts("model_cards/toy-emo", [text], num_experts=8, progress=False)
    >>> [len(ids) for ids in subset.experts]
    [8, 8, 8, 8]
    >>> answer = select_experts(
    ...     "model_cards/toy-emo", ["1+1="], 8, answers=["2"], tokens="answer", method="reap", progress=False
    ... )
    >>> answer.num_tokens
    1

    ```
    """
    for name, value, known in (
        ("method", method, _METHODS),
        ("tokens", tokens, TOKENS),
        ("weight_by", weight_by, _WEIGHTS),
    ):
        if value not in known:
            raise ValueError(f"Unknown {name} {value!r}, expected one of {', '.join(known)}.")
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
    several = isinstance(num_experts, list | tuple)
    sizes = list(num_experts) if isinstance(num_experts, list | tuple) else [num_experts]
    _check_sizes(config, sizes)
    choice = _Choice(config, method, source)
    if method == "random":
        subsets = choice.of_scores(_random_scores(config, seed), sizes)
        return subsets if several else subsets[0]

    if sum(given is not None for given in (texts, dataset, input_ids)) != 1:
        raise ValueError("Give either calibration `texts`, a `dataset` or ready `input_ids`.")
    if dataset is not None:
        columns = [column] if answer_column is None else [column, answer_column]
        texts, *rest = read_column(dataset, columns, max_texts)
        answers = rest[0] if rest else answers
    if texts is not None:
        if tokenizer is None and not source:
            raise ValueError("The model was not loaded from anywhere: give the `tokenizer` too.")
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(source)
        texts, answers = ([value] if isinstance(value, str) else value for value in (texts, answers))
        examples = encode(
            list(texts)[:max_texts],
            None if answers is None else list(answers)[:max_texts],
            tokenizer,
            tokens,
            max_length or config.max_position_embeddings,
        )
        batches = make_batches(examples, batch_size, weight_by)
    else:
        batches = ready_batches(input_ids, attention_mask, labels, tokens, weight_by)
    choice.num_tokens = sum(int((batch.weight > 0).sum()) for batch in batches)
    if not choice.num_tokens:
        raise ValueError("There is no calibration token: give at least one text that is not empty.")

    if network is None:
        from ..modeling_emo import EmoModel

        network = EmoModel.from_pretrained(source)
    training = network.training
    network.eval()
    try:
        subsets = _choose(LoadedLayers(network), batches, sizes, choice, hidden_memory, progress)
    finally:
        network.train(training)
    return subsets if several else subsets[0]


class _Choice:
    """Makes subsets of scores; knows the model they belong to."""

    def __init__(self, config: EmoConfig, method: str, source: str | None):
        self.config, self.method, self.source = config, method, source
        self.num_tokens: int | None = None
        self.present = present_experts(config)
        self.always = [always_kept(layer) for layer in config.layer_experts]

    def pick(self, index: int, scores_E: torch.Tensor, size: int) -> list[int]:
        """The best experts of a layer, in its own numbering."""
        if not scores_E.isfinite().all():
            raise ValueError(
                f"The scores of layer {index} are not finite: the model's numbers overflow. Load it in "
                "float32."
            )
        return best_experts(scores_E.tolist(), self.always[index], size)

    def of_scores(self, scores: list[torch.Tensor | None], sizes: Sequence[int]) -> list[ExpertSubset]:
        """The best experts of each layer, for each size."""
        subsets = []
        for size in sizes:
            kept = [None if s is None else self.pick(index, s, size) for index, s in enumerate(scores)]
            subsets.append(self.subset(scores, kept))
        return subsets

    def subset(self, scores: list[torch.Tensor | None], kept: list[list[int] | None]) -> ExpertSubset:
        """The subset of these experts, in root numbering."""
        roots = root_experts(self.config)
        experts: list[list[int] | None] = []
        root_scores: list[list[float | None] | None] = []
        for score_E, ids, present, size in zip(scores, kept, self.present, roots, strict=True):
            if score_E is None or ids is None:
                experts.append(None)
                root_scores.append(None)
                continue
            experts.append([present[e] for e in ids])
            by_root = dict(zip(present, score_E.tolist(), strict=True))
            root_scores.append([by_root.get(root) for root in range(size)])
        return ExpertSubset(
            experts,
            scores=root_scores,
            always_kept=[
                None if score is None else sorted(present[e] for e in always)
                for score, present, always in zip(scores, self.present, self.always, strict=True)
            ],
            root_experts_per_layer=roots,
            method=self.method,
            num_tokens=self.num_tokens,
            source=self.source or None,
        )


def _choose(
    layers: Layers,
    batches: list[Batch],
    sizes: Sequence[int],
    choice: _Choice,
    hidden_memory: float,
    progress: bool,
) -> list[ExpertSubset]:
    config, states = layers.config, HiddenStates(hidden_memory)
    num_passes = len(sizes) if choice.method == "layerwise" else 1
    last = max((i for i, layer in enumerate(config.layer_experts) if not layer.is_dense), default=-1)
    total = len(batches) * (last + 1) * num_passes
    with tqdm(total=total, desc="Choosing experts", unit="layer", disable=not progress) as bar:
        if choice.method == "layerwise":
            passes = pass_layerwise(layers, batches, sizes, choice.pick, states, bar)
            return [choice.subset(scores, kept) for scores, kept in passes]
        scores = [new_score(choice.method, layer) for layer in config.layer_experts]
        for batch in batches:  # in memory, nothing is gained by keeping all hidden states of a layer
            pass_full_model(layers, [batch], scores, states, bar)
    return choice.of_scores([None if score is None else score.result() for score in scores], sizes)


def _check_sizes(config: EmoConfig, sizes: Sequence[int]) -> None:
    if not sizes:
        raise SubsetError("`num_experts` is empty: give at least one number.")
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool):
            raise SubsetError(f"`num_experts` is {size!r}, expected an integer.")
        for index, layer in enumerate(config.layer_experts):
            protected = len(always_kept(layer))
            if not layer.is_dense and not protected < size <= layer.num_experts:
                raise SubsetError(
                    f"Cannot keep {size} experts in layer {index}: it has {layer.num_experts}, of which "
                    f"{protected} are always kept; expected {protected + 1} to {layer.num_experts}."
                )


def _random_scores(config: EmoConfig, seed: int) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    return [
        None if layer.is_dense else torch.rand(layer.num_experts, generator=generator, dtype=torch.float64)
        for layer in config.layer_experts
    ]
