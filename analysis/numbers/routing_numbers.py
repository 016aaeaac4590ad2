"""All numbers of one model's router statistics.

Shape suffixes: N documents, M domains, R routed experts of a layer, W draws, C shufflings.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..files import write_text
from ..routing import RoutingStatistics
from ..tables import table
from .domain_sums import DomainSums
from .draws import Draws
from .information import information
from .measured import Number, Sampled
from .profiles import cosines, coverage, entropy, jaccards, off_diagonal, top_experts
from .single_documents import held_out_coverage, mean_over_domains, pool_stability
from .tokens_kept import LABELS, KeptTokens, kept_tokens

_DRAWS_OF_TOKENS = 50  # counting pairs of tokens and experts takes long

MEANING = {
    "coverage": "experts that a domain gives more than an even share, of all routed ones in the layer",
    "domain entropy": "how evenly a domain spreads over the experts; the most is log2 of their number",
    "token entropy": "how unsure the router is about a single token",
    "topic cosine": "how alike two domains' mean routing is; 1 is the same",
    "subset overlap": "experts in both over in either, of the eighth that each of two domains uses most",
    "domain": "what the domain tells of the expert; 0 is chance, 100 % is all there is to know",
    "token": "what the token's identity tells of the expert",
    "domain beyond token": "what the domain still tells when the token is known: topics",
    "token beyond domain": "what the token still tells when the domain is known: words",
    "word class by characters": "what the kind of characters tells of the expert",
    "part of speech": "what the part of speech tells of the expert, in the domains whose language was given",
    "held-out coverage": "share of a new document's picks that its domain's experts cover",
    "pool stability": "experts in both over in either, of those that the first tokens and the rest use most",
}  # fmt: skip


@dataclass(frozen=True)
class RoutingNumbers:
    """The numbers of one model.

    Args:
        numbers (`list[Number]`): all of them, for each layer and for all layers together.
        domains (`list[str]`): the domains, in the order of the matrices.
        matrices (`dict[str, np.ndarray]`): (M, M) for all layers together: `"topic cosine"`, `"subset
            overlap"`.

    Example: see `routing_numbers`.
    """

    numbers: list[Number]
    domains: list[str]
    matrices: dict[str, np.ndarray] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Number:
        """The number of that name for all layers together."""
        return next(one for one in self.numbers if one.name == name and one.layer is None)

    def __contains__(self, name: str) -> bool:
        """Whether there is such a number."""
        return any(one.name == name and one.layer is None for one in self.numbers)

    def by_layer(self, name: str) -> list[Number]:
        """The number of that name in each layer."""
        return [one for one in self.numbers if one.name == name and one.layer is not None]

    def data(self) -> dict[str, Any]:
        """The numbers as JSON data."""
        return {
            "domains": self.domains,
            "numbers": [one.data() for one in self.numbers],
            "matrices": {name: np.round(matrix, 6).tolist() for name, matrix in self.matrices.items()},
        }

    def save(self, path: str | os.PathLike) -> None:
        """Write the numbers as JSON.

        Args:
            path (`str` or `os.PathLike`): the file.
        """
        write_text(path, json.dumps(self.data(), indent=1, allow_nan=False) + "\n")

    def markdown(self) -> str:
        """The numbers of all layers together as a table."""
        rows = [
            [
                one.name,
                f"{one.text('value')} [{one.text('low')}, {one.text('high')}] {one.unit}".rstrip(),
                one.text("chance"),
            ]
            for one in self.numbers
            if one.layer is None
        ]
        return "\n".join(table(["", "value", "by chance"], rows)) + "\n"


def routing_numbers(
    statistics: RoutingStatistics,
    *,
    num_draws: int = 200,
    seed: int = 0,
    max_tokens: int = 200_000,
    progress: bool = True,
) -> RoutingNumbers:
    """Compute what the routers learned, each number with its level by chance and its interval.

    One layer is in memory at a time. Intervals are over documents, drawn again within their domains. For
    numbers of domains the level by chance is that of documents whose domains were shuffled; for numbers of
    tokens that of labels shuffled among tokens; see `information`, `held_out_coverage` and `pool_stability`.

    Args:
        statistics (`RoutingStatistics`): from `router_statistics`.
        num_draws (`int`, defaults to 200): how often documents are drawn again.
        seed (`int`, defaults to 0): the seed of all draws.
        max_tokens (`int`, defaults to 200000): the most tokens to take what tokens tell from.
        progress (`bool`, defaults to `True`): show a progress bar.

    Raises:
        ValueError: if there are fewer than two domains, or documents are missing.

    Example:

    ```python
    >>> from transformers_emo.analysis.numbers import routing_numbers
    >>> from transformers_emo.analysis.routing import documents_of, router_statistics
    >>> documents = documents_of("model_cards/toy-emo/documents")
    >>> statistics = router_statistics("model_cards/toy-emo", documents, tmp_path, window=64, progress=False)
    >>> numbers = routing_numbers(statistics, num_draws=20, progress=False)
    >>> numbers["topic cosine"].value < numbers["topic cosine"].chance
    True

    ```
    """
    documents = statistics.documents()
    draws = Draws(documents["domain"], num=num_draws, seed=seed)
    tokens = kept_tokens(statistics, draws, max_tokens)
    found: dict[tuple[str, str], list[Sampled]] = {}
    products: list[list[np.ndarray]] = []
    overlaps: list[np.ndarray] = []
    for layer in tqdm(statistics.layers, desc="Numbers", unit="layer", disable=not progress):
        profiles, cross, overlap = _of_profiles(statistics, draws, layer, documents)
        products.append(cross)
        overlaps.append(overlap)
        told = _of_tokens(tokens, draws, layer, seed)
        single = _of_documents(statistics, draws, layer, documents)
        for key, value in [*profiles.items(), *told.items(), *single.items()]:
            found.setdefault(key, []).append(value)
    numbers = []
    for (name, unit), layers in found.items():
        if name == "topic cosine":  # of all layers, one after the other, as in the paper
            together = _sampled(lambda cross: off_diagonal(cosines(cross)), _summed(products))
        else:
            together = Sampled.mean(layers)
        numbers.append(together.number(name, unit=unit))
        numbers += [
            one.number(name, layer, unit) for layer, one in zip(statistics.layers, layers, strict=True)
        ]
    matrices = {
        "topic cosine": cosines(_summed(products)[0][0]),
        "subset overlap": np.mean(overlaps, axis=0),
    }
    return RoutingNumbers(numbers, draws.names, matrices)


def _summed(products: list[list[np.ndarray]]) -> list[np.ndarray]:
    return [np.sum(parts, axis=0) for parts in zip(*products, strict=True)]


def _sampled(function: Callable[[np.ndarray], np.ndarray], both: list[np.ndarray]) -> Sampled:
    drawn_W, shuffled_C = (function(values) for values in both)
    return Sampled(float(drawn_W[0]), drawn_W[1:], shuffled_C)


def _of_profiles(
    statistics: RoutingStatistics, draws: Draws, layer: int, documents: dict[str, np.ndarray]
) -> tuple[dict[tuple[str, str], Sampled], list[np.ndarray], np.ndarray]:
    """Numbers of the domains' mean routing, the products of their vectors, and the overlap of their
    subsets."""
    experts = len(statistics.experts(layer))
    sums = DomainSums(draws, experts)
    unsure_N, first = [], 0
    for part in statistics.parts():
        rows = statistics.layer_rows(part, layer)
        sums.add(np.arange(first, first + len(rows.entropy_N)), rows.probability_NR)
        unsure_N.append(rows.entropy_N)
        first += len(rows.entropy_N)
    means = [values / values.sum(-1, keepdims=True) for values in sums.both()]
    kept = max(statistics.picks(layer), experts // 8)
    unsure_W = mean_over_domains(
        draws, np.arange(first), np.concatenate(unsure_N), documents["tokens"].astype(np.float64)
    )
    numbers = {
        ("coverage", "experts"): _sampled(coverage, means),
        ("domain entropy", "bits"): _sampled(entropy, means),
        ("token entropy", "bits"): Sampled(float(unsure_W[0]), unsure_W[1:]),
        ("topic cosine", ""): _sampled(lambda mean: off_diagonal(cosines(_products(mean))), means),
        ("subset overlap", ""): _sampled(lambda mean: off_diagonal(jaccards(top_experts(mean, kept))), means),
    }
    return numbers, [_products(mean) for mean in means], jaccards(top_experts(means[0][0], kept))


def _products(mean_MR: np.ndarray) -> np.ndarray:
    return mean_MR @ np.swapaxes(mean_MR, -1, -2)


def _of_tokens(tokens: KeptTokens, draws: Draws, layer: int, seed: int) -> dict[tuple[str, str], Sampled]:
    """What labels of tokens tell of the experts they take."""
    some = draws.first(_DRAWS_OF_TOKENS)
    picks = tokens.picks(layer, some)
    found = {}

    def add(name: str, told: Sampled, most: Sampled) -> None:
        found[name, "%"] = told.above_chance(most)
        found[f"{name}, information", "bits"] = told

    domain_S, token_S = tokens.labels["domain"], tokens.labels["token"]
    add("domain", *information(picks, domain_S, seed=seed))
    add("token", *information(picks, token_S, seed=seed))
    add("domain beyond token", *information(picks, domain_S, token_S, seed=seed))
    add("token beyond domain", *information(picks, token_S, domain_S, seed=seed))
    for label in ("characters", "part_of_speech"):
        has_S = tokens.labels[label] >= 0
        if has_S.any():
            own = picks if has_S.all() else tokens.picks(layer, some, has_S)
            add(LABELS[label], *information(own, tokens.labels[label][has_S], seed=seed))
    return found


def _of_documents(
    statistics: RoutingStatistics, draws: Draws, layer: int, documents: dict[str, np.ndarray]
) -> dict[tuple[str, str], Sampled]:
    """What a domain's experts cover of its other documents, and what a document's first tokens tell."""
    experts = len(statistics.experts(layer))
    found = {}
    for parts in (8, 4, 2):
        kept = max(1, experts // parts)
        covered = held_out_coverage(statistics, draws, layer, documents["split"], kept)
        for whose, share in covered.items():
            found[f"held-out coverage, 1/{parts} of the experts, {whose}", "%"] = share
    stability = pool_stability(statistics, draws, layer, max(1, experts // 4))
    for prefix, alike in stability.items():
        found[f"pool stability, {prefix} tokens", ""] = alike
    return found
