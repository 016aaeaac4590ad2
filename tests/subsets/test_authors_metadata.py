"""The authors' `pruning_metadata.json`, read and written."""

import json

import pytest
from conftest import GOLDENS
from transformers_emo import EmoConfig, ExpertSubset
from transformers_emo.subsets import pruning_metadata, save_pruning_metadata, subset_config

BASE = GOLDENS / "A_hf_forward" / "base" / "checkpoint"


@pytest.mark.parametrize("case", ["layerwise_k4", "layerwise_k8", "global_k4", "global_k8"])
def test_what_the_authors_wrote_is_written_again(case):
    golden = json.loads((GOLDENS / "B_subset" / "base" / f"{case}.json").read_text())
    theirs = golden["pruning_metadata_json"]
    subset = ExpertSubset.from_dict(theirs)
    assert subset.method == ("layerwise" if "layerwise" in case else None)
    config = EmoConfig.from_pretrained(BASE)
    ours = pruning_metadata(subset, config)
    assert {key: theirs.get(key) for key in ours} == ours
    assert subset.for_model(config).experts == golden["experts_kept_per_layer"]


def test_a_subset_of_a_subset_comes_back_in_root_numbering(tmp_path):
    config = EmoConfig(num_hidden_layers=2, num_experts=16, num_experts_per_tok=4)
    small = subset_config(config, ExpertSubset([[1, 5, 9, 15], [0, 2, 15]]).for_model(config))
    chosen = ExpertSubset([[5, 9, 15], [2, 15]], method="reap").for_model(small)
    save_pruning_metadata(chosen, small, tmp_path / "pruning_metadata.json")
    read = json.loads((tmp_path / "pruning_metadata.json").read_text())
    assert read["experts_kept_per_layer"] == [[1, 2, 3], [1, 2]] and read["prune_keep_k"] is None
    again = ExpertSubset.load(tmp_path / "pruning_metadata.json").for_model(small)
    assert again.experts == chosen.experts and again.method == "reap"


def test_dense_layers_and_dropped_shared_experts_are_told():
    config = EmoConfig(
        num_hidden_layers=2,
        num_experts=8,
        num_shared_experts=2,
        num_experts_per_layer=[0, 8],
        dense_intermediate_size=16,
    )
    written = pruning_metadata(ExpertSubset([None, [1, 2, 7]], drop_shared=True), config)
    assert written["experts_kept_per_layer"] == [[], [1, 2, 7]]
    assert (written["prune_keep_k"], written["num_shared_experts"]) == (3, 1)
