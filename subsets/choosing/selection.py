"""Choosing the experts of a domain from calibration text (paper section 4, https://arxiv.org/abs/2605.06663).

What is chosen on stands in `calibration.py`, what experts are chosen by in `scores.py`, how the model is
run for it in `layer_passes.py`, and how a choice is made of scores in `choice.py`.

Shape suffixes: E experts of a layer.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, overload

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ...checkpoints.errors import CheckpointError
from ...checkpoints.hub.names import HUB_KWARGS, folder_or_repo, pinned
from ...checkpoints.safetensors_writing import floating_dtype
from ...configuration import LEGACY_MODEL_TYPE, EmoConfig
from ...modeling_emo import EmoPreTrainedModel
from ..exclusion import excluded_experts, named_exclusion
from ..expert_subset import ExpertSubset
from ..fingerprint import (
    attention_of,
    fingerprint_of,
    fingerprint_of_folder,
    warn_if_chosen_elsewhere,
)
from ..library import library_of
from ..loading.model_source import ModelSource
from ..ranking import jaccard
from ..validation import is_id
from .calibration import (
    TOKENS,
    Batch,
    check_ids,
    doubling,
    encode,
    make_batches,
    read_column,
    ready_batches,
    tokenizer_of,
)
from .choice import Choice, check_num_experts, masked_experts, random_scores
from .hidden_states import HiddenStates
from .layer_passes import pass_full_model, pass_layerwise
from .layer_sources import CheckpointLayers, Layers, LoadedLayers
from .scores import new_score

logger = logging.get_logger(__name__)

_METHODS = ("layerwise", "global", "easy_ep", "reap", "random")
_WEIGHTS = ("token", "text")
_BUDGETS = ("uniform", "mass")


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
    budget: str = "uniform",
    exclude_experts: Any = None,
    stop_when_settled: float | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    hidden_memory: float = 4e9,
    seed: int = 0,
    progress: bool = True,
    **hub_kwargs: Any,
) -> ExpertSubset | list[ExpertSubset]:
    """Choose the experts that a domain uses most.

    - `"layerwise"`, the paper's choice and the default: layer by layer, the experts with the largest mean
      router probability over all calibration tokens (the softmax over the routed experts, not the frequency
      of picks), measured with the layers before cut down to their choice already.
    - `"global"`: the same, measured in the full model.
    - `"easy_ep"` (https://arxiv.org/abs/2504.06792) and `"reap"` (https://arxiv.org/abs/2510.13999): by what
      experts contribute in the full model, see `transformers_emo.subsets.choosing.scores.ExpertOutput`.
    - `"random"` needs no text; for one seed, a smaller choice is part of a larger one.

    Ties go to the smaller id. Shared and always-active experts are always kept and count towards
    `num_experts`; dense layers stay as they are. Padding never counts.

    Every method is one pass over the layers. From a folder or repository a layer is read when its turn comes:
    `"layerwise"` reads attention, norms and router of a layer, and then the experts that it keeps; the other
    methods read all experts of a layer. The hidden states of all texts are kept between layers.

    A folder gives what the model loaded from it gives, to the last bit where both run in one dtype, on the
    same batches and with the same implementation of experts, as they do unless the model was given another
    one. In bfloat16 scores of `"eager"` and `"grouped_mm"` differ by up to 1e-4 (emo-tiny, where they sum to
    1 in a layer) and kept ids only where experts are that close. Other batches have other padding, and matrix
    products of other shapes round differently too.

    Args:
        model (`EmoPreTrainedModel`, `str` or `os.PathLike`): an EMO model, or the folder or repository to
            load it from. Under an open `use_experts` the choice is that of the model with those experts.
        texts (`Sequence` or `str`, *optional*): calibration texts, or chats (lists of messages) for the
            tokenizer's chat template; one few-shot prompt of the domain with its answer is often enough.
        num_experts (`int` or `Sequence[int]`, defaults to 16): experts to keep in each layer; several numbers
            give several subsets in one pass: what is read is read once, and layers up to the first choice run
            once.
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
        budget (`str`, defaults to `"uniform"`): `"uniform"`: `num_experts` in every layer; `"mass"`: in the
            mean over layers, more where a layer spreads its scores over more experts, and in every layer as
            many as a token takes. Not for `"layerwise"`, which knows a layer's scores only when the layers
            before are chosen.
        exclude_experts (*optional*): experts never to choose, as in `use_experts`; they are in the model that
            scores are measured in, but for `"layerwise"` only in the layer being chosen.
        stop_when_settled (`float`, *optional*): take 1, 2, 4, 8 ... texts (or ready batches) and stop when
            the Jaccard index of the choice with the one before reaches this value twice in a row; `num_texts`
            and `settling` of the subset say how much text that took. `"layerwise"` begins anew with every
            number, which costs at most two passes in all over the text used; other methods go on, and read a
            checkpoint anew.
        dtype (`str` or `torch.dtype`, *optional*): for a folder or repository: what to run in; that of the
            model by default.
        device (`str` or `torch.device`, *optional*): for a folder or repository: where to run; the CPU by
            default.
        hidden_memory (`float`, defaults to 4e9): bytes of hidden states to hold in memory; what is more goes
            to a temporary file.
        seed (`int`, defaults to 0): of the random choice.
        progress (`bool`, defaults to `True`): show a progress bar.
        hub_kwargs: `revision`, `token`, `cache_dir` and so on, as for `from_pretrained`.

    Returns:
        `ExpertSubset`, or a list of them: the choice in root numbering, with the score of every expert
        (float32 softmax and norms, float64 sums). `subset.top` makes smaller choices of it.

    Raises:
        SubsetError: if a layer has fewer experts than asked for, or none of them would be routed.
        ValueError: if an argument is unknown, inputs do not fit each other, there is no calibration token,
            or the model's numbers are not finite.
        CheckpointError: if a folder or repository does not hold the whole model in safetensors files.

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
        ("budget", budget, _BUDGETS),
    ):
        if value not in known:
            raise ValueError(f"Unknown {name} {value!r}, expected one of {', '.join(known)}.")
    if budget == "mass" and method in ("layerwise", "random"):
        raise ValueError(f"The budget 'mass' needs scores of all layers at once: {method!r} has none.")
    if stop_when_settled is not None and not 0 < stop_when_settled <= 1:
        raise ValueError(f"`stop_when_settled` is {stop_when_settled}, expected a number from 0 to 1.")
    for name, count in (("max_texts", max_texts), ("max_length", max_length), ("batch_size", batch_size)):
        if count is not None and (not is_id(count) or count < 1):
            raise ValueError(f"`{name}` is {count!r}, expected an integer from 1.")
    if not hidden_memory >= 0:
        raise ValueError(f"`hidden_memory` is {hidden_memory!r}, expected bytes, from 0.")
    for name, given, owner, owned in (
        ("answers", answers, "texts", texts),
        ("answer_column", answer_column, "dataset", dataset),
        ("attention_mask", attention_mask, "input_ids", input_ids),
        ("labels", labels, "input_ids", input_ids),
    ):
        if given is not None and owned is None:
            raise ValueError(f"`{name}` goes with `{owner}`, which is not given: leave it out, or give both.")
    run_in = None if dtype is None else floating_dtype(dtype)
    config, source = _resolve(model, dtype, device, hub_kwargs)
    if isinstance(model, EmoPreTrainedModel):
        commit = getattr(config, "_commit_hash", None)
        hub_kwargs = {} if commit is None else {"revision": commit}
    elif source is not None:
        hub_kwargs = pinned(source, hub_kwargs)
    several = isinstance(num_experts, Sequence)
    sizes = list(num_experts) if isinstance(num_experts, Sequence) else [num_experts]
    excluded: list[set[int]] = [set()] * config.num_hidden_layers
    if exclude_experts is not None:
        exclude_experts = named_exclusion(exclude_experts, *library_of(source, **hub_kwargs))
        excluded = excluded_experts(exclude_experts, config)
        if isinstance(exclude_experts, ExpertSubset):
            is_read = method != "random" or os.path.isdir(source or "")  # of a repository nothing is fetched
            _warn_of_exclusion(exclude_experts, model, config, source, hub_kwargs if is_read else None)
    if isinstance(model, EmoPreTrainedModel):
        excluded = [never | masked for never, masked in zip(excluded, masked_experts(model), strict=True)]
    choice = Choice(config, method, budget, sizes, source, hub_kwargs.get("revision"), excluded)
    check_num_experts(config, sizes, choice.excluded)
    if method == "random":
        known_by = None
        if isinstance(model, EmoPreTrainedModel):
            known_by = fingerprint_of(model.state_dict(), config.num_hidden_layers)
        elif os.path.isdir(model):
            folder = os.path.join(model, hub_kwargs.get("subfolder") or "")
            known_by = fingerprint_of_folder(folder, config.num_hidden_layers)
        subsets = choice.of_scores(random_scores(config, seed))
        subsets = [replace(subset, fingerprint=known_by) for subset in subsets]
        return subsets if several else subsets[0]

    if sum(given is not None for given in (texts, dataset, input_ids)) != 1:
        raise ValueError("Give either calibration `texts`, a `dataset` or ready `input_ids`.")
    if dataset is not None:
        columns = [column] if answer_column is None else [column, answer_column]
        texts, *rest = read_column(dataset, columns, max_texts, progress=progress)
        answers = rest[0] if rest else answers
    if texts is not None:
        texts, answers = _several(texts), None if answers is None else _several(answers)
        examples = encode(
            texts[:max_texts],
            None if answers is None else answers[:max_texts],
            tokenizer or tokenizer_of(source, **hub_kwargs),
            tokens,
            max_length or config.max_position_embeddings,
        )
        chunks = [make_batches(part, batch_size, weight_by) for part in doubling(examples, stop_when_settled)]
    else:
        ready = ready_batches(input_ids, attention_mask, labels, tokens, weight_by)
        chunks = doubling(ready, stop_when_settled)
    batches = [batch for chunk in chunks for batch in chunk]
    if not any(batch.weight.any() for batch in batches):
        raise ValueError("There is no calibration token: give at least one text that is not empty.")
    check_ids(batches, config.vocab_size)

    if isinstance(model, EmoPreTrainedModel):
        layers: Layers = LoadedLayers(model)
        training = model.training
        model.eval()
        try:
            subsets = _choose(layers, chunks, choice, stop_when_settled, hidden_memory, progress)
        finally:
            model.train(training)
        known_by = fingerprint_of(model.state_dict(), config.num_hidden_layers)
    else:
        checkpoint = ModelSource(model, config, hub_kwargs).checkpoint()
        try:
            layers = CheckpointLayers(
                checkpoint,
                config,
                torch.cat([batch.input_ids.flatten() for batch in batches]),
                dtype=run_in,
                device=device or "cpu",
            )
            subsets = _choose(layers, chunks, choice, stop_when_settled, hidden_memory, progress)
            # Last, when these bytes have been read: of a repository nothing more is fetched.
            known_by = fingerprint_of(attention_of(checkpoint), config.num_hidden_layers)
        finally:
            checkpoint.source.close()
    subsets = [replace(subset, fingerprint=known_by) for subset in subsets]
    return subsets if several else subsets[0]


def _warn_of_exclusion(
    excluded: ExpertSubset,
    model: Any,
    config: EmoConfig,
    source: str | None,
    hub_kwargs: dict[str, Any] | None,
) -> None:
    """Say so where the experts to leave out were chosen on another model; `hub_kwargs` to look at weights."""
    layers = config.num_hidden_layers
    if isinstance(model, EmoPreTrainedModel):
        tensors = dict(model.named_parameters())
        warn_if_chosen_elsewhere(None, source or "", tensors, layers, excluded=excluded)
        return
    checkpoint = None
    if excluded.fingerprint is not None and hub_kwargs is not None:
        with suppress(CheckpointError):  # a choice at random needs no weights, any other says so itself
            checkpoint = ModelSource(model, config, hub_kwargs).checkpoint()
    try:
        lazies = {} if checkpoint is None else attention_of(checkpoint)
        warn_if_chosen_elsewhere(None, source or "", lazies, layers, excluded=excluded)
    finally:
        if checkpoint is not None:
            checkpoint.source.close()


def _resolve(model: Any, dtype: Any, device: Any, hub_kwargs: dict[str, Any]) -> tuple[EmoConfig, str | None]:
    """The config of a model, and where it is from."""
    unknown = sorted(set(hub_kwargs) - set(HUB_KWARGS))
    if unknown:
        raise TypeError(f"select_experts() got an unexpected keyword argument {unknown[0]!r}")
    if isinstance(model, EmoPreTrainedModel):
        if dtype is not None or device is not None or hub_kwargs:
            raise ValueError(
                f"The model is loaded, in {model.dtype} on {model.device}: `dtype`, `device` and where to "
                "download from are for folders and repositories."
            )
        return model.config, model.name_or_path or None
    if not isinstance(model, str | os.PathLike):
        raise ValueError(
            f"Cannot choose experts of {type(model).__name__}: give an EMO model (the one inside a wrapper), "
            "a folder or a Hub repository."
        )
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such device, or PyTorch built without it
        raise ValueError(f"Cannot run on the device {device!r}: {str(error).splitlines()[0]}") from error
    if os.path.isdir(model) and not os.path.isfile(
        os.path.join(model, hub_kwargs.get("subfolder") or "", "config.json")
    ):
        raise CheckpointError(f"There is no config.json in {os.fspath(model)}: it is no model's folder.")
    with folder_or_repo(model):
        found = EmoConfig.get_config_dict(model, **hub_kwargs)[0].get("model_type")
    if found not in (EmoConfig.model_type, LEGACY_MODEL_TYPE):
        raise ValueError(
            f"{os.fspath(model)} is a model of type {found!r}, expected {EmoConfig.model_type!r}."
        )
    config = EmoConfig.from_pretrained(model, **hub_kwargs)
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"The weights of {os.fspath(model)} are quantised: give the loaded model, or the unquantised one."
        )
    return config, os.fspath(model)


def _several(texts: Sequence | str) -> list:
    """Texts or chats, of several or of one."""
    is_chat = not isinstance(texts, str) and len(texts) > 0 and all(isinstance(t, dict) for t in texts)
    return [texts] if isinstance(texts, str) or is_chat else list(texts)


def _choose(
    layers: Layers,
    chunks: list[list[Batch]],
    choice: Choice,
    stop_at: float | None,
    hidden_memory: float,
    progress: bool,
) -> list[ExpertSubset]:
    """Take one chunk of text after the other, until all are used or the choice has settled."""
    scores = [new_score(choice.method, layer) for layer in choice.config.layer_experts]
    settling: list[dict[str, float]] = []
    subsets: list[ExpertSubset] = []
    for number, chunk in enumerate(chunks):
        used = [batch for part in chunks[: number + 1] for batch in part]
        said: dict[str, Any] = {
            "num_texts": sum(int((batch.weight > 0).any(-1).sum()) for batch in used),
            "num_tokens": sum(int((batch.weight > 0).sum()) for batch in used),
        }
        if not said["num_tokens"]:
            continue
        before = subsets
        if choice.method == "layerwise":
            with _bar(choice, len(used) * len(choice.sizes), progress) as bar:
                states = HiddenStates(hidden_memory)
                chosen = pass_layerwise(layers, used, choice.sizes, choice.pick, states, bar)
            subsets = [choice.subset(*scores_and_kept, **said) for scores_and_kept in chosen]
        else:
            with _bar(choice, len(chunk), progress) as bar:
                # In memory, nothing is gained by taking a layer for all batches at once.
                for batches in [[batch] for batch in chunk] if layers.in_memory else [chunk]:
                    pass_full_model(layers, batches, scores, HiddenStates(hidden_memory), bar)
            subsets = choice.of_scores([None if s is None else s.result() for s in scores], **said)
        if stop_at is None:
            continue
        if before:
            said["jaccard"] = min(
                jaccard(_routed(old), _routed(new)) for old, new in zip(before, subsets, strict=True)
            )
        settling.append(said)
        subsets = [replace(subset, settling=list(settling)) for subset in subsets]
        if len(settling) > 2 and all(step["jaccard"] >= stop_at for step in settling[-2:]):
            return subsets
    if stop_at is not None:
        logger.warning(
            f"The choice has not settled within {settling[-1]['num_texts']} texts: the last Jaccard index is "
            f"{settling[-1].get('jaccard', 0):.3f}, and `stop_when_settled` is {stop_at}, twice in a row."
        )
    return subsets


def _routed(subset: ExpertSubset) -> list[set[int] | None]:
    """What a choice was about: the experts that it might have left out."""
    always = subset.always_kept or []
    return [
        None if ids is None else set(ids) - set(kept or ())
        for ids, kept in zip(subset.experts, always, strict=True)
    ]


def _bar(choice: Choice, num_batches: int, progress: bool) -> tqdm:
    # Layers behind the last one with experts have no part in the choice.
    layers = max(
        (i + 1 for i, layer in enumerate(choice.config.layer_experts) if not layer.is_dense), default=0
    )
    return tqdm(total=layers * num_batches, desc="Choosing experts", unit="batch", disable=not progress)
