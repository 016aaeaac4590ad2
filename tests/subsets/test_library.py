"""Subsets by name: found beside a model, and never outside its library."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers_emo import EmoForCausalLM, ExpertSubset, SubsetError
from transformers_emo.subsets import find_subset, library_names
from transformers_emo.subsets.library import library_file

MATH, CODE = [[0, 3, 11]] * 3, [[1, 4, 11]] * 3


def test_a_name_finds_the_subset_beside_the_model(make_checkpoint):
    folder = make_checkpoint()
    for name, experts in (("math", MATH), ("code.v2", CODE)):
        ExpertSubset(experts).save(folder / "subsets" / f"{name}.json")
    assert library_names(folder) == ["code.v2", "math"]
    for name in ("code.v2", "code.v2.json"):
        model = EmoForCausalLM.from_pretrained(folder, expert_subset=name)
        assert model.config.retained_experts == CODE


def test_a_name_works_as_a_mask_too(make_checkpoint):
    folder = make_checkpoint()
    ExpertSubset(MATH).save(folder / "subsets" / "math.json")
    model = EmoForCausalLM.from_pretrained(folder)
    with model.use_experts("math"):
        pass


def test_an_unknown_name_tells_those_there_are(make_checkpoint):
    folder = make_checkpoint()
    ExpertSubset(MATH).save(folder / "subsets" / "math.json")
    with pytest.raises(SubsetError, match="no expert subset 'maths': .* holds math"):
        EmoForCausalLM.from_pretrained(folder, expert_subset="maths")
    with pytest.raises(SubsetError, match="No such file"):
        EmoForCausalLM.from_pretrained(folder, expert_subset="elsewhere/maths.json")


def test_a_file_comes_before_the_library_and_a_folder_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ExpertSubset(MATH).save(tmp_path / "model" / "subsets" / "math.json")
    (tmp_path / "math").mkdir()  # as a user's own results may be called
    assert ExpertSubset.of("math", "model").experts == MATH
    (tmp_path / "math").rmdir()
    ExpertSubset(CODE).save(tmp_path / "math")
    assert ExpertSubset.of("math", "model").experts == CODE


@given(
    st.text(max_size=12) | st.sampled_from(["..", "../math", "/etc/passwd", "a/../../b", ".hidden", "a\\b"])
)
def test_names_never_lead_out_of_the_library(name):
    file = library_file(name)
    if file is not None:
        folder, _, rest = file.partition("/")
        assert folder == "subsets" and "/" not in rest and "\\" not in rest and not rest.startswith(".")


def test_a_repository_is_asked_last_and_only_for_names(tmp_path):
    asked = []
    ExpertSubset(CODE).save(tmp_path / "cache" / "fetched")

    def fetch(file):
        asked.append(file)
        return tmp_path / "cache" / "fetched" if file == "subsets/code.json" else None

    assert ExpertSubset.of("code", fetch=fetch).experts == CODE
    assert find_subset("law", fetch=fetch) is None
    assert find_subset("../code.json", fetch=fetch) is None
    assert find_subset(tmp_path / "cache" / "fetched", fetch=fetch) == tmp_path / "cache" / "fetched"
    assert asked == ["subsets/code.json", "subsets/law.json"]
