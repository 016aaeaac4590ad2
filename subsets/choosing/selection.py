"""Choosing the experts of a domain from calibration text (paper section 4, https://arxiv.org/abs/2605.06663).

The steps stand in modules of their own: `calibration` has the text, `model_opening` the model, `layer_passes`
runs it, `scores` says how much an expert is used, and `choice` makes subsets of the scores.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, overload

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ...checkpoints.source_files import LOADED_FILES, SourceFiles, unchanged
from ...checkpoints.writing.safetensors_writing import floating_dtype
from ...modeling_emo import EmoPreTrainedModel
from ..expert_subset import ExpertSubset
from ..loading.model_source import check_hub_kwargs
from ..ranking import jaccard
from .calibration import CalibrationText
from .calibration_batches import Batch
from .choice import Choice, check_num_experts, random_scores
from .hidden_states import HiddenStates
from .layer_passes import pass_full_model, pass_layerwise
from .layer_sources import Layers
from .model_opening import open_model
from .scores import new_score
from .usage import ExpertUsage

logger = logging.get_logger(__name__)

_METHODS = ("layerwise", "global", "easy_ep", "reap", "random")
_BUDGETS = ("uniform", "mass")


@overload
def select_experts(model: Any, texts: Any = ..., num_experts: int = ..., **kwargs: Any) -> ExpertSubset: ...
@overload
def select_experts(
    model: Any, texts: Any = ..., num_experts: Sequence[int] = ..., **kwargs: Any
) -> list[ExpertSubset]: ...


def select_experts(
    model: EmoPreTrainedModel | str | os.PathLike,
    texts: Iterable | str | CalibrationText | None = None,
    num_experts: int | Sequence[int] = 16,
    *,
    method: str = "layerwise",
    answers: Iterable[str] | str | None = None,
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
    budget: str = "uniform",
    exclude_experts: Any = None,
    stop_when_settled: float | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    hidden_memory: float = 4e9,
    seed: int = 0,
    usage: ExpertUsage | str | os.PathLike | None = None,
    progress: bool = True,
    **hub_kwargs: Any,
) -> ExpertSubset | list[ExpertSubset]:
    """Choose the experts that a domain uses most.

    - `"layerwise"` is the paper's method and the default. It goes layer by layer, and keeps the experts with
      the largest mean router probability over all calibration tokens. That is the softmax over the routed
      experts, not how often an expert is picked. The layers before it then have only their chosen experts.
    - `"global"` does the same in the full model.
    - `"easy_ep"` (https://arxiv.org/abs/2504.06792) and `"reap"` (https://arxiv.org/abs/2510.13999) go by
      what experts contribute in the full model: see `transformers_emo.subsets.choosing.scores.ExpertOutput`.
    - `"random"` needs no text. With one seed, a smaller choice is part of a larger one.

    Of two experts with the same score the one with the smaller id is chosen. Shared and always-active experts
    are always kept, and count towards `num_experts`. Dense layers stay as they are. Padding never counts.

    Every method is one pass over the layers. From a folder or repository a layer is read when its turn comes.
    `"layerwise"` reads attention, norms and router of a layer, and then the experts that it keeps. The other
    methods read all experts of a layer. The hidden states of all texts are kept between layers.

    A folder and the model loaded from it give the same subset, to the last bit, if both run in one dtype, on
    the same batches and with the same implementation of experts. They do, unless the model was given another
    implementation. In bfloat16 the scores of `"eager"` and `"grouped_mm"` differ by up to 1e-4 (measured on
    emo-tiny, where the scores of a layer sum to 1). Other experts are kept only if two are that close. Other
    batches have other padding, and matrix products of other shapes round differently too.

    Args:
        model (`EmoPreTrainedModel`, `str` or `os.PathLike`): an EMO model, or its folder or repository.
            Inside `use_experts` it is the model with those experts.
        texts (`Iterable`, `str` or `CalibrationText`, *optional*): calibration texts, or chats (lists of
            messages) for the tokenizer's chat template; a list, a generator, a stream of `datasets` or an
            open text file. One few-shot prompt of the domain with its answer is often enough. A
            `transformers_emo.subsets.choosing.calibration.CalibrationText` holds the texts and everything
            about them, from `answers` to `batch_size`.
        num_experts (`int` or `Sequence[int]`, defaults to 16): experts to keep in each layer. Several numbers
            give several subsets in one pass: each layer is read once, and the layers up to the first choice
            run once.
        method (`str`, defaults to `"layerwise"`): one of those above.
        answers (`Iterable[str]`, *optional*): an answer to each text. It is encoded by itself and follows its
            text.
        dataset (iterable of `dict`, `str` or `os.PathLike`, *optional*): rows that hold the texts, such as a
            `datasets.Dataset`, also a streamed one; or a JSONL file, by its path or open. Instead of `texts`.
        column (`str`, defaults to `"text"`): the dataset's column of texts or chats.
        answer_column (`str`, *optional*): the dataset's column of answers.
        max_texts (`int`, *optional*): take only the first so many texts.
        input_ids (*optional*): ready batches (B, S) of token ids, lists or tensors. Instead of texts.
        attention_mask (*optional*): a mask (B, S) for each of these batches, 0 for padding.
        labels (*optional*): labels (B, S) for each of these batches, -100 for a token that is no answer.
        tokens (`str`, defaults to `"all"`): which tokens count: `"all"`, `"prompt"` or `"answer"`. Answers,
            labels or the roles in a chat tell them apart. The model reads all tokens in any case.
        weight_by (`str`, defaults to `"token"`): `"token"`: every token counts the same; `"text"`: every text
            does.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): for the texts; the one beside the model by default.
        max_length (`int`, *optional*): cut texts to so many tokens: prompts with answers and chats on the
            left, other texts on the right. The model's context by default.
        batch_size (`int`, defaults to 8): texts in one batch; fewer where they are long.
        budget (`str`, defaults to `"uniform"`): `"uniform"` keeps `num_experts` in every layer. `"mass"`
            keeps as many on average over layers: more in a layer that spreads its scores over more experts,
            and in every layer at least as many as a token takes. `"layerwise"` cannot have it, since it knows
            the scores of a layer only after the layers before are chosen.
        exclude_experts (*optional*): experts never to choose, as in `use_experts`. The model in which scores
            are measured has them. With `"layerwise"` only the layer being chosen does.
        stop_when_settled (`float`, *optional*): take 1, 2, 4, 8 ... texts (or ready batches), and stop when
            the choice changes little: when the Jaccard index of the last two choices reaches this value twice
            in a row. `num_texts` and `settling` of the subset say how much text that took. `"layerwise"`
            starts again with each number of texts, which costs at most two passes over the text used. The
            other methods go on with the texts that are new, but read a checkpoint again.
        dtype (`str` or `torch.dtype`, *optional*): for a folder or repository: what to run in; that of the
            model by default.
        device (`str` or `torch.device`, *optional*): for a folder or repository: where to run; the CPU by
            default.
        hidden_memory (`float`, defaults to 4e9): bytes of hidden states to hold in memory. The rest goes to a
            temporary file.
        seed (`int`, defaults to 0): the seed of the random choice.
        usage (`ExpertUsage`, `str` or `os.PathLike`, *optional*): how much the traffic of a server used each
            expert, or the file that the plugin for vLLM wrote. Instead of texts and a method; see
            `transformers_emo.subsets.ExpertUsage`.
        progress (`bool`, defaults to `True`): show a progress bar.
        hub_kwargs: `revision`, `token`, `cache_dir` and so on, as for `from_pretrained`.

    Returns:
        `ExpertSubset`, or a list of them: the experts in root numbering, with the score of every expert
        (softmax and norms in float32, sums in float64). `subset.top` makes smaller choices of it.

    Raises:
        SubsetError: if a layer has fewer experts than asked for, or no routed expert would be kept.
        ValueError: if an argument is unknown, inputs do not fit each other, no token counts, or the scores
            are not finite.
        CheckpointError: if a folder or repository does not hold the whole model in safetensors files, or
            the folder changes meanwhile.

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
    other_method = method != "layerwise"
    method = method if usage is None else "usage"
    checked = method if usage is None else "global"  # both have the scores of all layers at once
    _check_arguments(checked, budget, stop_when_settled, hidden_memory, hub_kwargs)
    calibration = CalibrationText.of(
        texts,
        answers=answers,
        dataset=dataset,
        column=column,
        answer_column=answer_column,
        max_texts=max_texts,
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        tokens=tokens,
        weight_by=weight_by,
        tokenizer=tokenizer,
        max_length=max_length,
        batch_size=batch_size,
    )
    if usage is not None and (other_method or calibration.is_given or stop_when_settled is not None):
        raise ValueError(
            "`usage` stands in place of text: give neither text nor another `method` nor `stop_when_settled` "
            "with it."
        )
    if method not in ("random", "usage") and not calibration.is_given:
        raise ValueError("Give either calibration `texts`, a `dataset` or ready `input_ids`: there are none.")
    run_in = None if dtype is None else floating_dtype(dtype)
    files = []
    if isinstance(model, str | os.PathLike):
        subfolder = hub_kwargs.get("subfolder")
        files = [SourceFiles.of(model, patterns=LOADED_FILES, subfolder=subfolder)]
    with unchanged(*files):
        opened = open_model(model, run_in, device, hub_kwargs)
        config, revision = opened.config, opened.source.commit
        sizes = list(num_experts) if isinstance(num_experts, Sequence) else [num_experts]
        excluded = opened.excluded(exclude_experts, reads_weights=method not in ("random", "usage"))
        choice = Choice(config, method, budget, sizes, opened.place, revision, excluded)
        check_num_experts(config, sizes, choice.excluded)
        if method == "random":
            subsets = choice.of_scores(random_scores(config, seed))
            fingerprint = opened.fingerprint()
        elif usage is not None:
            used = usage if isinstance(usage, ExpertUsage) else ExpertUsage.load(usage)
            subsets = choice.of_scores(used.scores(config), num_tokens=used.num_tokens)
            fingerprint = opened.fingerprint()
        else:
            parts = calibration.batches(
                config, opened.find_tokenizer, in_parts=stop_when_settled is not None, progress=progress
            )
            token_ids = torch.cat([batch.input_ids.flatten() for part in parts for batch in part])
            with opened.layers(token_ids, run_in, device) as layers:
                subsets = _choose(layers, parts, choice, stop_when_settled, hidden_memory, progress)
                fingerprint = layers.fingerprint()
    subsets = [replace(subset, fingerprint=fingerprint) for subset in subsets]
    return subsets if isinstance(num_experts, Sequence) else subsets[0]


def _check_arguments(
    method: str, budget: str, stop_when_settled: float | None, hidden_memory: float, hub_kwargs: dict
) -> None:
    check_hub_kwargs("select_experts", hub_kwargs)
    for name, value, known in (("method", method, _METHODS), ("budget", budget, _BUDGETS)):
        if value not in known:
            raise ValueError(f"Unknown {name} {value!r}, expected one of {', '.join(known)}.")
    if budget == "mass" and method in ("layerwise", "random"):
        raise ValueError(
            f"The budget 'mass' needs scores of all layers at once, and {method!r} has none: choose by "
            "'global', 'easy_ep' or 'reap'."
        )
    if stop_when_settled is not None and not 0 < stop_when_settled <= 1:
        raise ValueError(
            f"`stop_when_settled` is {stop_when_settled}, expected a number from 0 to 1, but not 0."
        )
    if not hidden_memory >= 0:
        raise ValueError(f"`hidden_memory` is {hidden_memory!r}, expected bytes, from 0.")


def _choose(
    layers: Layers,
    parts: list[list[Batch]],
    choice: Choice,
    stop_at: float | None,
    hidden_memory: float,
    progress: bool,
) -> list[ExpertSubset]:
    """Take one part of the text after the other, until all are used or the choice has settled."""
    scores = [new_score(choice.method, layer) for layer in choice.config.layer_experts]
    settling: list[dict[str, float]] = []
    subsets: list[ExpertSubset] = []
    for number, part in enumerate(parts):
        used = [batch for earlier in parts[: number + 1] for batch in earlier]
        counted: dict[str, Any] = {
            "num_texts": sum(int((batch.weight > 0).any(-1).sum()) for batch in used),
            "num_tokens": sum(int((batch.weight > 0).sum()) for batch in used),
        }
        if not counted["num_tokens"]:
            continue
        before = subsets
        if choice.method == "layerwise":
            with _bar(choice, len(used) * len(choice.sizes), progress) as bar:
                states = HiddenStates(hidden_memory)
                chosen = pass_layerwise(layers, used, choice.sizes, choice.pick, states, bar)
            subsets = [choice.subset(*scores_and_kept, **counted) for scores_and_kept in chosen]
        else:
            with _bar(choice, len(part), progress) as bar:
                # A layer in memory costs the same each time. So one batch at a time goes through all layers.
                for batches in [[batch] for batch in part] if layers.in_memory else [part]:
                    pass_full_model(layers, batches, scores, HiddenStates(hidden_memory), bar)
            subsets = choice.of_scores([None if s is None else s.result() for s in scores], **counted)
        if stop_at is None:
            continue
        if before:
            counted["jaccard"] = min(
                jaccard(_routed(old), _routed(new)) for old, new in zip(before, subsets, strict=True)
            )
        settling.append(counted)
        subsets = [replace(subset, settling=list(settling)) for subset in subsets]
        if len(settling) > 2 and all(step["jaccard"] >= stop_at for step in settling[-2:]):
            return subsets
    if stop_at is not None:
        logger.warning(
            f"The choice has not settled within {settling[-1]['num_texts']} texts: the last Jaccard index is "
            f"{settling[-1].get('jaccard', 0):.3f}, and `stop_when_settled` asks for {stop_at}, twice in a "
            "row. Give more texts, or a smaller value."
        )
    return subsets


def _routed(subset: ExpertSubset) -> list[set[int] | None]:
    """The experts that a choice might have left out: all but those that are always kept."""
    always = subset.always_kept or []
    return [
        None if ids is None else set(ids) - set(kept or ())
        for ids, kept in zip(subset.experts, always, strict=True)
    ]


def _bar(choice: Choice, num_batches: int, progress: bool) -> tqdm:
    # Layers behind the last one with experts do not run.
    layers = max(
        (i + 1 for i, layer in enumerate(choice.config.layer_experts) if not layer.is_dense), default=0
    )
    return tqdm(total=layers * num_batches, desc="Choosing experts", unit="batch", disable=not progress)
