"""Numbers of single documents, and their means over domains.

Shape suffixes: N documents, M domains, W draws, R routed experts, P prefixes, F reference documents.
"""

from __future__ import annotations

import numpy as np

from ..routing import RoutingStatistics
from .draws import Draws
from .measured import Sampled
from .profiles import top_experts

_REFERENCES = 64  # other documents that a document's pool is compared with


def mean_over_domains(
    draws: Draws, documents: np.ndarray, part_N: np.ndarray, whole_N: np.ndarray
) -> np.ndarray:
    """A share of documents, added up within domains and then averaged over them, in each draw (W,).

    Args:
        draws (`Draws`): which documents are drawn.
        documents (`np.ndarray`): int (N,), the documents' places. Domains without any are left out.
        part_N (`np.ndarray`): (N,) the part in each document.
        whole_N (`np.ndarray`): (N,) what it is a part of.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers_emo.analysis.numbers.single_documents import mean_over_domains
    >>> from transformers_emo.analysis.numbers.draws import Draws
    >>> draws = Draws(["a", "b", "b"], num=1)
    >>> part, whole = np.array([1, 2, 0]), np.array([2, 4, 4])
    >>> float(mean_over_domains(draws, np.array([0, 1, 2]), part, whole)[0])
    0.375

    ```
    """
    shares = []
    domain_N = draws.domain_N[documents]
    for domain in np.unique(domain_N):
        own = domain_N == domain
        weight_WN = draws.weight_WN[:, documents[own]].astype(np.float64)
        whole_W = weight_WN @ whole_N[own]
        everywhere = part_N[own].sum() / whole_N[own].sum()  # where a draw has none of these documents
        shares.append(
            np.where(whole_W > 0, weight_WN @ part_N[own] / np.maximum(whole_W, 1e-300), everywhere)
        )
    return np.mean(shares, axis=0)


def held_out_coverage(
    statistics: RoutingStatistics, draws: Draws, layer: int, splits: np.ndarray, kept: int
) -> dict[str, Sampled]:
    """How many picks of a test document its domain's experts cover.

    The experts are the `kept` ones with the largest mean probability over the domain's calibration documents.

    Args:
        statistics (`RoutingStatistics`): the statistics.
        draws (`Draws`): which documents are drawn.
        layer (`int`): the layer.
        splits (`np.ndarray`): (N,) the split of each document.
        kept (`int`): how many routed experts.

    Returns:
        `dict[str, Sampled]`: the share of picks covered by the experts of the `"own domain"`, of `"other
        domains"`
            in the mean, and by those that `"all domains"` together use most. By chance it is `kept` over the
            number of routed experts.
            Nothing if no domain has documents of both splits.

    Example: see `routing_numbers`.
    """
    experts = len(statistics.experts(layer))
    mean_MR = np.zeros((draws.num_domains, experts))
    is_calibration = splits == "calibration"
    first = 0
    for part in statistics.parts():
        rows = statistics.layer_rows(part, layer)
        places = np.arange(first, first + len(rows.probability_NR))
        used = places[is_calibration[places]]
        np.add.at(mean_MR, draws.domain_N[used], rows.probability_NR[used - first])
        first += len(places)
    known = mean_MR.sum(-1) > 0
    if not known.any():
        return {}
    with np.errstate(invalid="ignore"):
        mean_MR = np.nan_to_num(mean_MR / mean_MR.sum(-1, keepdims=True))
    mask_MR = top_experts(mean_MR, kept)
    overall_R = top_experts(mean_MR[known].mean(0, keepdims=True), kept)[0]
    found: dict[str, list[np.ndarray]] = {"own domain": [], "other domains": [], "all domains": []}
    documents, picked, first = [], [], 0
    for part in statistics.parts():
        rows = statistics.layer_rows(part, layer)
        places = np.arange(first, first + len(rows.picks_NR))
        first += len(places)
        domain_N = draws.domain_N[places]
        used_N = ~is_calibration[places] & known[domain_N]
        picks_NR, domain_N = rows.picks_NR[used_N], domain_N[used_N]
        covered_NM = picks_NR @ mask_MR.T.astype(np.int64)
        own_N = np.take_along_axis(covered_NM, domain_N[:, None], 1)[:, 0]
        found["own domain"].append(own_N)
        found["other domains"].append((covered_NM[:, known].sum(1) - own_N) / max(known.sum() - 1, 1))
        found["all domains"].append(picks_NR @ overall_R.astype(np.int64))
        picked.append(picks_NR.sum(1))
        documents.append(places[used_N])
    place_N, whole_N = np.concatenate(documents), np.concatenate(picked)
    if not len(place_N):
        return {}
    chance_C = np.full(len(draws.shuffled_CN), kept / experts)
    shares = {}
    for name, parts in found.items():
        share_W = mean_over_domains(draws, place_N, np.concatenate(parts), whole_N)
        shares[name] = Sampled(share_W[0], share_W[1:], chance_C)
    return shares


def pool_stability(
    statistics: RoutingStatistics, draws: Draws, layer: int, size: int, seed: int = 0
) -> dict[int, Sampled]:
    """Whether the first tokens of a document tell the experts that the rest of it uses.

    For each prefix the `size` experts that the first tokens use most are compared with those that the rest
    uses most: experts in both over experts in either. Documents count that are twice as long as the prefix.
    The level by chance is the same with the rest of documents of other domains.

    Args:
        statistics (`RoutingStatistics`): the statistics.
        draws (`Draws`): which documents are drawn.
        layer (`int`): the layer.
        size (`int`): experts in a pool.
        seed (`int`, defaults to 0): the seed by which the other documents are drawn.

    Returns:
        `dict[int, Sampled]`: by the number of first tokens. Prefixes that no document is long enough for are
            left out.

    Example: see `routing_numbers`.
    """
    prefixes, table = statistics.settings["prefixes"], statistics.documents()
    tokens_N, part_N = table["tokens"], table["part"]
    rng = np.random.default_rng(seed)
    found = {}
    for index, prefix in enumerate(prefixes):
        long = np.flatnonzero(tokens_N >= 2 * prefix)
        if not len(long):
            continue
        references = np.sort(rng.choice(long, min(_REFERENCES, len(long)), replace=False))
        rest_FR = []
        for part in np.unique(part_N[references]):
            _, rest_NR = _pools(statistics, part, layer, index, size)
            first = np.flatnonzero(part_N == part)[0]
            rest_FR.append(rest_NR[references[part_N[references] == part] - first])
        other_FR = np.concatenate(rest_FR).astype(np.float64)
        same, other, places = [], [], []
        for part in np.unique(part_N[long]):
            begin_NR, rest_NR = _pools(statistics, part, layer, index, size)
            here = long[part_N[long] == part]
            begin_NR, rest_NR = (
                pool[here - np.flatnonzero(part_N == part)[0]] for pool in (begin_NR, rest_NR)
            )
            same.append(_alike(begin_NR, rest_NR))
            alike_NF = _jaccard(begin_NR.astype(np.float64) @ other_FR.T, size)
            foreign_NF = draws.domain_N[here][:, None] != draws.domain_N[references]
            other.append(np.where(foreign_NF, alike_NF, 0).sum(1) / np.maximum(foreign_NF.sum(1), 1))
            places.append(here)
        place_N, one_N = np.concatenate(places), np.ones(len(long))
        value_W, chance_W = (
            mean_over_domains(draws, place_N, np.concatenate(parts), one_N) for parts in (same, other)
        )
        found[prefix] = Sampled(value_W[0], value_W[1:], chance_W - chance_W.mean() + chance_W[0])
    return found


def _pools(
    statistics: RoutingStatistics, part: int, layer: int, index: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The experts that the first tokens use most, and those that the rest does, as masks (N, R)."""
    rows = statistics.layer_rows(int(part), layer)
    first_NR = rows.prefix_NPR[:, index].astype(np.float64)
    return top_experts(first_NR, size), top_experts(rows.probability_NR - first_NR, size)


def _alike(one_NR: np.ndarray, other_NR: np.ndarray) -> np.ndarray:
    return _jaccard((one_NR & other_NR).sum(1), int(one_NR[:1].sum()))


def _jaccard(both: np.ndarray, size: int) -> np.ndarray:
    return both / (2 * size - both)
