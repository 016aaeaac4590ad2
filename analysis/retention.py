"""The retention curve: how quality falls as experts are removed (paper section 5,
https://arxiv.org/abs/2605.06663)."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..checkpoints.hub.names import is_hub_repo, pinned
from ..checkpoints.source_files import LOADED_FILES, SourceFiles, unchanged
from ..checkpoints.writing.folder_lock import locked_folder
from ..configuration import EmoConfig
from ..modeling_emo import EmoForCausalLM
from ..subsets import ExpertSubset, select_experts
from ..subsets.choosing.calibration import CalibrationText
from ..subsets.loading.model_source import check_hub_kwargs
from .documents import Domain, draw, encode_documents
from .evaluation import DocumentLosses, check_batch_tokens, document_losses
from .measurements import FULL, Journal, Measurement, Retention, experts_at
from .weight_sample import PREFIX, sum_of_weights, weight_sample

METHODS = ("layerwise", "global", "easy_ep", "random")
SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125)


def num_experts_at(config: EmoConfig, share: float) -> int | None:
    """How many experts of each layer a share is, shared ones included.

    It is the nearest number, or the next larger one if the nearest would leave no routed expert. If fewer
    experts are kept than a token takes in the full model, a token takes all that are kept.

    Args:
        config (`EmoConfig`): the model's.
        share (`float`): above 0, at most 1.

    Returns:
        `int`, *optional*: the number; `None` if the share is impossible, because no routed expert is left.

    Raises:
        ValueError: if the share is out of range, or the model's layers differ in their number of experts.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.analysis import num_experts_at
    >>> config = EmoConfig(num_experts=128, num_experts_per_tok=8)
    >>> [num_experts_at(config, share) for share in (1, 0.5, 0.0625, 0.03125, 0.001)]
    [128, 64, 8, 4, None]

    ```
    """
    if not 0 < share <= 1:
        raise ValueError(f"`share` is {share!r}, expected a number above 0 and at most 1.")
    available, least, _ = _layer_size(config)
    return experts_at(share, available, least)


def measure_retention(
    models: Mapping[str, EmoForCausalLM | str | os.PathLike],
    domains: Sequence[Domain],
    out: str | os.PathLike,
    *,
    methods: Sequence[str] = METHODS,
    shares: Sequence[float] = SHARES,
    seeds: Sequence[int] = (0,),
    num_calibration: int = 8,
    window: int | None = None,
    batch_tokens: int = 2048,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    visit: Callable[[str, EmoForCausalLM, dict[str, list[torch.Tensor]]], Any] | None = None,
    progress: bool = True,
    **hub_kwargs: Any,
) -> Retention:
    """Measure test loss and next-token accuracy of models at shares of their experts, domain by domain.

    For every method, seed and domain, experts are chosen from calibration documents of that domain. The model
    is loaded whole and uses only these experts, as in `use_experts`. Each seed draws other calibration
    documents, which are the same for every model. Random choices differ between seeds and between domains.

    Each measurement is written to `out/measurements.jsonl` at once, and is not made again. So an interrupted
    run can be continued, and models, methods, shares and seeds can be added later.

    Args:
        models (`Mapping[str, EmoForCausalLM | str | os.PathLike]`): models, or the folders or repositories to
            load them from, by their names in the results. One is loaded at a time.
        domains (`Sequence[Domain]`): documents; see `read_domains`.
        out (`str` or `os.PathLike`): the folder of the measurements.
        methods (`Sequence[str]`): as for `select_experts`.
        shares (`Sequence[float]`): the shares of experts to keep, 1 for all; see `num_experts_at`. All
            experts are measured in any case. A share that a model cannot have is skipped.
        seeds (`Sequence[int]`, defaults to `(0,)`): they draw the calibration documents and the random
            experts.
        num_calibration (`int`, defaults to 8): from how many calibration documents of a domain to choose.
        window (`int`, *optional*): cut documents to so many tokens; by default to the smallest context of the
            models.
        batch_tokens (`int`, defaults to 2048): the most tokens in a batch.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): for all models; found beside each by default.
        dtype (`torch.dtype` or `str`, *optional*): the dtype to load models in; as they are saved by default.
        device (`str`, *optional*): the device to load models to; by default a GPU, if there is one.
        visit (`Callable`, *optional*): called with each model's name, the model and the token ids of the test
            documents by domain, after it is measured and before the next one is loaded.
        progress (`bool`, defaults to `True`): show a progress bar.
        hub_kwargs: `revision`, `token`, `cache_dir` and so on, as for `from_pretrained`; for every model that
            is read from a repository.

    Returns:
        `Retention`: all measurements in `out`, earlier ones included.

    Raises:
        ValueError: before a model is measured, if a number is out of range, a method is unknown, a domain has
            so few documents that all seeds would draw the same, `out` holds measurements of other texts,
            settings or weights, or the models cut the same text into different tokens, so that losses cannot
            be compared.
        BlockingIOError: if another run measures into `out`.
        SourceChangedError: if the folder of a model changes before the model is loaded.

    Example:

    ```python
    >>> from transformers_emo.analysis import Retention, measure_retention, read_domains
    >>> domains = read_domains("model_cards/toy-emo/documents", ["coq", "man_fr"], max_test=2)
    >>> retention = measure_retention(
    ...     {"toy": "model_cards/toy-emo"}, domains, tmp_path, methods=["global", "random"],
    ...     shares=[0.25], num_calibration=2, window=64, progress=False,
    ... )
    >>> retention.loss("toy", "global", 0.25) < retention.loss("toy", "random", 0.25)
    True
    >>> len(Retention.read(tmp_path).measurements)  # of each domain: all experts, global and random
    6

    ```
    """
    check_hub_kwargs("measure_retention", hub_kwargs)
    _check_plan(models, domains, methods, shares, seeds, num_calibration)
    check_batch_tokens(batch_tokens)
    hub = {
        name: {} if isinstance(model, EmoForCausalLM) or not is_hub_repo(model) else pinned(model, hub_kwargs)
        for name, model in models.items()
    }
    files = {
        name: SourceFiles.of(model, patterns=LOADED_FILES)
        for name, model in models.items()
        if not isinstance(model, EmoForCausalLM)
    }
    configs = {name: _config(model, hub[name]) for name, model in models.items()}
    sizes = {name: _sizes(config, shares) for name, config in configs.items()}
    context = min(config.max_position_embeddings for config in configs.values())
    window = context if window is None else window
    if not 2 <= window <= context:
        raise ValueError(f"`window` is {window} tokens, expected 2 to {context}, the models' context.")
    encoded = _encode(models, domains, window, tokenizer, hub)
    with locked_folder(out):
        journal = Journal(Path(out) / Journal.NAME)
        journal.require({"window": window, "num_calibration": num_calibration})
        journal.require(
            {f"texts of {domain.name}": _digest(domain.calibration, domain.test) for domain in domains}
        )

        plans = {
            name: [
                (domain, method, seed, missing)
                for method, seed in [(FULL, None), *((m, s) for m in methods for s in seeds)]
                for domain in domains
                if (missing := _missing(journal, name, domain.name, method, seed, sizes[name]))
            ]
            for name in models
        }
        total = sum(len(d.test) * len(missing) for plan in plans.values() for d, _, _, missing in plan)
        with tqdm(total=total, unit="doc", desc="Retention", disable=not progress) as bar:
            for name, model in models.items():
                bar.set_postfix_str(name)
                with unchanged(*([files[name]] if name in files else [])):
                    network = _load(model, dtype, device, hub[name])
                known = f"weights of {name}"
                is_sum = not journal.settings.get(known, PREFIX).startswith(PREFIX)
                journal.require({known: sum_of_weights(network) if is_sum else weight_sample(network)})
                _try_methods(network, methods, max(sizes[name].values()))
                _measure_model(
                    network, name, plans[name], encoded, journal, num_calibration, batch_tokens, bar
                )
                if visit is not None:
                    visit(name, network, {domain.name: encoded[domain.name][1] for domain in domains})
                del network
        return Retention(journal.measurements.values())


def _measure_model(network, name, plan, encoded, journal, num_calibration, batch_tokens, bar) -> None:
    """Make the measurements that are missing, one share after the other."""
    _, least, taken = _layer_size(network.config)
    measured: dict[tuple[str, str], DocumentLosses] = {}
    for domain, method, seed, missing in plan:
        calibration, test = encoded[domain.name]
        drawn = [] if seed is None else draw(calibration, num_calibration, seed, domain.name)
        for share, k, subset in _subsets(network, method, seed, domain.name, drawn, missing, batch_tokens):
            key = (domain.name, "" if subset is None else str(subset.experts))
            if key in measured:  # several methods or seeds often choose the same experts
                bar.update(len(test))
            else:
                measured[key] = document_losses(
                    network, test, expert_subset=subset, batch_tokens=batch_tokens, on_batch=bar.update
                )
            losses = measured[key]
            journal.add(
                Measurement(
                    model=name,
                    domain=domain.name,
                    method=method,
                    share=share,
                    num_experts=k,
                    seed=seed,
                    loss=[round(nats, 6) for nats in losses.loss_N.tolist()],
                    correct=losses.correct_N.tolist(),
                    tokens=losses.tokens_N.tolist(),
                    num_experts_per_tok=taken,
                    min_experts=least,
                )
            )


def _check_plan(models, domains, methods, shares, seeds, num_calibration) -> None:
    for what, values in (("models", models), ("domains", domains), ("shares", shares), ("seeds", seeds)):
        if not values:
            raise ValueError(f"There are no {what} to measure: give at least one.")
    names = [domain.name for domain in domains]
    for what, values in (("domains", names), ("methods", methods), ("seeds", seeds), ("shares", shares)):
        if len(set(values)) < len(values):
            raise ValueError(f"The {what} are {list(values)}: name each once.")
    if num_calibration < 1:
        raise ValueError(f"`num_calibration` is {num_calibration}, expected at least 1 document.")
    if len(seeds) > 1 and set(methods) - {"random"}:
        for domain in domains:
            if len(domain.calibration) <= num_calibration:
                raise ValueError(
                    f"The domain {domain.name!r} has {len(domain.calibration)} calibration documents, so "
                    f"every seed would draw the same {num_calibration}: draw fewer, or use one seed."
                )


def _config(model: EmoForCausalLM | str | os.PathLike, hub: dict[str, Any]) -> EmoConfig:
    if isinstance(model, EmoForCausalLM):
        return model.config
    return EmoConfig.from_pretrained(model, **hub)


def _layer_size(config: EmoConfig) -> tuple[int, int, int]:
    """The experts of a layer, the fewest that a subset can keep, and how many a token takes."""
    layers = [layer for layer in config.layer_experts if not layer.is_dense]
    sizes = sorted({layer.num_experts for layer in layers})
    if len(sizes) != 1:
        raise ValueError(
            f"The model's layers have {sizes} experts: a share is one number of experts only "
            "if all layers have the same number. Choose with `select_experts` instead."
        )
    least = max(len(layer.always_used) for layer in layers) + 1
    return sizes[0], min(least, sizes[0]), layers[0].top_k


def _sizes(config: EmoConfig, shares: Sequence[float]) -> dict[float, int]:
    """How many experts to keep at each share that the model can have, with all of them at 1."""
    by_share = {share: num_experts_at(config, share) for share in {1.0, *map(float, shares)}}
    return {share: k for share, k in sorted(by_share.items(), reverse=True) if k is not None}


def _encode(
    models, domains, window, tokenizer, hub
) -> dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """The calibration and test documents of each domain as token ids, which all models have in common."""
    first_name, first = "", None
    for name, model in models.items():
        source = model.name_or_path if isinstance(model, EmoForCausalLM) else model
        own = tokenizer or AutoTokenizer.from_pretrained(source, **hub[name])
        encoded = {
            domain.name: (
                encode_documents(own, domain.calibration, window),
                encode_documents(own, domain.test, window),
            )
            for domain in domains
        }
        if first is None:
            first_name, first = name, encoded
        elif any(
            not torch.equal(our_ids, their_ids)
            for domain in encoded
            for ours, theirs in zip(encoded[domain], first[domain], strict=True)
            for our_ids, their_ids in zip(ours, theirs, strict=True)
        ):
            raise ValueError(
                f"The models {first_name!r} and {name!r} cut the same text into different tokens: their "
                "losses per token cannot be compared. Measure them into different folders."
            )
    assert first is not None
    return first


def _missing(journal, model, domain, method, seed, sizes) -> dict[float, int]:
    """How many experts to keep at each share that is not yet measured.

    The full model has the share 1 only, and every method all other shares.
    """
    return {
        share: k
        for share, k in sizes.items()
        if (share >= 1) == (method == FULL)
        and (model, domain, method, share, seed) not in journal.measurements
    }


def _load(model: EmoForCausalLM | str | os.PathLike, dtype, device, hub) -> EmoForCausalLM:
    if isinstance(model, EmoForCausalLM):
        return model
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return EmoForCausalLM.from_pretrained(model, dtype=dtype or "auto", **hub).to(device)


def _try_methods(network: EmoForCausalLM, methods: Sequence[str], num_experts: int) -> None:
    """Choose once by each method, so that an unknown one is an error before anything is measured."""
    two_tokens = CalibrationText(input_ids=torch.tensor([[network.config.eos_token_id or 0] * 2]))
    for method in methods:
        select_experts(network, two_tokens, num_experts, method=method, progress=False)


def _subsets(
    network: EmoForCausalLM,
    method: str,
    seed: int | None,
    domain: str,
    calibration: list[torch.Tensor],
    sizes: Mapping[float, int],
    batch_tokens: int,
) -> Iterator[tuple[float, int, ExpertSubset | None]]:
    """For each size the share, the number of experts and the subset, which is `None` for the full model."""
    if method == FULL:
        yield from ((share, k, None) for share, k in sizes.items())
        return
    rows = max(1, batch_tokens // max(map(len, calibration)))
    chosen = select_experts(
        network,
        CalibrationText.of_documents(calibration, rows),
        list(sizes.values()),
        method=method,
        seed=random.Random(f"{seed}/{domain}").getrandbits(31),
        progress=False,
    )
    yield from ((share, k, subset) for (share, k), subset in zip(sizes.items(), chosen, strict=True))


def _digest(*texts: Sequence[str]) -> str:
    return hashlib.sha256(repr(texts).encode()).hexdigest()[:16]
