"""A subset taken out byte by byte is the model that loading and saving it would give."""

import hashlib
import json
import shutil

import pytest
import torch
from conftest import GOLDENS, TOY
from safetensors.torch import load_file
from tolerances import assert_same_numbers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers_emo import (
    CheckpointError,
    EmoForCausalLM,
    ExpertSubset,
    SubsetError,
    extract_subset,
    select_experts,
)
from transformers_emo.checkpoints import Checkpoint
from transformers_emo.checkpoints.local_files import LocalFiles
from transformers_emo.checkpoints.writing import output_folder
from transformers_emo.subsets.rewriting import extract

INPUT_IDS = torch.tensor([[5, 17, 60, 2, 33, 8, 90], [44, 44, 3, 71, 12, 9, 28]])
UNIFORM = [[0, 3, 4, 8, 11], [1, 2, 5, 7, 11], [0, 6, 9, 10, 11]]
PER_LAYER = [[0, 3, 4, 8, 9, 10, 11], [5, 11], [0, 6, 11]]  # two of them fewer than the 4 a token picks
VARIANTS = {
    "released": ({}, UNIFORM),
    "other sizes per layer": ({}, PER_LAYER),
    "all experts": ({}, [list(range(12))] * 3),
    "no shared": ({"num_shared_experts": 0}, UNIFORM),
    "two shared": ({"num_shared_experts": 2}, [[0, 10, 11], [3, 5, 10, 11], [9, 10, 11]]),
    "always active": (
        {"num_shared_experts": 0, "always_active_experts": [11, 4]},
        [[*{*ids, 4}] for ids in UNIFORM],
    ),
    "dense first": (
        {"num_experts_per_layer": [0, 12, 12], "dense_intermediate_size": 40, "dense_mlp_bias": True},
        [None, *PER_LAYER[1:]],
    ),
    "tied head": ({"tie_word_embeddings": True}, UNIFORM),
}


def tensors_in(folder) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def assert_same_tensors(first, second) -> None:
    first, second = tensors_in(first), tensors_in(second)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_folder_is_what_loading_and_saving_gives(make_model, tmp_path, variant, dtype):
    changes, experts = VARIANTS[variant]
    make_model(**changes).to(dtype).save_pretrained(tmp_path / "full")
    extract_subset(tmp_path / "full", experts, tmp_path / "out", progress=False)
    model = EmoForCausalLM.from_pretrained(tmp_path / "full", expert_subset=experts)
    model.save_pretrained(tmp_path / "expected")
    assert_same_tensors(tmp_path / "out", tmp_path / "expected")
    for file in ("config.json", "generation_config.json"):
        ours, expected = (json.loads((tmp_path / d / file).read_text()) for d in ("out", "expected"))
        assert ours == expected


@pytest.mark.parametrize(
    ("saved", "dtype"),
    [
        (torch.float32, "bfloat16"),
        (torch.float32, torch.float16),
        (torch.bfloat16, "float32"),
        (torch.bfloat16, "bfloat16"),
    ],
    ids=str,
)
@pytest.mark.parametrize("buffer_bytes", [1 << 24, 1000])
def test_another_dtype_is_that_of_loading_and_saving(
    make_model, tmp_path, monkeypatch, saved, dtype, buffer_bytes
):
    monkeypatch.setattr(extract, "_BUFFER_BYTES", buffer_bytes)
    changes, experts = VARIANTS["dense first"]
    make_model(**changes).to(saved).save_pretrained(tmp_path / "full")
    extract_subset(
        tmp_path / "full", experts, tmp_path / "out", dtype=dtype, max_shard_size="30KB", progress=False
    )
    model = EmoForCausalLM.from_pretrained(tmp_path / "full", expert_subset=experts, dtype=dtype)
    model.save_pretrained(tmp_path / "expected")
    assert_same_tensors(tmp_path / "out", tmp_path / "expected")
    ours, expected = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("out", "expected"))
    assert ours == expected
    assert EmoForCausalLM.from_pretrained(tmp_path / "out").dtype == model.dtype
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    sizes = [t.numel() * t.element_size() for t in tensors_in(tmp_path / "out").values()]
    assert index["metadata"]["total_size"] == sum(sizes)


@pytest.mark.parametrize("dtype", ["int8", "float31", 16])
def test_what_is_no_dtype_of_weights_is_refused(make_checkpoint, tmp_path, dtype):
    with pytest.raises(ValueError, match="Unknown dtype"):
        extract_subset(make_checkpoint(), UNIFORM, tmp_path / "out", dtype=dtype)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["global", "layerwise"])
def test_choices_with_exclusions_and_budgets_come_out_as_they_load(make_checkpoint, tmp_path, method):
    folder = make_checkpoint()
    by_layer = {"budget": "mass"} if method == "global" else {}
    excluded = {0: [1, 2], 2: [0]}
    chosen = select_experts(
        folder,
        input_ids=INPUT_IDS,
        num_experts=6,
        method=method,
        exclude_experts=excluded,
        progress=False,
        **by_layer,
    )
    chosen.save(tmp_path / "chosen.json")
    assert all(not set(ids) & set(chosen.experts[layer]) for layer, ids in excluded.items())
    config = extract_subset(folder, tmp_path / "chosen.json", tmp_path / "out", progress=False)
    assert config.retained_experts == chosen.experts
    full, small = EmoForCausalLM.from_pretrained(folder), EmoForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad(), full.use_experts(chosen):
        expected = full(INPUT_IDS).logits
    with torch.no_grad():
        assert_same_numbers(small(INPUT_IDS).logits, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_loads_plainly_and_generates(make_checkpoint, tmp_path, variant):
    changes, experts = VARIANTS[variant]
    folder = make_checkpoint(**changes)
    extract_subset(folder, experts, tmp_path / "out", progress=False)
    extracted, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    loaded = AutoModelForCausalLM.from_pretrained(folder, expert_subset=experts)
    words = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(extracted.generate(INPUT_IDS, **words), loaded.generate(INPUT_IDS, **words))


def test_the_authors_pruned_tensors_come_out(tmp_path):
    base = GOLDENS / "A_hf_forward" / "base" / "checkpoint"
    golden = json.loads((GOLDENS / "B_subset" / "base" / "layerwise_k4.json").read_text())
    extract_subset(base, golden["pruning_metadata_json"], tmp_path / "out", progress=False)
    tensors = tensors_in(tmp_path / "out")
    assert len(tensors) == golden["pruned_checkpoint_num_tensors"]
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    assert digest.hexdigest() == golden["pruned_checkpoint_sha256_sorted_keys_then_bytes"]


def test_shards_go_in_and_out(make_checkpoint, tmp_path):
    single, sharded = make_checkpoint(), make_checkpoint(shards=True)
    extract_subset(single, UNIFORM, tmp_path / "one", progress=False)
    extract_subset(sharded, UNIFORM, tmp_path / "many", max_shard_size="30KB", progress=False)
    assert_same_tensors(tmp_path / "one", tmp_path / "many")
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        size = sum(t.numel() * t.element_size() for t in load_file(tmp_path / "many" / file).values())
        assert size <= 30_000
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    tensors = tensors_in(tmp_path / "many")
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    Checkpoint.from_folder(tmp_path / "many")  # reads every header
    assert EmoForCausalLM.from_pretrained(tmp_path / "many").config.retained_experts == UNIFORM


def test_stacked_experts_come_out_as_released(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    EmoForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "stacked", save_original_format=False)
    assert "model.layers.0.mlp.experts.down_proj" in tensors_in(tmp_path / "stacked")
    extract_subset(folder, PER_LAYER, tmp_path / "a", progress=False)
    extract_subset(tmp_path / "stacked", PER_LAYER, tmp_path / "b", progress=False)
    assert_same_tensors(tmp_path / "a", tmp_path / "b")


def test_a_subset_of_a_subset_is_the_subset_of_the_root(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    inner = [[3, 8, 11], [1, 7, 11], [0, 10, 11]]  # ids of the root model
    extract_subset(folder, UNIFORM, tmp_path / "outer", progress=False)
    composed = extract_subset(tmp_path / "outer", inner, tmp_path / "composed", progress=False)
    direct = extract_subset(folder, inner, tmp_path / "direct", progress=False)
    assert composed.retained_experts == direct.retained_experts == inner
    assert composed.root_experts_per_layer == [12, 12, 12]
    assert_same_tensors(tmp_path / "composed", tmp_path / "direct")


def test_tokenizer_and_generation_config_come_along(tmp_path):
    full = tmp_path / "full"
    shutil.copytree(TOY, full)
    (full / "generation_config.json").write_text('{"do_sample": true, "top_p": 0.5}')
    ExpertSubset([[0, 1, 31]] * 4).save(full / "subsets" / "math.json")
    extract_subset(full, "math", tmp_path / "out", progress=False)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("import os")["input_ids"]
    assert EmoForCausalLM.from_pretrained(tmp_path / "out").generation_config.top_p == 0.5
    assert not (tmp_path / "out" / "documents").exists()


def test_little_is_read_and_little_is_held(make_checkpoint, tmp_path, monkeypatch):
    folder = make_checkpoint()
    read = []
    original = LocalFiles.read_into

    def counted(self, file, start, buffer):
        read.append(len(buffer))
        original(self, file, start, buffer)

    monkeypatch.setattr(LocalFiles, "read_into", counted)
    monkeypatch.setattr(extract, "_BUFFER_BYTES", 1000)  # smaller than a tensor
    monkeypatch.setattr(EmoForCausalLM, "__init__", lambda *_: pytest.fail("the model was built"))
    extract_subset(folder, PER_LAYER, tmp_path / "out", progress=False)
    header_bytes, bytes_read = sum(read[:2]), sum(read[2:])
    assert max(read[2:]) == 1000
    assert bytes_read == sum(t.numel() * t.element_size() for t in tensors_in(tmp_path / "out").values())
    assert header_bytes + bytes_read < 0.8 * (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([[0, 12]] * 3, "has no expert 12"),
        ([[0, 1]] * 3, "drops expert 11 of layer 0"),
        ([[11]] * 3, "keeps no routed expert"),
        ("nowhere", "no expert subset 'nowhere'"),
    ],
)
def test_subsets_that_do_not_fit_are_refused_and_nothing_is_written(
    make_checkpoint, tmp_path, experts, message
):
    with pytest.raises(SubsetError, match=message):
        extract_subset(make_checkpoint(), experts, tmp_path / "new" / "out", progress=False)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_stays_as_it_is(make_checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        extract_subset(make_checkpoint(), UNIFORM, tmp_path / "out", progress=False)
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_is_told_beforehand(make_checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="make room"):
        extract_subset(make_checkpoint(), UNIFORM, tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


def test_nothing_half_written_stays_after_an_interruption(make_checkpoint, tmp_path, monkeypatch):
    folder = make_checkpoint(shards=True)
    calls = []

    def interrupted(to, data):
        calls.append(to)
        if len(calls) == 40:
            raise KeyboardInterrupt
        to.write(data)

    monkeypatch.setattr(extract, "_write_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract_subset(folder, UNIFORM, tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


def test_damaged_and_quantised_checkpoints_are_refused(make_checkpoint, tmp_path, edit_json):
    folder = make_checkpoint()
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="cut short"):
        extract_subset(folder, UNIFORM, tmp_path / "out", progress=False)
    weights.write_bytes(whole)
    edit_json(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(CheckpointError, match="quantised"):
        extract_subset(folder, UNIFORM, tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())
