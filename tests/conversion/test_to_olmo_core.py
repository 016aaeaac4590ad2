"""The released layout back to training checkpoints."""

import hashlib
import json
import logging
import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import GOLDENS
from safetensors.torch import load_file, save_file
from transformers_emo import CheckpointError, EmoConfig, EmoForCausalLM, cli
from transformers_emo.conversion import (
    DistributedCheckpoint,
    convert_olmo_core,
    convert_to_olmo_core,
    read_metadata,
    to_olmo_core,
)
from transformers_emo.conversion.olmo_core.config_reader import read_config

EXPECTED = GOLDENS / "D_train_step" / "expected_hf"
POOLS = {"document_pool_min": 3, "document_pool_max": 11}


def parameters(step) -> dict[str, torch.Tensor]:
    checkpoint = DistributedCheckpoint(step / "model_and_optim")
    return {name: checkpoint[name].rows() for name in checkpoint.names if name.startswith("model.")}


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: tensor.contiguous().view(torch.int32).tolist() for name, tensor in tensors.items()}


def read_by_torch(step, shapes) -> dict[str, torch.Tensor]:
    state = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    dcp.load(state, checkpoint_id=str(step / "model_and_optim"), no_dist=True)
    return state


def test_converting_back_gives_the_training_checkpoint_bit_for_bit(step10, tmp_path):
    convert_olmo_core(step10, tmp_path / "model", progress=False)
    step = tmp_path / "step0"
    convert_to_olmo_core(tmp_path / "model", step, original=step10, verify=True, progress=False)
    theirs = read_metadata(step10 / "model_and_optim" / ".metadata")
    ours = read_metadata(step / "model_and_optim" / ".metadata")
    assert set(ours) == {name for name in theirs if name.startswith("model.")}
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape)
        assert [c.sizes for c in tensor.chunks] == [c.sizes for c in theirs[name].chunks]
    assert bits(parameters(step)) == bits(parameters(step10))  # padded rows too


def test_torch_and_its_checkpoint_reader_read_it(step10, tmp_path):
    step = tmp_path / "step0"
    convert_to_olmo_core(EXPECTED, step, progress=False, settings=POOLS)
    expected = {
        name: tensor[:256] if tensor.shape[0] == 320 else tensor
        for name, tensor in parameters(step10).items()
    }
    shapes = {name: tensor.shape for name, tensor in parameters(step10).items()}
    shapes |= {to_olmo_core.EMBEDDINGS: (256, 64), to_olmo_core.HEAD: (256, 64)}
    assert bits(read_by_torch(step, shapes)) == bits(expected)
    root = pickle.loads((step / "model_and_optim" / ".metadata").read_bytes())
    golden_planner = ("model", "blocks.0.attention.w_q.weight")
    assert root.planner_data["model.blocks.0.attention.w_q.weight"] == golden_planner


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_converting_there_and_back_gives_the_model_bit_for_bit(dtype, make_model, tmp_path):
    make_model().to(dtype).save_pretrained(tmp_path / "model", max_shard_size="40KB")
    convert_to_olmo_core(tmp_path / "model", tmp_path / "step", settings=POOLS, progress=False)
    again = convert_olmo_core(tmp_path / "step", tmp_path / "again", dtype=dtype, progress=False)
    before, after = (
        {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
        for folder in (tmp_path / "model", tmp_path / "again")
    )
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    wanted = EmoConfig.from_pretrained(tmp_path / "model").to_dict() | POOLS
    got = again.to_dict()
    assert {key: value for key, value in wanted.items() if got.get(key) != value and key != "dtype"} == {}


def test_small_chunks_and_files_read_the_same(step10, tmp_path, monkeypatch):
    monkeypatch.setattr(to_olmo_core, "_MAX_CHUNK_BYTES", 20_000)
    monkeypatch.setattr(
        to_olmo_core.write_distributed_checkpoint, "__kwdefaults__", {"max_file_bytes": 60_000}
    )
    convert_to_olmo_core(EXPECTED, tmp_path / "step", original=step10, verify=True, progress=False)
    files = list(tmp_path.glob("step/model_and_optim/*.distcp"))
    assert len(files) > 10 and all(file.stat().st_size < 90_000 for file in files)
    assert bits(parameters(tmp_path / "step")) == bits(parameters(step10))
    shapes = {name: tensor.shape for name, tensor in parameters(step10).items()}
    assert bits(read_by_torch(tmp_path / "step", shapes)) == bits(parameters(step10))


def test_the_config_is_that_of_the_training_library(step10, tmp_path):
    config = json.loads((step10 / "config.json").read_text())
    content = convert_to_olmo_core(EXPECTED, tmp_path / "step", original=step10, progress=False)
    assert json.loads((tmp_path / "step" / "config.json").read_text()) == content
    router = config["model"]["block"]["feed_forward_moe"]["router"]
    for unused in (
        "document_expert_pool",
        "num_forced_experts",
        *[k for k in router if k.startswith("extension")],
    ):
        router.pop(unused)
    assert content == config  # the original's pools, loss weights, data and optimiser
    written, read = (read_config(folder / "config.json") for folder in (tmp_path / "step", step10))
    assert written.to_dict() == read.to_dict()


def test_padded_rows_are_zeros_without_the_original_and_the_notes_say_so(make_checkpoint, tmp_path):
    content = convert_to_olmo_core(make_checkpoint(), tmp_path / "step", settings=POOLS, progress=False)
    assert content["model"]["vocab_size"] == 128
    embeddings = parameters(tmp_path / "step")["model.embeddings.weight"]
    assert embeddings.shape == (128, 32) and embeddings[:96].any(1).all() and not embeddings[96:].any()
    said = json.loads((tmp_path / "step" / "conversion.json").read_text())
    assert said["padded_vocabulary_rows"] == "32: zeros"
    files = (tmp_path / "step" / "model_and_optim").iterdir()
    assert said["sha256"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


ROUTERS = {
    "MoETwoLevelBatchLBReduceDPSharedExpRandPoolRouterConfig": POOLS,
    "MoELinearLBReduceDPSharedExpRouterConfig": {},
    "MoELinearLBReduceDPRouterConfig": {"num_shared_experts": 0, "norm_topk_prob": True},
}


@pytest.mark.parametrize("router", ROUTERS)
def test_the_router_is_the_right_one(router, make_checkpoint, tmp_path, caplog):
    changes = ROUTERS[router]
    with caplog.at_level(logging.WARNING):
        content = convert_to_olmo_core(make_checkpoint(**changes), tmp_path / "step", progress=False)
    said = content["model"]["block"]["feed_forward_moe"]["router"]
    assert said["_CLASS_"].rpartition(".")[2] == router
    assert ("No document pools" in caplog.text) is ("document_pool_min" not in changes)
    again = read_config(tmp_path / "step" / "config.json")
    for name, value in changes.items():
        assert getattr(again, name) == value


def test_dropout_in_attention_is_that_of_the_model_or_of_its_original(step10, make_checkpoint, tmp_path):
    convert_to_olmo_core(make_checkpoint(attention_dropout=0.25), tmp_path / "step", progress=False)
    assert read_config(tmp_path / "step" / "config.json").attention_dropout == 0.25
    original = tmp_path / "original"
    shutil.copytree(step10, original)
    config = json.loads((original / "config.json").read_text())
    config["model"]["block"]["sequence_mixer"]["dropout"] = 0.125
    (original / "config.json").write_text(json.dumps(config))
    content = convert_to_olmo_core(EXPECTED, tmp_path / "step2", original=original, progress=False)
    assert content["model"]["block"]["sequence_mixer"]["dropout"] == 0.125


def test_the_user_is_told_of_settings_that_the_training_config_cannot_hold(make_checkpoint, tmp_path, caplog):
    subset = [[0, 3, 5, 8, 11]] * 3
    EmoForCausalLM.from_pretrained(make_checkpoint(), expert_subset=subset).save_pretrained(tmp_path / "part")
    with caplog.at_level(logging.WARNING):
        convert_to_olmo_core(
            tmp_path / "part", tmp_path / "step", settings=POOLS | {"document_pool_max": 4}, progress=False
        )
    assert "a subset of another model's experts" in caplog.text and "conversion.json" in caplog.text
    said = json.loads((tmp_path / "step" / "conversion.json").read_text())
    assert (said["retained_experts"], said["root_experts_per_layer"]) == (subset, [12] * 3)


def test_dense_models(make_checkpoint, tmp_path):
    folder = make_checkpoint(
        num_experts_per_layer=[0, 0, 0],
        num_shared_experts=0,
        num_experts_per_tok=0,
        dense_intermediate_size=40,
    )
    convert_to_olmo_core(folder, tmp_path / "step", verify=True, progress=False)
    convert_olmo_core(tmp_path / "step", tmp_path / "again", verify=True, progress=False)
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tie_word_embeddings": True}, "a head of their own"),
        ({"attention_bias": True}, "lose the biases"),
        ({"num_shared_experts": 2}, "sum to 1. Both agree for one shared expert only"),
        ({"num_experts_per_layer": [12, 8, 12]}, "all of one kind"),
        ({"always_active_experts": [3], "num_shared_experts": 0}, "always-active"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_scaling"),
        ({"num_shared_experts": 0, **POOLS, "document_pool_min": 4}, "one shared expert"),
        ({"eos_token_id": None}, "needs the one token"),
        ({"eos_token_id": [1, 2]}, "needs the one token"),
        ({"attention_dropout": 1.5}, "`attention_dropout` is 1.5"),
        ({"document_boundaries": "after_eos", **POOLS}, "`document_boundaries` is 'after_eos'"),
        (
            {"document_boundaries": "position_ids", "attention_within_documents": True},
            "`document_boundaries` is 'position_ids'",
        ),
    ],
)
def test_models_that_the_training_library_does_not_have_are_refused(
    changes, reason, make_checkpoint, tmp_path
):
    with pytest.raises(ValueError, match=reason):
        convert_to_olmo_core(make_checkpoint(**changes), tmp_path / "step", progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["extra", "missing", "shape", "integers", "no weights"])
def test_weights_that_do_not_fit_are_refused_before_writing(damage, make_checkpoint, tmp_path):
    folder = make_checkpoint()
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    if damage == "extra":
        name = "model.layers.0.self_attn.q_norm.weight"
        tensors[name] = torch.ones(32)
    elif damage == "missing":
        del tensors[name]
    elif damage == "shape":
        tensors[name] = tensors[name].T.contiguous()
    elif damage == "integers":
        tensors[name] = tensors[name].int()
    save_file(tensors, folder / "model.safetensors")
    if damage == "no weights":
        (folder / "model.safetensors").unlink()
        name = "no safetensors weights"
    with pytest.raises(CheckpointError, match=name):
        convert_to_olmo_core(folder, tmp_path / "step", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_an_original_of_another_model_is_refused(step10, make_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="`vocab_size` of the model is 96, of the original"):
        convert_to_olmo_core(make_checkpoint(), tmp_path / "step", original=step10, progress=False)


def test_settings_are_those_of_training(make_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="'hidden_size' is no setting of training"):
        convert_to_olmo_core(
            make_checkpoint(), tmp_path / "step", settings={"hidden_size": 3}, progress=False
        )
    with pytest.raises(ValueError, match="document_pool_min"):
        convert_to_olmo_core(
            make_checkpoint(), tmp_path / "step", settings={"document_pool_min": 9}, progress=False
        )
    assert list(tmp_path.iterdir()) == []


def test_verification_finds_wrong_bytes(make_checkpoint, tmp_path, monkeypatch):
    chunks = to_olmo_core._chunks

    def wrong(pieces, update):
        for name, rows in chunks(pieces, update):
            yield name, -rows if name == "model.lm_head.norm.weight" else rows

    monkeypatch.setattr(to_olmo_core, "_chunks", wrong)
    with pytest.raises(ValueError, match="of .*lm_head.norm.weight are others when read back"):
        convert_to_olmo_core(make_checkpoint(), tmp_path / "step", verify=True, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_command_converts_back(make_checkpoint, tmp_path, capsys):
    words = ["convert", "hf-to-olmo-core", str(make_checkpoint()), str(tmp_path / "step0"), "--verify"]
    assert cli.main([*words, "--set", "document_pool_min=3", "--set", "document_pool_max=11"]) == 0
    assert read_config(tmp_path / "step0" / "config.json").document_pool_max == 11
    assert cli.main(words) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("emo convert: ")
