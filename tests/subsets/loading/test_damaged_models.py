"""Models from strangers, whole or in part: damaged files, paths and links that lead out of the folder."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers_emo import CheckpointError, EmoForCausalLM, ExpertSubset, SubsetError, extract_subset
from transformers_emo.subsets.loading.weights_check import MisfitError

SUBSET = [[0, 3, 4, 8, 11], [1, 2, 5, 7, 11], [0, 6, 9, 10, 11]]
CHOICES = {"whole": {}, "subset": {"expert_subset": SUBSET}}
INDEX = "model.safetensors.index.json"

in_whole_and_in_part = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)


@pytest.fixture
def folder(make_checkpoint, tmp_path):
    """In several files, in a folder whose neighbours are known."""
    return shutil.copytree(make_checkpoint(shards=True), tmp_path / "model")


def first_shard(folder):
    return min(folder.glob("*.safetensors"))


def change_index(folder, file):
    data = json.loads((folder / INDEX).read_text())
    name = min(data["weight_map"])
    data["weight_map"] = {n: file if n == name else f for n, f in data["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(data))


@in_whole_and_in_part
@pytest.mark.parametrize(
    "kind", ["up", "absolute", "hidden", "not safetensors", "number", "empty", "two lines"]
)
def test_an_index_that_leads_elsewhere(folder, choice, kind):
    outside = folder.parent / "other.safetensors"
    shutil.copy(first_shard(folder), outside)
    names = {
        "up": "../other.safetensors",
        "absolute": str(outside),
        "hidden": "x/../../other.safetensors",
        "not safetensors": "config.json",
        "number": 7,
        "empty": "",
        "two lines": "a\nb.safetensors",
    }
    change_index(folder, names[kind])
    with pytest.raises(CheckpointError, match=INDEX):
        AutoModelForCausalLM.from_pretrained(folder, **choice)


@in_whole_and_in_part
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
def test_a_key_that_stands_twice_in_one_object(folder, choice, name):
    """Programs differ in which of the two they take."""
    path = folder / name
    text = path.read_text() if path.exists() else '{"top_k": 1}'
    key = next(iter(json.loads(text)))
    path.write_text(text.replace("{", f'{{"{key}": null, ', 1))
    with pytest.raises(CheckpointError, match=f"key '{key}' twice"):
        AutoModelForCausalLM.from_pretrained(folder, **choice)


@in_whole_and_in_part
@pytest.mark.parametrize("part", ["up_proj", "q_proj", "embed_tokens", "lm_head"])
def test_integers_in_place_of_weights(make_checkpoint, tmp_path, choice, part):
    """As a quantised model has them whose config does not say so."""
    folder = shutil.copytree(make_checkpoint(), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    changed = {name: tensor.mul(100).to(torch.int8) for name, tensor in tensors.items() if part in name}
    save_file(tensors | changed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="holds torch.int8, expected floating point"):
        AutoModelForCausalLM.from_pretrained(folder, **choice)


@in_whole_and_in_part
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}', "\udcff", "[" * 100_000, "3"]
)
def test_a_damaged_index(folder, choice, text):
    (folder / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=f"{INDEX} is damaged .*download it again"):
        AutoModelForCausalLM.from_pretrained(folder, **choice)


@in_whole_and_in_part
@pytest.mark.parametrize("kind", ["missing", "short", "empty", "text", "folder", "other"])
def test_a_damaged_shard(folder, choice, kind):
    shard = first_shard(folder)
    data = shard.read_bytes()
    shard.unlink()
    match kind:
        case "short":
            shard.write_bytes(data[:-10])
        case "empty":
            shard.touch()
        case "text":
            shard.write_text("not here" * 100)
        case "folder":
            shard.mkdir()
        case "other":
            save_file({"x": torch.ones(3)}, shard)
    with pytest.raises(CheckpointError, match=rf"{shard.name}.*([Dd]ownload|[Gg]ive)"):
        AutoModelForCausalLM.from_pretrained(folder, **choice)


@in_whole_and_in_part
def test_one_damaged_file(make_checkpoint, choice):
    folder = make_checkpoint()
    path = folder / "model.safetensors"
    for data in (b"", path.read_bytes()[:-1], b"\xff" * 100):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="model.safetensors"):
            AutoModelForCausalLM.from_pretrained(folder, **choice)


@in_whole_and_in_part
@pytest.mark.parametrize("name", ["shard", INDEX, "config.json"])
def test_a_link_out_of_the_folder_is_not_followed(folder, choice, name):
    file = first_shard(folder) if name == "shard" else folder / name
    outside = folder.parent / "elsewhere"
    file.rename(outside)
    file.symlink_to(outside)
    with pytest.raises(CheckpointError, match=f"{file} is a link out of its folder, to {outside}"):
        AutoModelForCausalLM.from_pretrained(folder, **choice)


@in_whole_and_in_part
def test_a_link_of_the_only_file_out_of_the_folder(make_checkpoint, tmp_path, choice):
    file = make_checkpoint() / "model.safetensors"
    file.rename(tmp_path / "weights")
    file.symlink_to(os.path.relpath(tmp_path / "weights", file.parent))
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        AutoModelForCausalLM.from_pretrained(file.parent, **choice)


@in_whole_and_in_part
def test_links_within_the_folder_and_to_it_are_followed(folder, choice, tmp_path):
    expected = AutoModelForCausalLM.from_pretrained(folder, **choice).state_dict()
    (folder / "parts").mkdir()
    file = first_shard(folder)
    file.rename(folder / "parts" / "one")
    file.symlink_to(os.path.join("parts", "one"))
    (tmp_path / "latest").symlink_to(folder)
    for path in (folder, tmp_path / "latest"):
        found = AutoModelForCausalLM.from_pretrained(path, **choice).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def as_in_the_cache(folder, cache):
    """The folder as a snapshot of the Hub's cache: links to files that are called by their hashes."""
    repo = cache / "models--user--model"
    snapshot = repo / "snapshots" / ("c" * 40)
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, repo / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


@in_whole_and_in_part
def test_a_snapshot_of_the_cache_is_made_of_links(folder, choice, tmp_path):
    snapshot = as_in_the_cache(folder, tmp_path / "hub")
    (tmp_path / "linked").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "linked"):
        assert AutoModelForCausalLM.from_pretrained(path, **choice).config.num_hidden_layers == 3
    extract_subset(snapshot, SUBSET, tmp_path / "out", progress=False)
    shard = first_shard(snapshot)
    shard.unlink()
    shard.symlink_to(folder / shard.name)
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        AutoModelForCausalLM.from_pretrained(snapshot, **choice)


def test_what_lies_beside_the_weights_is_no_way_out(folder, tmp_path):
    (tmp_path / "secret").write_text("{}")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a link out of its folder"):
        extract_subset(folder, SUBSET, tmp_path / "out", progress=False)
    ExpertSubset(SUBSET).save(tmp_path / "math.json")
    (folder / "subsets").mkdir()
    (folder / "subsets" / "math.json").symlink_to(tmp_path / "math.json")
    with pytest.raises((CheckpointError, SubsetError), match="is a link out of its folder"):
        AutoModelForCausalLM.from_pretrained(folder, expert_subset="math")


def test_a_misfit_is_our_error_and_that_of_transformers(make_checkpoint):
    folder = make_checkpoint()
    with pytest.raises(MisfitError, match=f"{folder} does not fit.*lm_head.*ignore_mismatched_sizes"):
        EmoForCausalLM.from_pretrained(folder, vocab_size=90)
    assert issubclass(MisfitError, RuntimeError) and issubclass(MisfitError, CheckpointError)


NAN, INF = float("nan"), float("inf")
BAD = [
    ("model.norm.weight", NAN, "model.norm.weight (1 NaN, 0 infinite)"),
    ("lm_head.weight", -INF, "lm_head.weight (0 NaN, 1 infinite)"),
    ("model.layers.1.mlp.gate.weight", NAN, "model.layers.1.mlp.gate.weight (1 NaN"),
    ("model.layers.1.mlp.experts.5.up_proj.weight", INF, "model.layers.1.mlp.experts.5.up_proj.weight (0 N"),
    ("model.layers.0.mlp.experts.8.gate_proj.weight", NAN, "layers.0.mlp.experts.8.gate_proj.weight (1 NaN"),
    ("model.layers.2.mlp.experts.11.down_proj.weight", NAN, "layers.2.mlp.experts.11.down_proj.weight (1 N"),
]


def with_bad_number(folder, name, number):
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name].view(-1)[-1] = number
            save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "choice", [*CHOICES.values(), {"exclude_experts": {0: [1]}}], ids=[*CHOICES, "exclusion"]
)
@pytest.mark.parametrize(("name", "number", "said"), BAD, ids=[name for name, _, _ in BAD])
def test_check_weights_names_what_is_no_number(folder, choice, name, number, said):
    EmoForCausalLM.from_pretrained(folder, check_weights=True, **choice)
    with_bad_number(folder, name, number)
    with pytest.raises(CheckpointError) as caught:
        EmoForCausalLM.from_pretrained(folder, check_weights=True, **choice)
    assert said in str(caught.value) and str(folder) in str(caught.value)
    EmoForCausalLM.from_pretrained(folder, **choice)


def test_check_weights_looks_at_the_wanted_experts_only(folder):
    with_bad_number(folder, "model.layers.0.mlp.experts.1.up_proj.weight", NAN)
    model = EmoForCausalLM.from_pretrained(folder, expert_subset=SUBSET, check_weights=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    larger = [[0, 1, 3, 11], *SUBSET[1:]]
    for change in (model.swap_experts, model.share_backbone):
        with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.experts\.1\.up_proj\.weight \(1 NaN"):
            change(larger, check_weights=True, progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model.swap_experts(larger, progress=False)


def test_check_weights_sees_what_overflows_in_the_dtype_asked_for(folder):
    with_bad_number(folder, "model.norm.weight", 1e30)
    EmoForCausalLM.from_pretrained(folder, check_weights=True)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight \(0 NaN, 1 infinite\)"):
        EmoForCausalLM.from_pretrained(folder, check_weights=True, dtype=torch.float16)
