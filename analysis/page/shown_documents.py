"""The documents that a page shows token by token, with their clusters and the experts they take.

Shape suffixes: N documents, R routed experts of a layer, T tokens of a document, K experts that a token
picks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..clusters import TokenClusters
from ..routing import RoutingStatistics


def chosen_documents(statistics: RoutingStatistics, per_domain: int, domains: list[str]) -> list[int]:
    """The first test documents of each domain; calibration documents where there are no others.

    Args:
        statistics (`RoutingStatistics`): the statistics.
        per_domain (`int`): how many of each domain.
        domains (`list[str]`): the domains, in the order of the result.

    Example: see `shown_documents`.
    """
    table = statistics.documents()
    rank = np.array([domains.index(domain) for domain in table["domain"]])
    order = np.lexsort((table["document"], table["split"] != "test", rank))
    taken: dict[str, int] = {}
    found = []
    for place in order:
        domain = table["domain"][place]
        if taken.get(domain, 0) < per_domain:
            taken[domain] = taken.get(domain, 0) + 1
            found.append(int(place))
    return found


def shown_documents(
    statistics: RoutingStatistics, clusters: TokenClusters, documents: list[int]
) -> list[dict[str, Any]]:
    """What a page says of some documents, as JSON data.

    Args:
        statistics (`RoutingStatistics`): the statistics.
        clusters (`TokenClusters`): the clusters of its tokens.
        documents (`list[int]`): the documents' places.

    Returns:
        `list[dict[str, Any]]`: for each document its `domain`, its first tokens as `pieces` with their
        `clusters`,
            and for each layer the `picks` of each token, places in the list of the layer's experts, the most
            probable one first, and the document's mean probabilities `mean` in thousandths.

    Example:

    ```python
    >>> from transformers_emo.analysis.clusters import cluster_tokens
    >>> from transformers_emo.analysis.page.shown_documents import chosen_documents, shown_documents
    >>> from transformers_emo.analysis.routing import documents_of, router_statistics
    >>> documents = documents_of("model_cards/toy-emo/documents")
    >>> statistics = router_statistics("model_cards/toy-emo", documents, tmp_path, window=64, progress=False)
    >>> clusters = cluster_tokens(statistics, num_clusters=4)
    >>> shown = shown_documents(statistics, clusters, chosen_documents(statistics, 1, clusters.domains))
    >>> len(shown[0]["pieces"]), len(shown[0]["picks"]), len(shown[0]["picks"][0][0])
    (64, 4, 3)

    ```
    """
    table = statistics.documents()
    found: dict[int, dict[str, Any]] = {}
    names = ["document", "position", "piece", *(f"picks_{layer}" for layer in statistics.layers)]
    for part in np.unique(table["part"][documents]):
        tokens = statistics.tokens(int(part), names)
        rows = [statistics.layer_rows(int(part), layer) for layer in statistics.layers]
        first = int(np.flatnonzero(table["part"] == part)[0])
        for document in (one for one in documents if table["part"][one] == part):
            own_T = np.flatnonzero(tokens["document"] == table["document"][document])
            own_T = own_T[tokens["position"][own_T] < statistics.settings["vectors_per_document"]]
            in_clusters = clusters.document_S == table["document"][document]
            length = max(int(table["tokens"][document]), 1)
            found[document] = {
                "domain": str(table["domain"][document]),
                "document": int(table["document"][document]),
                "pieces": [str(piece) for piece in tokens["piece"][own_T]],
                "clusters": clusters.cluster_S[in_clusters].tolist(),
                "picks": [tokens[f"picks_{layer}"][own_T].tolist() for layer in statistics.layers],
                "mean": [
                    np.rint(1000 * layer.probability_NR[document - first] / length).astype(int).tolist()
                    for layer in rows
                ],
            }
    return [found[document] for document in documents]
