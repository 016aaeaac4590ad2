"""Subsets from subsets: the laws of sets hold, shared experts stay, and scores are mixed as said."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers_emo import EmoConfig, ExpertSubset, SubsetError, mix, select_experts, subset_overlap
from transformers_emo.subsets import difference, intersection, read_subsets, subset_config, union

EXPERTS, SHARED = 9, 2
CONFIG = EmoConfig(
    num_hidden_layers=3,
    num_experts=EXPERTS,
    num_experts_per_tok=4,
    num_shared_experts=SHARED,
    num_experts_per_layer=[EXPERTS, 0, EXPERTS],
    dense_intermediate_size=16,
)
STAY = list(range(EXPERTS - SHARED, EXPERTS))


@st.composite
def subsets(draw, scored: bool = True) -> ExpertSubset:
    """A subset of the model above, of any sizes, with scores in every expert layer or without."""
    routed = st.sets(st.integers(0, EXPERTS - SHARED - 1), min_size=1)
    experts = [sorted(draw(routed)) + STAY, None, sorted(draw(routed)) + STAY]
    score = st.lists(st.floats(0, 1), min_size=EXPERTS, max_size=EXPERTS)
    scores = [draw(score), None, draw(score)] if scored and draw(st.booleans()) else None
    return ExpertSubset(experts, scores=scores).for_model(CONFIG)


@given(subsets(), subsets(), subsets())
def test_set_operations_obey_the_laws_of_sets(a, b, c):
    assert (a | b).experts == (b | a).experts and (a & b).experts == (b & a).experts
    assert ((a | b) | c).experts == (a | (b | c)).experts == union(a, b, c).experts
    assert ((a & b) & c).experts == (a & (b & c)).experts == intersection(a, b, c).experts
    assert (a | a).experts == a.experts == (a & a).experts
    assert (a & (b | c)).experts == ((a & b) | (a & c)).experts
    assert ((a - b) | (a & b)).experts == a.experts
    assert (a - (b | c)).experts == ((a - b) - c).experts


@given(subsets(), subsets())
def test_shared_experts_stay_and_dense_layers_stay_dense(a, b):
    for result in (a | b, a & b, a - b):
        assert result.experts[1] is None
        for layer in (0, 2):
            assert result.experts[layer][-SHARED:] == STAY
        if all(len(result.experts[layer]) > SHARED for layer in (0, 2)):
            subset_config(CONFIG, result.for_model(CONFIG))  # a model of it can be made


@given(subsets(), subsets())
def test_a_result_has_scores_for_its_own_experts_or_none(a, b):
    for result, scored in ((a | b, [a, b]), (a & b, [a, b]), (a - b, [a])):
        assert (result.scores is None) == any(subset.scores is None for subset in scored)
        for ids, scores in zip(result.experts, result.scores or (), strict=False):
            assert ids is None or [e for e, s in enumerate(scores) if s is not None] == ids


@given(subsets().filter(lambda s: s.scores), subsets().filter(lambda s: s.scores), st.integers(3, EXPERTS))
def test_a_mix_keeps_the_largest_weighted_means(a, b, size):
    mixed = mix([a, b], size, weights=[3, 1])
    for layer in (0, 2):
        shares = []
        for subset in (a, b):
            routed = subset.scores[layer][:-SHARED]
            total = math.fsum(routed) or 1.0
            shares.append([score / total for score in routed])
        means = [0.75 * x + 0.25 * y for x, y in zip(*shares, strict=True)]
        kept = mixed.experts[layer]
        assert kept[-SHARED:] == STAY and len(kept) == size
        left_out = [means[e] for e in range(EXPERTS - SHARED) if e not in kept]
        assert min(means[e] for e in kept[:-SHARED]) >= max(left_out, default=0.0) - 1e-12
    assert mixed.top(size) == mixed
    only_first = mix([a, b], size, weights=[1, 0])
    assert only_first.experts == mix([a], size).experts


def test_a_union_of_chosen_subsets_is_cut_by_their_scores(make_model):
    model = make_model()
    a, b = (select_experts(model, num_experts=6, method="random", seed=seed) for seed in (1, 2))
    cut = (a | b).top(5)
    for index, ids in enumerate(cut.experts):
        assert set(ids) <= {*a.experts[index], *b.experts[index]} and len(ids) == 5 and 11 in ids
    assert cut.for_model(model.config).experts == cut.experts
    sizes = [len(ids) for ids in (a | b).experts]
    with pytest.raises(SubsetError, match=f"Cannot keep 12 experts in layer 0: it has scores of {sizes[0]}"):
        (a | b).top(12)


def test_results_say_where_they_come_from():
    a = ExpertSubset([[0, 2]], num_tokens=10, num_texts=1, source="me/emo", revision="a")
    b = ExpertSubset([[1, 2]], num_tokens=5, source="me/emo", revision="b")
    both = a | b
    assert (both.method, both.num_tokens, both.num_texts) == ("union", 15, None)
    assert (both.source, both.revision) == ("me/emo", None)


def test_subsets_of_models_with_different_names_are_warned_of(caplog):
    union(ExpertSubset([[0]], source="a/emo"), ExpertSubset([[1]], source="/models/emo/"))
    assert not caplog.records
    union(ExpertSubset([[0]], source="a/emo"), ExpertSubset([[1]], source="a/std"))
    assert "Ids mean nothing in another model" in caplog.text


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (ExpertSubset([[0]]), ExpertSubset([[0], [1]]), "1 and 2 layers"),
        (ExpertSubset([[0], None]), ExpertSubset([[0], [1]]), "Layer 1 is dense"),
        (ExpertSubset([[0]], local_ids=True), ExpertSubset([[0]]), "numbering of a model that was pruned"),
        (
            ExpertSubset([[0]], root_experts_per_layer=[4]),
            ExpertSubset([[0]], root_experts_per_layer=[8]),
            "different sizes",
        ),
        (ExpertSubset([[0]], always_kept=[[0]]), ExpertSubset([[0]], always_kept=[[1]]), "shared or always"),
    ],
)
def test_subsets_of_different_models_are_refused(a, b, message):
    for operation in (union, intersection, difference):
        with pytest.raises(SubsetError, match=message):
            operation(a, b)


def test_a_difference_must_know_the_shared_experts():
    with pytest.raises(SubsetError, match="does not know which experts are shared"):
        ExpertSubset([[0, 1, 7]]) - ExpertSubset([[1, 7]])
    dropped = ExpertSubset([[0, 1, 7]], drop_shared=True) - ExpertSubset([[1, 7]])
    assert dropped.experts == [[0]]


def test_other_things_are_no_operands():
    for operation in ("__or__", "__and__", "__sub__"):
        assert getattr(ExpertSubset([[0]]), operation)([[0]]) is NotImplemented


@pytest.mark.parametrize("weights", [[1], [1, -1], [0, 0], [1, math.nan], [1, math.inf], [1, "1"]])
def test_weights_that_do_not_fit_are_refused(weights):
    scored = ExpertSubset([[0, 1]], scores=[[0.5, 1.0]], always_kept=[[1]])
    with pytest.raises(SubsetError, match="expected 2 finite numbers"):
        mix([scored, scored], 2, weights)


def test_only_scores_can_be_mixed():
    scored = ExpertSubset([[0, 1]], scores=[[0.5, 1.0]], always_kept=[[1]])
    with pytest.raises(SubsetError, match="Subset 1 has no scores"):
        mix([scored, ExpertSubset([[0, 1]])], 2)
    with pytest.raises(SubsetError, match="Cannot keep 3 experts"):
        mix([scored, scored], 3)
    with pytest.raises(SubsetError, match="at least one"):
        mix([], 3)


@given(st.lists(subsets(), min_size=2, max_size=4))
def test_overlap_is_symmetric_and_one_with_itself(chosen):
    overlap = subset_overlap({str(number): subset for number, subset in enumerate(chosen)})
    for i, row in enumerate(overlap.jaccard_NN):
        assert row[i] == 1.0
        assert all(0 <= value <= 1 and value == overlap.jaccard_NN[j][i] for j, value in enumerate(row))
    pairs = [row[j] for i, row in enumerate(overlap.jaccard_NN) for j in range(len(row)) if i != j]
    assert overlap.mean == pytest.approx(sum(pairs) / len(pairs))


def test_overlap_of_a_folder_leaves_shared_experts_out(tmp_path):
    for name, ids in (("code", [0, 1]), ("math", [1, 2]), ("law", [5])):
        ExpertSubset([ids + STAY, None, ids + STAY]).for_model(CONFIG).save(tmp_path / f"{name}.json")
    overlap = subset_overlap(tmp_path)
    assert overlap.names == ["code", "law", "math"]
    assert overlap.jaccard_NN == [[1, 0, 1 / 3], [0, 1, 0], [1 / 3, 0, 1]]


def test_folders_without_subsets_are_refused(tmp_path):
    with pytest.raises(SubsetError, match="no expert subsets"):
        read_subsets(tmp_path)
    ExpertSubset([[0]]).save(tmp_path / "one.json")
    with pytest.raises(SubsetError, match="at least 2"):
        subset_overlap(tmp_path)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(SubsetError, match=r"index\.json"):
        read_subsets(tmp_path)
