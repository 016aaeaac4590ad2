"""Numbers with intervals: how they are put together and shown."""

import numpy as np
import pytest
from transformers_emo.analysis.numbers import Number, Sampled
from transformers_emo.analysis.numbers.domain_sums import DomainSums
from transformers_emo.analysis.numbers.draws import Draws


def test_intervals_of_a_mean_are_narrower_than_those_of_its_parts():
    rng = np.random.default_rng(0)
    layers = [Sampled(1.0, 1 + rng.normal(size=4000), rng.normal(size=50)) for _ in range(4)]
    one, mean = layers[0].number("x", 2), Sampled.mean(layers).number("x")
    assert one.high - one.low == pytest.approx(2 * 1.96, rel=0.05)
    assert mean.high - mean.low == pytest.approx(2 * 1.96 / 2, rel=0.05)
    assert (mean.layer, one.layer, mean.value) == (None, 2, 1.0)


def test_above_chance_is_0_at_chance_and_1_at_the_most():
    most = Sampled(3.0, np.full(3, 3.0))
    chance = np.array([0.9, 1.1])
    at_chance, at_most = (Sampled(v, np.full(3, v), chance).above_chance(most) for v in (1.0, 3.0))
    assert at_chance.value == pytest.approx(0) and at_most.value == pytest.approx(1)
    assert at_chance.number("x").chance == pytest.approx(0)


def test_numbers_are_shown_with_their_chance():
    number = Number("x", None, 0.1234, 0.1, 0.15, -0.00001, -0.1, 0.1, "%")
    assert str(number) == "12.3 [10.0, 15.0] %, by chance 0.0"
    assert number.data()["value"] == 0.1234 and "layer" not in number.data()


def test_draws_keep_the_number_of_documents_of_each_domain():
    domains = ["a"] * 3 + ["b"] * 5
    draws = Draws(domains, num=20, num_shuffled=4)
    assert draws.weight_WN[0].tolist() == [1] * 8
    assert draws.weight_WN[:, :3].sum(1).tolist() == [3] * 21
    assert all(sorted(row) == sorted(draws.domain_N) for row in draws.shuffled_CN)
    assert len({tuple(row) for row in draws.weight_WN}) > 10
    assert draws.first(2).weight_WN.tolist() == draws.weight_WN[:3].tolist()
    with pytest.raises(ValueError, match="at least 2, got .'a'"):
        Draws(["a", "a"])


def test_sums_are_the_same_in_any_number_of_parts():
    rng = np.random.default_rng(1)
    draws = Draws(list("abcabcabca"), num=5, num_shuffled=3)
    rows = rng.random((10, 4))
    whole, parts = DomainSums(draws, 4), DomainSums(draws, 4)
    whole.add(np.arange(10), rows)
    for places in np.split(np.arange(10), [3, 4]):
        parts.add(places, rows[places])
    for one, other in zip(whole.both(), parts.both(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)
    np.testing.assert_allclose(whole.drawn_WMR[0, 1], rows[[1, 4, 7]].sum(0))
    weight = draws.weight_WN[3]
    np.testing.assert_allclose(whole.drawn_WMR[3, 0], (weight[:, None] * rows)[[0, 3, 6, 9]].sum(0))
    np.testing.assert_allclose(whole.shuffled_CMR[1, 2], rows[draws.shuffled_CN[1] == 2].sum(0))
