"""What a page shows, as JSON data: of each model the maps, matrices, numbers, clusters and documents.

Shape suffixes: M domains, R routed experts of a layer, C clusters, S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..clusters import TokenClusters
from ..clusters.cluster_numbers import MEANING as CLUSTER_MEANING
from ..measurements import Retention
from ..numbers import RoutingNumbers
from ..numbers.profiles import cosines, jaccards, top_experts
from ..numbers.routing_numbers import MEANING
from ..routing import RoutingStatistics
from .curves import curves
from .orders import order_of_domains, order_of_experts
from .shown_documents import chosen_documents, shown_documents

_PARTS = (8, 4, 2)  # an eighth, a quarter, a half of the experts
_PLANE_TOKENS = 1500  # in the picture of clusters


@dataclass(frozen=True)
class Shown:
    """One model of a page.

    Args:
        name (`str`): what the page calls it.
        statistics (`RoutingStatistics`): from `router_statistics`.
        numbers (`RoutingNumbers`): from `routing_numbers`.
        clusters (`TokenClusters`): from `cluster_tokens`.

    Example: see `page_content`.
    """

    name: str
    statistics: RoutingStatistics
    numbers: RoutingNumbers
    clusters: TokenClusters


def page_content(
    models: Sequence[Shown], retention: Retention | None = None, *, documents_per_domain: int = 2
) -> dict[str, Any]:
    """What a page shows, as JSON data.

    Args:
        models (`Sequence[Shown]`): the models, of the same documents. The order of domains is that of the
            first.
        retention (`Retention`, *optional*): the curve.
        documents_per_domain (`int`, defaults to 2): how many documents of each domain to show token by token.

    Raises:
        ValueError: if there is no model, or models have statistics of different domains.

    Example:

    ```python
    >>> from transformers_emo.analysis.clusters import cluster_tokens
    >>> from transformers_emo.analysis.numbers import routing_numbers
    >>> from transformers_emo.analysis.page import Shown, page_content
    >>> from transformers_emo.analysis.routing import documents_of, router_statistics
    >>> documents = documents_of("model_cards/toy-emo/documents")
    >>> statistics = router_statistics("model_cards/toy-emo", documents, tmp_path, window=64, progress=False)
    >>> numbers = routing_numbers(statistics, num_draws=5, progress=False)
    >>> toy = Shown("toy", statistics, numbers, cluster_tokens(statistics, num_clusters=4))
    >>> content = page_content([toy])
    >>> content["models"][0]["name"], len(content["models"][0]["maps"])
    ('toy', 4)

    ```
    """
    if not models:
        raise ValueError("There is no model to show: give at least one.")
    domains = models[0].numbers.domains
    for model in models[1:]:
        if model.numbers.domains != domains:
            raise ValueError(
                f"{models[0].name!r} was measured on the domains {domains} and {model.name!r} on "
                f"{model.numbers.domains}: measure all on the same texts."
            )
    order = order_of_domains(models[0].numbers.matrices["topic cosine"])
    table = models[0].statistics.documents()
    return {
        "domains": [domains[place] for place in order],
        "documents": len(table["document"]),
        "tokens": int(table["tokens"].sum()),
        "meanings": MEANING | {f"clusters: {name}": said for name, said in CLUSTER_MEANING.items()},
        "models": [_model(model, order, documents_per_domain) for model in models],
        "retention": curves(retention),
    }


def _model(model: Shown, order: list[int], documents_per_domain: int) -> dict[str, Any]:
    maps, products, overlaps = [], [], []
    for layer in model.statistics.layers:
        mean_MR = domain_means(model.statistics, model.numbers.domains, layer)
        experts = model.statistics.experts(layer)
        by_domain = order_of_experts(mean_MR, order)
        maps.append(
            {
                "layer": layer,
                "experts": [experts[place] for place in by_domain],
                "places": by_domain,
                "values": np.round(mean_MR[order][:, by_domain], 4).tolist(),
            }
        )
        products.append(mean_MR @ mean_MR.T)
        overlaps.append([jaccards(top_experts(mean_MR, max(1, mean_MR.shape[1] // part))) for part in _PARTS])
    similar = {"cosine of mean routing": cosines(np.sum(products, axis=0))}
    for index, part in enumerate(_PARTS):
        similar[f"overlap of subsets of 1/{part} of the experts"] = np.mean(
            [layer[index] for layer in overlaps], axis=0
        )
    ordered = [model.numbers.domains[place] for place in order]
    chosen = chosen_documents(model.statistics, documents_per_domain, ordered)
    return {
        "name": model.name,
        "source": model.statistics.settings["model"],
        "layers": model.statistics.layers,
        "picks": [model.statistics.picks(layer) for layer in model.statistics.layers],
        "numbers": [one.data() for one in model.numbers.numbers],
        "maps": maps,
        "similar": {
            name: np.round(matrix[np.ix_(order, order)], 3).tolist() for name, matrix in similar.items()
        },
        "clusters": _clusters(model.clusters, order),
        "shown": shown_documents(model.statistics, model.clusters, chosen),
    }


def domain_means(statistics: RoutingStatistics, domains: list[str], layer: int) -> np.ndarray:
    """The mean probabilities of each domain in a layer, (M, R).

    Args:
        statistics (`RoutingStatistics`): the statistics.
        domains (`list[str]`): the domains, in this order.
        layer (`int`): the layer.

    Example: see `page_content`.
    """
    place = {name: index for index, name in enumerate(domains)}
    domain_N = np.array([place[name] for name in statistics.documents()["domain"]])
    sum_MR = np.zeros((len(domains), len(statistics.experts(layer))))
    first = 0
    for part in statistics.parts():
        rows = statistics.layer_rows(part, layer)
        np.add.at(sum_MR, domain_N[first : first + len(rows.probability_NR)], rows.probability_NR)
        first += len(rows.probability_NR)
    return sum_MR / sum_MR.sum(-1, keepdims=True)


def _clusters(clusters: TokenClusters, order: list[int]) -> dict[str, Any]:
    number = len(clusters.cluster_S)
    some = np.random.default_rng(0).permutation(number)[:_PLANE_TOKENS]
    rank = np.argsort(order)
    return {
        "numbers": [one.data() for one in clusters.numbers],
        "composition": clusters.composition()[:, order].tolist(),
        "typical": [
            [list(pair) for pair in clusters.typical(cluster, 12)] for cluster in range(clusters.num_clusters)
        ],
        "plane": {
            "x": np.round(clusters.plane_S2[some, 0], 3).tolist(),
            "y": np.round(clusters.plane_S2[some, 1], 3).tolist(),
            "cluster": clusters.cluster_S[some].tolist(),
            "domain": rank[clusters.domain_S[some]].tolist(),
            "piece": [str(piece) for piece in clusters.piece_S[some]],
        },
    }
