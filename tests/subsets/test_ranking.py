"""Which experts scores keep, and how a budget is shared."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers_emo.subsets.ranking import best_experts, jaccard, sizes_by_mass

SCORES = st.lists(st.floats(0, 1), min_size=6, max_size=6)


@given(SCORES, st.sets(st.integers(0, 5), max_size=2), st.integers(3, 6))
def test_no_expert_left_out_is_better_than_one_kept(scores, always, size):
    kept = best_experts(scores, always, size)
    assert kept == sorted(set(kept)) and len(kept) == size and always <= set(kept)
    for out in set(range(6)) - set(kept):
        assert all((scores[e], -e) > (scores[out], -out) for e in set(kept) - always)
    assert set(best_experts(scores, always, size - 1)) < set(kept)


@given(st.lists(st.one_of(st.none(), SCORES), min_size=1, max_size=5), st.integers(2, 6), st.integers(1, 5))
def test_a_budget_is_spent_whole_on_the_largest_shares(scores, size, least):
    least = min(least, size - 1)
    always = [None if layer is None else [5] for layer in scores]
    sizes = sizes_by_mass(scores, always, size, least)
    with_experts = [i for i, layer in enumerate(scores) if layer is not None]
    assert sum(sizes) == size * len(with_experts)
    assert all(sizes[i] == 0 for i in range(len(scores)) if i not in with_experts)
    assert all(1 + least <= sizes[i] <= 6 for i in with_experts)
    shares = {}
    for i in with_experts:
        total = sum(scores[i][:5]) or 1.0
        shares[i] = sorted((score / total for score in scores[i][:5]), reverse=True)
    for i in with_experts:  # the worst that a layer keeps freely is no worse than the best another leaves out
        for j in with_experts:
            if sizes[i] - 1 > least and sizes[j] - 1 < 5:
                assert shares[i][sizes[i] - 2] >= shares[j][sizes[j] - 1]


def test_jaccard_is_the_mean_over_layers_with_experts():
    assert jaccard([[0, 1], None], [[0, 1], None]) == 1
    assert jaccard([[0, 1, 2], None, [5]], [[2, 3, 4], None, [6]]) == pytest.approx(0.1)
    assert jaccard([None], [None]) == jaccard([[]], [[]]) == 1
