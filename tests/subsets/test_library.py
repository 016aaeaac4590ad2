"""Subsets by name: found beside a model, and never outside its library."""

import json
import re
import shutil

import pytest
import torch
from hub_server import HubServer
from hypothesis import given
from hypothesis import strategies as st
from transformers_emo import EmoForCausalLM, ExpertSubset, SubsetError, extract_subset, select_experts
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


@pytest.fixture
def ways(make_checkpoint, tmp_path):
    """Everything that takes a subset by name, and a folder with two subsets."""
    folder = make_checkpoint()
    for name in ("math", "code"):
        ExpertSubset(MATH).save(folder / "subsets" / f"{name}.json")
    model = EmoForCausalLM.from_pretrained(folder)
    ids, words = torch.tensor([[5, 6]]), {"max_new_tokens": 1}
    return folder, {
        "from_pretrained": lambda name: EmoForCausalLM.from_pretrained(folder, expert_subset=name),
        "exclude in from_pretrained": lambda name: EmoForCausalLM.from_pretrained(
            folder, exclude_experts=name
        ),
        "use_experts": lambda name: model.use_experts(name).__enter__(),
        "generate": lambda name: model.generate(ids, expert_subset=name, **words),
        "exclude in generate": lambda name: model.generate(ids, exclude_experts=name, **words),
        "swap_experts": lambda name: model.swap_experts(name),
        "share_backbone": lambda name: model.share_backbone(name),
        "extract_subset": lambda name: extract_subset(folder, name, tmp_path / "out"),
        "select_experts": lambda name: select_experts(folder, input_ids=ids, exclude_experts=name),
    }


WAYS = [
    "from_pretrained",
    "exclude in from_pretrained",
    "use_experts",
    "generate",
    "exclude in generate",
    "swap_experts",
    "share_backbone",
    "extract_subset",
    "select_experts",
]


@pytest.mark.parametrize("way", WAYS)
def test_an_unknown_name_tells_where_was_looked_and_what_there_is(ways, way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, calls = ways
    library = re.escape(str(folder / "subsets"))
    here = re.escape(str(tmp_path))
    with pytest.raises(SubsetError, match=f"no expert subset 'maths'.*{here}.*{library}.*code, math.*Give"):
        calls[way]("maths")
    shutil.rmtree(folder / "subsets")
    with pytest.raises(SubsetError, match=f"'maths'.*{here}.*{library}.*is not there.*`select_experts`"):
        calls[way]("maths")
    for path in ("elsewhere/maths.json", tmp_path / "elsewhere" / "maths.json"):  # a path is no name
        with pytest.raises(SubsetError, match=f"no file .*elsewhere/maths.json'.*{here}"):
            calls[way](path)
    with pytest.raises(SubsetError, match="is a folder"):
        calls[way](tmp_path)


def test_a_model_from_nowhere_has_no_library(make_model):
    model = make_model()
    for call in (model.swap_experts, model.share_backbone, lambda name: model.use_experts(name).__enter__()):
        with pytest.raises(SubsetError, match="no expert subset 'math'.*no folder or repository is known"):
            call("math")
    with pytest.raises(SubsetError, match="no folder or repository is known"):
        ExpertSubset.of("math")


def test_a_model_whose_folder_is_gone_says_so(make_checkpoint):
    folder = make_checkpoint()
    model = EmoForCausalLM.from_pretrained(folder)
    shutil.rmtree(folder)
    with pytest.raises(SubsetError, match=f"{re.escape(str(folder))}.*is not there"):
        model.swap_experts("math")


def test_what_no_file_system_takes_for_a_name_is_refused(tmp_path):
    with pytest.raises(SubsetError, match="no file") as error:
        ExpertSubset.of('{"experts": [[' + "0, " * 5000 + "0]]}", tmp_path)
    assert len(str(error.value)) < 1000


FROM_THE_HUB = """
import json, os, torch
from transformers_emo import EmoForCausalLM, SubsetError

said = []
def note(call):
    try:
        call()
        said.append(None)
    except SubsetError as error:
        said.append(str(error))

note(lambda: EmoForCausalLM.from_pretrained("user/emo", expert_subset="maths"))
model = EmoForCausalLM.from_pretrained("user/emo")
note(lambda: model.swap_experts("maths"))
note(lambda: model.generate(torch.tensor([[5]]), expert_subset="maths", max_new_tokens=1))
old = EmoForCausalLM.from_pretrained("user/emo", revision="old")
note(lambda: old.generate(torch.tensor([[5]]), expert_subset="math", max_new_tokens=1))
note(lambda: old.swap_experts("math"))
with model.use_experts("math"):
    note(lambda: EmoForCausalLM.from_pretrained("user/emo", expert_subset="maths", local_files_only=True))
print(json.dumps(said))
"""


def test_a_repository_says_what_it_holds_at_the_commit_that_was_loaded(make_checkpoint):
    folder = make_checkpoint()
    with HubServer() as hub:
        hub.commit("user/emo", folder)
        hub.commit("user/emo", folder, branch="old")
        for name in ("math", "code"):
            ExpertSubset(MATH).save(folder / "subsets" / f"{name}.json")
        hub.commit("user/emo", folder)
        *new, old_masked, old_swapped, offline = json.loads(hub.run(FROM_THE_HUB).strip().splitlines()[-1])
    for said in new:
        assert "no expert subset 'maths'" in said and "user/emo" in said and "code, math" in said
    for said in (old_masked, old_swapped):  # the library of the revision that was loaded, and no other
        assert "no expert subset 'math'" in said and "holds none" in said
    assert "cache" in offline and "math" in offline.split("cache")[1]


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
