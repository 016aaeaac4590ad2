"""Clusters of tokens: planted directions are found, and the numbers say what they follow."""

import numpy as np
import pytest
from conftest import TOY
from sklearn.metrics import adjusted_mutual_info_score
from transformers_emo.analysis.clusters import cluster_tokens
from transformers_emo.analysis.clusters.cluster_numbers import cluster_numbers
from transformers_emo.analysis.clusters.spherical import nearest, spherical_k_means
from transformers_emo.analysis.numbers.draws import Draws
from transformers_emo.analysis.routing import documents_of, router_statistics


def planted(rng, clusters=4, tokens=100, size=6):
    centres = np.linalg.qr(rng.normal(size=(size, size)))[0][:clusters]
    label = np.repeat(np.arange(clusters), tokens)
    vectors = centres[label] + 0.1 * rng.normal(size=(len(label), size))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), label


def test_planted_directions_are_found_whatever_the_length_of_vectors():
    vectors, label = planted(np.random.default_rng(0))
    cluster, centres = spherical_k_means(vectors, 4)
    assert adjusted_mutual_info_score(cluster, label) == pytest.approx(1)
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 1)
    assert (nearest(5 * vectors, centres) == cluster).all()


def test_no_cluster_is_better_for_any_token():
    vectors, _ = planted(np.random.default_rng(1), clusters=5)
    cluster, centres = spherical_k_means(vectors, 7)
    assert (cluster == (vectors @ centres.T).argmax(1)).all()
    for one in range(7):
        mean = vectors[cluster == one].sum(0)
        np.testing.assert_allclose(centres[one], mean / np.linalg.norm(mean), rtol=1e-6)


def test_too_few_tokens_are_refused():
    with pytest.raises(ValueError, match="2 tokens for 3 clusters"):
        spherical_k_means(np.eye(2), 3)


@pytest.fixture
def grouped():
    """Clusters that are the domains exactly, and tokens that have nothing to do with them."""
    rng = np.random.default_rng(2)
    document = np.repeat(np.arange(40), 20)
    draws = Draws([f"d{i % 4}" for i in range(40)], num=20)
    cluster = draws.domain_N[document].astype(np.int64)
    labels = {
        "domain": cluster,
        "token": rng.integers(0, 50, len(cluster)),
        "part_of_speech": np.full(len(cluster), None),
    }
    return cluster, labels, draws, document


def test_numbers_tell_domains_from_tokens(grouped):
    cluster, labels, draws, document = grouped
    vectors = np.eye(4)[cluster] + 0.01
    found = {one.name: one for one in cluster_numbers(cluster, labels, draws, document, vectors, cluster)}
    assert found["purity, domain"].value == 1 and found["purity, domain"].chance < 0.4
    assert found["agreement with domain"].value == pytest.approx(1)
    assert found["domains in a cluster"].value == 0 and found["domains in a cluster"].chance > 0.9
    assert abs(found["agreement with token"].value) < 0.05
    assert found["silhouette"].value == pytest.approx(1, abs=1e-6) and found["silhouette"].chance < 0.1
    assert "agreement with part of speech" not in found


def test_agreement_is_that_of_scikit_learn(grouped):
    cluster, labels, draws, document = grouped
    rng = np.random.default_rng(3)
    cluster = np.where(rng.random(len(cluster)) < 0.3, rng.integers(0, 4, len(cluster)), cluster)
    found = {
        one.name: one
        for one in cluster_numbers(cluster, labels, draws, document, np.eye(4)[cluster], cluster)
    }
    exact = adjusted_mutual_info_score(labels["domain"], cluster)
    assert found["agreement with domain"].value == pytest.approx(exact, abs=0.01)


@pytest.fixture(scope="module")
def clusters(tmp_path_factory):
    out = tmp_path_factory.mktemp("statistics")
    documents = documents_of(TOY / "documents")
    statistics = router_statistics(
        TOY, documents, out, window=64, vectors_per_document=40, documents_per_part=16, progress=False
    )
    return statistics, cluster_tokens(statistics, num_clusters=6, max_tokens=600, num_draws=10)


def test_every_token_with_probabilities_has_a_cluster(clusters):
    statistics, found = clusters
    assert len(found.cluster_S) == statistics.num_documents * 40
    counts = np.bincount(found.cluster_S)
    assert found.num_clusters == 6 and (np.diff(counts) <= 0).all()  # the largest first
    assert found.composition().sum(1).tolist() == counts.tolist()
    assert found.plane_S2.shape == (len(found.cluster_S), 2)
    assert found.position_S.max() == 39


def test_typical_pieces_are_of_the_cluster(clusters):
    _, found = clusters
    for cluster in range(found.num_clusters):
        own = found.piece_S[found.cluster_S == cluster].tolist()
        typical = found.typical(cluster, 3)
        assert typical and all(own.count(piece) == number for piece, number in typical)


def test_clusters_are_the_same_again(clusters):
    statistics, found = clusters
    again = cluster_tokens(statistics, num_clusters=6, max_tokens=600, num_draws=10)
    assert (again.cluster_S == found.cluster_S).all()
