"""A small page of two models, made once."""

import json

import pytest
from conftest import TOY
from transformers_emo.analysis import Measurement, Retention
from transformers_emo.analysis.clusters import cluster_tokens
from transformers_emo.analysis.numbers import routing_numbers
from transformers_emo.analysis.page import Shown, page_content, write_page
from transformers_emo.analysis.routing import documents_of, router_statistics


@pytest.fixture(scope="session")
def shown(tmp_path_factory):
    """Two names for one model; the second read half as much of each document."""
    models = []
    for name, window in (("toy", 48), ("twin", 24)):
        out = tmp_path_factory.mktemp(name)
        documents = documents_of(TOY / "documents")
        languages = {"python": "en"}
        statistics = router_statistics(
            TOY, documents, out, window=window, languages=languages, prefixes=(4, 8), progress=False
        )
        numbers = routing_numbers(statistics, num_draws=5, progress=False)
        models.append(
            Shown(name, statistics, numbers, cluster_tokens(statistics, num_clusters=5, num_draws=5))
        )
    return models


@pytest.fixture(scope="session")
def curve(shown):
    return Retention(
        Measurement(model, domain, "full" if share == 1 else method, share, int(32 * share),
                    None if share == 1 else 0, [3 + slope * (1 / share - 1) + place], [0], [1])
        for model, slope in (("toy", 0.05), ("twin", 0.3))
        for place, domain in enumerate(shown[0].numbers.domains)
        for method in ("layerwise", "random")
        for share in (1, 0.5, 0.25)
        if share < 1 or method == "layerwise"
    )  # fmt: skip


@pytest.fixture(scope="session")
def content(shown, curve):
    return json.loads(json.dumps(page_content(shown, curve, documents_per_domain=1)))


@pytest.fixture(scope="session")
def page_file(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(content, path, title="Toys & <twins>")
    return path
