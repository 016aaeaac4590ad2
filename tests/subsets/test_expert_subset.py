"""`ExpertSubset` as data: what it accepts, what it refuses, and how subsets of subsets compose."""

import json
import math
import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers_emo import EmoConfig, ExpertSubset, SubsetError
from transformers_emo.subsets import local_experts, subset_config


def config_of(**changes) -> EmoConfig:
    defaults = {"num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 4, "num_shared_experts": 1}
    return EmoConfig(**defaults | changes)


def subsets_of(size: int, shared: int, layers: int = 2):
    """Valid subsets: at least one routed expert and all shared ones in each layer."""
    routed = st.sets(st.integers(0, size - shared - 1), min_size=1)
    layer = routed.map(lambda ids: sorted(ids) + list(range(size - shared, size)))
    return st.lists(layer, min_size=layers, max_size=layers)


@settings(deadline=None)
@given(
    subsets_of(8, 1),
    st.none() | st.text(max_size=5),
    st.none() | st.integers(0, 10**9),
)
def test_json_round_trip_keeps_everything(tmp_path_factory, experts, method, num_tokens):
    scores = [[0.5, None] * 4, None]
    subset = ExpertSubset(experts, scores=scores, method=method, num_tokens=num_tokens, source="me/emo")
    path = tmp_path_factory.mktemp("subset") / "subset.json"
    subset.save(path)
    assert ExpertSubset.load(path) == subset
    assert os.listdir(path.parent) == ["subset.json"]


def test_ids_are_sorted_and_plain_integers():
    np = pytest.importorskip("numpy")
    assert json.dumps(ExpertSubset([np.array([5, 2, 7]).tolist(), (7, 1)]).experts) == "[[2, 5, 7], [1, 7]]"
    assert ExpertSubset([[np.int64(3)], {9, 2}]).experts == [[3], [2, 9]]
    assert ExpertSubset.of(np.array([[5, 1], [2, 3]])).experts == [[1, 5], [2, 3]]


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([[1, 1]], "names expert 1 twice"),
        ([[-1, 2]], "names expert -1"),
        ([[1.5]], "names expert 1.5"),
        ([[True]], "names expert True"),
        ([["3"]], "names expert '3'"),
        ([1, 2], "Expected one list of expert ids a layer"),
        ("01", "Expected one list of expert ids a layer"),
    ],
)
def test_malformed_ids_are_refused(experts, message):
    with pytest.raises(SubsetError, match=re.escape(message)):
        ExpertSubset(experts)


@pytest.mark.parametrize(
    ("scores", "always_kept", "message"),
    [
        ([0.1, math.nan, 0.2, 1.0], [3], "The score of expert 1 in layer 0 is nan"),
        ([0.1, math.inf, 0.2, 1.0], [3], "The score of expert 1 in layer 0 is inf"),
        ([0.1, "a", 0.2, 1.0], [3], "The score of expert 1 in layer 0 is 'a'"),
        ([0.1, True, 0.2, 1.0], [3], "The score of expert 1 in layer 0 is True"),
        ([0.1, 0.2], [3], "has scores of 2 experts and keeps expert 3"),
        ([0.1, 0.2, 0.3, 1.0], [9], "has scores of 4 experts and keeps expert 9"),
        (0.3, [3], "The scores of layer 0 are 0.3"),
        ([0.1, 0.2, 0.3, 1.0], ["3"], "names expert '3'"),
        ([0.1, 0.2, 0.3, 1.0], [3, 3], "names expert 3 twice"),
    ],
)
def test_scores_that_cannot_be_ranked_are_refused(scores, always_kept, message):
    with pytest.raises(SubsetError, match=re.escape(message)):
        ExpertSubset([[0, 3]], scores=[scores], always_kept=[always_kept])


@pytest.mark.parametrize("size", [2.0, "2", True, None])
def test_a_choice_by_score_takes_an_integer(size):
    scored = ExpertSubset([[0, 3]], scores=[[0.1, 0.2, None, 1.0]], always_kept=[[3]])
    with pytest.raises(SubsetError, match="expected an integer"):
        scored.top(size)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "does not hold JSON"),
        ("[1, 2", "does not hold JSON"),
        ("[[1, 7]]", "Expected an object"),
        ('{"kept": []}', "Found neither"),
        ('{"experts": [[1]], "version": 2}', "version 2"),
        ('{"experts": [[1]], "format": "other"}', "'other'"),
        ('{"experts": [[1]], "colour": 3}', "Unknown keys ['colour']"),
        ('{"experts": [[1]], "drop_shared": "no"}', "`drop_shared` is 'no', expected true or false"),
        ('{"experts": [[1]], "root_experts_per_layer": 32}', "`root_experts_per_layer` is 32"),
        ('{"experts": [[1]], "scores": 3}', "`scores` is 3"),
    ],
)
def test_files_that_are_no_subsets_are_refused_with_their_name(tmp_path, content, message):
    path = tmp_path / "math.json"
    path.write_text(content)
    with pytest.raises(SubsetError, match=re.escape(message)) as error:
        ExpertSubset.load(path)
    assert "math.json" in str(error.value)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(SubsetError, match="no file .*none.json"):
        ExpertSubset.of(tmp_path / "none.json")
    with pytest.raises(SubsetError, match="No such file"):
        ExpertSubset.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([[0, 7]], "has 1 layers, the model 2"),
        ([[0, 7], [0, 8]], "Layer 1 has no expert 8: expected ids from 0 to 7"),
        ([[0, 7], [0, 1]], "drops expert 7 of layer 1"),
        ([[0, 7], [7]], "keeps no routed expert in layer 1"),
        ([[0, 7], None], "Layer 1 of the model is not dense"),
        ([[0, 7], []], "drops expert 7 of layer 1"),
    ],
)
def test_subsets_that_do_not_fit_are_refused(experts, message):
    with pytest.raises(SubsetError, match=re.escape(message)):
        ExpertSubset(experts).for_model(config_of())


def test_subset_of_a_model_of_another_size_is_refused():
    made_for = ExpertSubset([[0, 7], [0, 7]]).for_model(config_of())
    with pytest.raises(SubsetError, match="made for another model"):
        made_for.for_model(config_of(num_experts=16))


def test_dense_layers_have_none():
    config = config_of(num_experts_per_layer=[0, 8], dense_intermediate_size=16)
    assert ExpertSubset([None, [1, 7]]).for_model(config).experts == [None, [1, 7]]
    assert subset_config(config, ExpertSubset([None, [1, 7]]).for_model(config)).num_experts_per_layer == [
        0,
        2,
    ]
    with pytest.raises(SubsetError, match="Layer 0 of the model is dense"):
        ExpertSubset([[1, 7], [1, 7]]).for_model(config)


def test_shared_experts_can_be_dropped_by_saying_so():
    config = config_of(num_shared_experts=2)
    subset = ExpertSubset([[0, 1, 7], [2, 3, 7]], drop_shared=True).for_model(config)
    assert subset_config(config, subset).num_shared_experts == 1


def test_always_active_experts_are_kept_and_renumbered():
    config = config_of(num_shared_experts=0, always_active_experts=[5, 2])
    with pytest.raises(SubsetError, match="drops expert 2 of layer 0"):
        ExpertSubset([[0, 5], [0, 2, 5]]).for_model(config)
    same = subset_config(config, ExpertSubset([[1, 2, 5], [0, 2, 5]]).for_model(config))
    assert same.always_active_experts == [2, 1] and same.always_active_experts_per_layer is None
    differ = subset_config(config, ExpertSubset([[1, 2, 5], [0, 1, 2, 5]]).for_model(config))
    assert differ.always_active_experts_per_layer == [[2, 1], [3, 2]]


@settings(deadline=None)
@given(subsets_of(8, 1))
def test_config_of_a_subset_says_what_is_left(experts):
    config = config_of()
    small = subset_config(config, ExpertSubset(experts).for_model(config))
    assert [layer.num_experts for layer in small.layer_experts] == [len(ids) for ids in experts]
    assert small.num_experts_per_tok == min(4, max(len(ids) for ids in experts))
    assert [layer.num_shared for layer in small.layer_experts] == [1, 1]
    assert small.retained_experts == experts and small.root_experts_per_layer == [8, 8]
    assert (config.num_experts, config.retained_experts) == (8, None)


@settings(deadline=None)
@given(st.data())
def test_subset_of_a_subset_composes(data):
    config = config_of()
    first = data.draw(subsets_of(8, 1))
    small = subset_config(config, ExpertSubset(first).for_model(config))
    second = [
        data.draw(
            st.sets(st.sampled_from(ids[:-1]), min_size=1).map(lambda s, last=ids[-1]: sorted(s) + [last])
        )
        for ids in first
    ]
    chosen = ExpertSubset(second).for_model(small)
    local = local_experts(chosen, small)
    assert [[ids[e] for e in kept] for ids, kept in zip(first, local, strict=True)] == second
    smaller = subset_config(small, chosen)
    assert smaller.retained_experts == second and smaller.root_experts_per_layer == [8, 8]
    # The same, named in the numbering of the model that is pruned, as the authors' files do.
    by_position = ExpertSubset.from_dict({"experts_kept_per_layer": local}).for_model(small)
    assert by_position.experts == second


def test_expert_that_a_subset_does_not_hold_is_refused():
    config = config_of()
    small = subset_config(config, ExpertSubset([[1, 3, 7], [0, 2, 7]]).for_model(config))
    with pytest.raises(SubsetError, match=r"Expert 2 of layer 0 is not in this model.*\[1, 3, 7\]"):
        ExpertSubset([[2, 7], [0, 7]]).for_model(small)


def test_saved_name_finds_the_file_beside_the_model(tmp_path):
    ExpertSubset([[0, 1]]).save(tmp_path / "subsets" / "math.json")
    assert ExpertSubset.of("math", str(tmp_path)).experts == [[0, 1]]
