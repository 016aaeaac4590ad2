"""What cannot be loaded in part is refused: one clear error, before any tensor is read."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers_emo import CheckpointError, EmoForCausalLM, SubsetError

UNIFORM = [[0, 3, 4, 8, 11], [1, 2, 5, 7, 11], [0, 6, 9, 10, 11]]


@pytest.fixture(autouse=True)
def no_tensor_is_read(monkeypatch):
    def refuse(*args):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("transformers_emo.checkpoints.checkpoint.LazyTensor.__getitem__", refuse)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([[0, 11]] * 2, "has 2 layers, the model 3"),
        ([[0, 12, 11]] * 3, "has no expert 12"),
        ([[0, 0, 11]] * 3, "names expert 0 twice"),
        ([[0, 1]] * 3, "drops expert 11"),
        ([[11]] * 3, "keeps no routed expert"),
        ("no-such-file.json", "no-such-file.json"),
        (3, "Cannot read an expert subset from int"),
    ],
)
def test_subset_that_does_not_fit(make_checkpoint, experts, message):
    with pytest.raises(SubsetError, match=message):
        AutoModelForCausalLM.from_pretrained(make_checkpoint(), expert_subset=experts)


def test_missing_shard(make_checkpoint):
    folder = make_checkpoint(shards=True)
    sorted(folder.glob("*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        AutoModelForCausalLM.from_pretrained(folder, expert_subset=UNIFORM)


def test_truncated_shard(make_checkpoint):
    folder = make_checkpoint(shards=True)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cut short"):
        AutoModelForCausalLM.from_pretrained(folder, expert_subset=UNIFORM)


def test_index_that_leaves_the_folder(make_checkpoint, tmp_path):
    folder = make_checkpoint(shards=True)
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    name, file = next(iter(data["weight_map"].items()))
    shutil.copy(folder / file, folder.parent / "stolen.safetensors")
    data["weight_map"][name] = "../stolen.safetensors"
    index.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="outside its folder"):
        AutoModelForCausalLM.from_pretrained(folder, expert_subset=UNIFORM)


def test_pickled_weights(make_checkpoint):
    folder = make_checkpoint()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="pickled"):
        AutoModelForCausalLM.from_pretrained(folder, expert_subset=UNIFORM)
    with pytest.raises(CheckpointError, match="Only safetensors"):
        AutoModelForCausalLM.from_pretrained(folder, expert_subset=UNIFORM, use_safetensors=False)


def test_folder_without_weights(make_checkpoint):
    folder = make_checkpoint()
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        AutoModelForCausalLM.from_pretrained(folder, expert_subset=UNIFORM)


@pytest.mark.parametrize("lost", ["mlp.experts.4.up_proj", "mlp.gate.weight", "mlp.experts.3"])
def test_checkpoint_without_an_expert_it_should_have(make_checkpoint, lost):
    folder = make_checkpoint()
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: t for name, t in tensors.items() if lost not in name or ".0." not in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks|has 11 experts"):
        AutoModelForCausalLM.from_pretrained(folder, expert_subset=UNIFORM)


def test_config_of_another_model(make_checkpoint, edit_json):
    folder = make_checkpoint()
    edit_json(folder / "config.json", num_experts=16)
    with pytest.raises(CheckpointError, match=r"asks for .*\(16, 32\), and the weights hold \(12, 32\)"):
        AutoModelForCausalLM.from_pretrained(folder, expert_subset=[[0, 1, 15]] * 3)


def test_experts_of_another_shape(make_checkpoint):
    folder = make_checkpoint()
    tensors = load_file(folder / "model.safetensors")
    turned = {n: t.T.contiguous() if ".experts." in n else t for n, t in tensors.items()}
    save_file(turned, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has shape \(32, 24\), expected \(24, 32\)|shape"):
        AutoModelForCausalLM.from_pretrained(folder, expert_subset=UNIFORM)


@pytest.mark.parametrize(("layer", "shape"), [(0, ()), (0, (0, 32)), (9, ()), (9, (0, 32)), (9, (12, 32))])
def test_damaged_router(make_checkpoint, shape, layer):
    folder = make_checkpoint()
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.{layer}.mlp.gate.weight"] = torch.zeros(shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"layers.{layer}.mlp.gate.weight|experts in layer {layer}"):
        AutoModelForCausalLM.from_pretrained(folder, expert_subset=UNIFORM)


def test_state_dict_and_quantised_weights(make_checkpoint, edit_json):
    folder = make_checkpoint()
    with pytest.raises(ValueError, match="cannot go with `state_dict`"):
        EmoForCausalLM.from_pretrained(folder, expert_subset=UNIFORM, state_dict={})
    edit_json(folder / "config.json", quantization_config={"quant_method": "torchao"})
    with pytest.raises(CheckpointError, match="quantised"):
        EmoForCausalLM.from_pretrained(folder, expert_subset=UNIFORM)


def test_whole_model_with_experts_turned_round_is_refused(make_checkpoint):
    folder = make_checkpoint()
    tensors = load_file(folder / "model.safetensors")
    turned = {n: t.T.contiguous() if ".experts." in n else t for n, t in tensors.items()}
    save_file(turned, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="mismatch"):
        EmoForCausalLM.from_pretrained(folder)
