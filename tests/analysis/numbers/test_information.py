"""What labels tell of experts: planted dependence is found, and none is found where there is none."""

import numpy as np
import pytest
from transformers_emo.analysis.numbers.information import Picks, information


def picks_of(expert_S, picks=1):
    expert_SK = np.stack([expert_S] * picks, 1) if picks > 1 else expert_S[:, None]
    return Picks(expert_SK, np.ones((3, len(expert_S))))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_a_label_that_is_the_expert_tells_all(rng):
    expert = rng.integers(0, 8, 4000)
    told, most = information(picks_of(expert), expert)
    assert told.value == pytest.approx(3, abs=0.01) and most.value == pytest.approx(told.value)
    assert told.above_chance(most).value == pytest.approx(1)


def test_an_independent_label_tells_what_chance_does(rng):
    expert, label = rng.integers(0, 8, 4000), rng.integers(0, 50, 4000)
    told, most = information(picks_of(expert), label)
    assert told.value > 0.04  # of few tokens, and not 0
    assert told.value == pytest.approx(float(told.chance_C.mean()), abs=0.01)
    assert abs(told.above_chance(most).value) < 0.01


def test_half_of_a_choice(rng):
    """The label tells one bit of two, by the exact formula."""
    label, coin = rng.integers(0, 2, 40000), rng.integers(0, 2, 40000)
    told, most = information(picks_of(2 * label + coin), label)
    assert told.above_chance(most).value == pytest.approx(0.5, abs=0.005)


def test_given_tokens_a_domain_that_only_has_its_own_tokens_tells_nothing(rng):
    """Words, not topics: the expert follows the token, and the domain is known by its tokens."""
    domain = rng.integers(0, 4, 8000)
    token = 5 * domain + rng.integers(0, 5, 8000)
    expert = (token * 7) % 16
    alone, _ = information(picks_of(expert), domain)
    beyond, most = information(picks_of(expert), domain, token)
    assert alone.value > 1
    assert beyond.value == pytest.approx(0, abs=1e-9) and most.value == pytest.approx(0, abs=1e-9)


def test_topics_tell_beyond_tokens_and_tokens_nothing_beyond_topics(rng):
    domain, token = rng.integers(0, 4, 20000), rng.integers(0, 10, 20000)
    expert = 2 * domain + rng.integers(0, 2, 20000)
    topics, most = information(picks_of(expert), domain, token)
    words, most_left = information(picks_of(expert), token, domain)
    assert topics.above_chance(most).value == pytest.approx(2 / 3, abs=0.01)
    assert abs(words.above_chance(most_left).value) < 0.005


def test_several_picks_of_a_token_are_several_draws(rng):
    expert, label = rng.integers(0, 8, 500), rng.integers(0, 3, 500)
    one, three = (information(picks_of(expert, picks), label)[0].value for picks in (1, 3))
    assert one == pytest.approx(three)


def test_documents_drawn_twice_count_twice(rng):
    expert, label = rng.integers(0, 4, 200), rng.integers(0, 3, 200)
    weight = rng.integers(0, 3, 200)
    picks = Picks(expert[:, None], np.stack([np.ones(200), weight]))
    repeated = np.repeat(np.arange(200), weight)
    exact = information(picks_of(expert[repeated]), label[repeated])[0].value
    assert information(picks, label)[0].again_W[0] == pytest.approx(exact)
