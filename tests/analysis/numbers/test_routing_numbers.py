"""The numbers of a model, against plain computations from the parquet files."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import TOY
from transformers_emo.analysis.numbers import routing_numbers
from transformers_emo.analysis.routing import Document, documents_of, router_statistics

SETTINGS = {"window": 64, "prefixes": (8, 16), "progress": False}


def made(out, **changes):
    documents = documents_of(TOY / "documents")
    settings = {"documents_per_part": 16} | SETTINGS | changes
    return router_statistics(TOY, documents, out, **settings)


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    return made(tmp_path_factory.mktemp("statistics"), languages={"python": "en"})


@pytest.fixture(scope="module")
def numbers(statistics):
    return routing_numbers(statistics, num_draws=30, progress=False)


@pytest.fixture(scope="module")
def table(statistics):
    """All documents and layers as pandas reads them."""
    files = sorted(statistics.folder.glob("documents-*.parquet"))
    return pd.concat([pd.read_parquet(file) for file in files])


def means(table, layer):
    rows = (
        table[table.layer == layer].groupby("domain").probability.apply(lambda lists: np.stack(lists).sum(0))
    )
    mean = np.stack(rows.tolist())
    return mean / mean.sum(1, keepdims=True)


def pairs(matrix):
    return matrix[np.triu_indices(len(matrix), 1)].mean()


def test_profiles(numbers, table):
    for layer in range(4):
        mean = means(table, layer)
        exact = {
            "coverage": (mean > 1 / 31).sum(1).mean(),
            "domain entropy": -(mean * np.log2(mean)).sum(1).mean(),
            "topic cosine": pairs(cosine(mean)),
        }
        for name, value in exact.items():
            assert numbers.by_layer(name)[layer].value == pytest.approx(value)
    mean = np.concatenate([means(table, layer) for layer in range(4)], axis=1)
    assert numbers["topic cosine"].value == pytest.approx(pairs(cosine(mean)))
    np.testing.assert_allclose(numbers.matrices["topic cosine"], cosine(mean))
    each = table.entropy / table.tokens  # documents of a domain have the same number of tokens here
    assert set(table.tokens) == {64}
    assert numbers["token entropy"].value == pytest.approx(each.groupby(table.domain).mean().mean())


def test_subset_overlap(numbers, table):
    tops = [set(np.argsort(-row)[:3]) for row in means(table, 2)]
    exact = [len(a & b) / len(a | b) for i, a in enumerate(tops) for b in tops[i + 1 :]]
    assert numbers.by_layer("subset overlap")[2].value == pytest.approx(np.mean(exact))


def test_held_out_coverage(numbers, table):
    rows = table[table.layer == 1]
    own, other = [], []
    best = {
        domain: np.argsort(-np.stack(part.probability.tolist()).sum(0))[:7]
        for domain, part in rows[rows.split == "calibration"].groupby("domain")
    }
    for domain, part in rows[rows.split == "test"].groupby("domain"):
        picks = np.stack(part.picks.tolist()).sum(0)
        own.append(picks[best[domain]].sum() / picks.sum())
        other.append(np.mean([picks[best[name]].sum() / picks.sum() for name in best if name != domain]))
    found = numbers.by_layer("held-out coverage, 1/4 of the experts, own domain")[1]
    assert found.value == pytest.approx(np.mean(own)) and found.chance == pytest.approx(7 / 31)
    found = numbers.by_layer("held-out coverage, 1/4 of the experts, other domains")[1]
    assert found.value == pytest.approx(np.mean(other))


def test_pool_stability(numbers, table):
    rows = table[table.layer == 3]
    alike = {}
    for _, row in rows.iterrows():
        first = row.prefix_probability.reshape(2, 31)[1].astype(np.float64)
        a, b = (set(np.argsort(-sums)[:7]) for sums in (first, row.probability - first))
        alike.setdefault(row.domain, []).append(len(a & b) / len(a | b))
    found = numbers.by_layer("pool stability, 16 tokens")[3]
    assert found.value == pytest.approx(np.mean([np.mean(values) for values in alike.values()]))
    assert found.chance < found.low  # another domain's document has other experts


def test_every_number_has_an_interval_and_a_chance(numbers):
    for number in numbers.numbers:
        assert number.low <= number.value <= number.high
        if "token entropy" not in number.name:
            assert number.chance_low <= number.chance <= number.chance_high
    assert numbers["topic cosine"].high < numbers["topic cosine"].chance_low
    assert numbers["domain"].low > 0 and "part of speech" in numbers


def test_parts_do_not_change_the_numbers(numbers, tmp_path):
    other = made(tmp_path, documents_per_part=5, languages={"python": "en"})
    again = routing_numbers(other, num_draws=30, progress=False)
    for one, same in zip(numbers.numbers, again.numbers, strict=True):
        assert one.name == same.name
        assert same.value == pytest.approx(one.value, rel=1e-9, abs=1e-9)


def test_a_limit_of_tokens_takes_them_evenly(statistics, tmp_path):
    from transformers_emo.analysis.numbers.draws import Draws
    from transformers_emo.analysis.numbers.tokens_kept import kept_tokens

    draws = Draws(statistics.documents()["domain"], num=2)
    all_tokens, some = kept_tokens(statistics, draws), kept_tokens(statistics, draws, max_tokens=500)
    assert 400 < len(some.document_S) <= 500
    assert some.document_S.tolist() == all_tokens.document_S[:: some.stride].tolist()
    whole, part = (tokens.picks(2, draws).expert_SK for tokens in (all_tokens, some))
    assert part.tolist() == whole[:: some.stride].tolist()


def test_a_document_without_tokens_moves_no_other(tmp_path):
    from transformers_emo.analysis.clusters import cluster_tokens

    documents = list(documents_of(TOY / "documents"))[::5]
    domains = {document.domain for document in documents}
    assert len(domains) > 1
    with_empty = [Document("", "empty"), *documents]
    found = [
        router_statistics(TOY, texts, tmp_path / name, **SETTINGS)
        for name, texts in (("all", documents), ("empty", with_empty))
    ]
    assert found[1].documents()["document"].tolist() == list(range(1, len(documents) + 1))
    plain, empty = (routing_numbers(one, num_draws=3, progress=False) for one in found)
    assert [one.value for one in empty.numbers] == pytest.approx([one.value for one in plain.numbers])
    plain, empty = (cluster_tokens(one, num_clusters=4, num_draws=3) for one in found)
    assert empty.domain_S.tolist() == plain.domain_S.tolist()


def test_numbers_are_saved_and_shown(numbers, tmp_path):
    numbers.save(tmp_path / "numbers.json")
    data = json.loads((tmp_path / "numbers.json").read_text())
    assert data["domains"] == numbers.domains and len(data["numbers"]) == len(numbers.numbers)
    cosine_line = next(line for line in numbers.markdown().splitlines() if line.startswith("| topic cosine"))
    assert numbers["topic cosine"].text("value") in cosine_line


def test_documents_of_one_split_have_no_coverage(tmp_path):
    rows = [{"text": "import os", "domain": d, "split": "test"} for d in ("a", "b")]
    found = router_statistics(TOY, documents_of(rows), tmp_path, **SETTINGS)
    numbers = routing_numbers(found, num_draws=3, progress=False)
    assert not any("coverage," in one.name for one in numbers.numbers)


def cosine(rows):
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T
