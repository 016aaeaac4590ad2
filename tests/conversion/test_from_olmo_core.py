"""Training checkpoints to the released layout."""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import shutil
import signal

import fresh_processes
import pytest
import torch
from conftest import GOLDENS, TOY
from safetensors.torch import load_file
from tolerances import assert_same_numbers
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers_emo import CheckpointError, EmoConfig, cli
from transformers_emo.conversion import DistributedCheckpoint, convert_olmo_core, from_olmo_core
from transformers_emo.conversion.olmo_core.verification import training_logits

GOLDEN = GOLDENS / "D_olmo_core_checkpoint"
EXPECTED = GOLDENS / "D_train_step" / "expected_hf"
EMO_ROUTER = "MoETwoLevelBatchLBReduceDPSharedExpRandPoolRouterConfig"


def load(folder) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs
    )


def model_tensors(step) -> dict[str, torch.Tensor]:
    checkpoint = DistributedCheckpoint(step / "model_and_optim")
    return {name: checkpoint[name].rows() for name in checkpoint.names if name.startswith("model.")}


def write_step(folder, config: dict, tensors: dict[str, torch.Tensor], ranks: int = 1):
    """A step folder as `ranks` ranks would write it, each with its part of the rows."""
    (folder / "model_and_optim").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    entries, places, files = {}, {}, [io.BytesIO() for _ in range(ranks)]
    for name, tensor in tensors.items():
        chunks, start = [], 0
        for rank, part in enumerate(tensor.chunk(ranks)):
            saved = io.BytesIO()
            torch.save(part.clone(), saved)
            offset = torch.Size([start, *[0] * (tensor.dim() - 1)])
            chunks.append(torch_metadata.ChunkStorageMetadata(offset, part.shape))
            places[torch_metadata.MetadataIndex(name, offset)] = _StorageInfo(
                f"__{rank}_0.distcp", files[rank].tell(), len(saved.getvalue())
            )
            files[rank].write(saved.getvalue())
            start += len(part)
        properties = torch_metadata.TensorProperties(tensor.dtype)
        entries[name] = torch_metadata.TensorStorageMetadata(properties, tensor.shape, chunks)
    for rank, file in enumerate(files):
        (folder / "model_and_optim" / f"__{rank}_0.distcp").write_bytes(file.getvalue())
    root = torch_metadata.Metadata(entries, storage_data=places)
    (folder / "model_and_optim" / ".metadata").write_bytes(pickle.dumps(root))
    return folder


@pytest.fixture
def config(step10) -> dict:
    return json.loads((step10 / "config.json").read_text())


def test_the_conversion_equals_that_of_the_authors_bit_for_bit(step10, tmp_path):
    convert_olmo_core(step10, tmp_path / "out", progress=False)
    assert same(load(tmp_path / "out"), load(EXPECTED))
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "out", EXPECTED))
    assert ours["output_router_logits"] is False
    for key in theirs.keys() - {"output_router_logits", "transformers_version"}:
        assert ours[key] == theirs[key], key


def test_the_notes_have_the_hashes_of_the_files_read_and_written(step10, tmp_path):
    out = tmp_path / "out"
    convert_olmo_core(step10, out, dtype="bfloat16", max_shard_size="100KB", progress=False)
    said = json.loads((out / from_olmo_core.PROVENANCE).read_text())

    def hashes(folder, names):
        return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}

    assert (said["step"], said["dtype"]) == (step10.name, "bfloat16") and len(said["sha256"]) > 2
    assert said["sha256"] == hashes(out, [path.name for path in out.glob("*.safetensors")])
    assert said["source_sha256"] == hashes(step10, ["config.json", "model_and_optim/.metadata"])
    assert said["tensors"] == len(load(out))


def test_settings_of_training_are_kept(step10, config, tmp_path):
    moe = config["model"]["block"]["feed_forward_moe"]
    moe["lb_loss_weight"], moe["z_loss_weight"] = 0.25, 0.5
    config["train_module"]["z_loss_multiplier"] = 0.125
    config["model"]["block"]["sequence_mixer"]["dropout"] = 0.0625
    write_step(tmp_path / "step3", config, model_tensors(step10))
    convert_olmo_core(tmp_path / "step3", tmp_path / "out", progress=False)
    kept = EmoConfig.from_pretrained(tmp_path / "out")
    assert (kept.document_pool_min, kept.document_pool_max, kept.document_pool_eval) == (4, 16, 6)
    assert (kept.balance_loss_coef, kept.router_z_loss_coef, kept.lm_z_loss_coef) == (0.25, 0.5, 0.125)
    assert kept.attention_within_documents and kept.dtype == torch.float32
    assert kept.attention_dropout == 0.0625
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.pad_token_id, generation.eos_token_id) == (255, 235)
    assert "pad_token" not in json.loads((tmp_path / "out" / "generation_config.json").read_text())


def test_logits_are_those_of_the_training_library(step10, tmp_path):
    golden = load_file(GOLDEN / "outputs.safetensors")
    config = convert_olmo_core(step10, tmp_path / "out", verify=True, progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = golden["olmo_core_unrestricted.logits_full_vocab"][..., :256]
    assert_same_numbers(model(golden["input_ids"]).logits, expected)
    checkpoint = DistributedCheckpoint(step10 / "model_and_optim")
    for row, logits in zip(golden["input_ids"], expected, strict=True):
        assert_same_numbers(training_logits(checkpoint, config, row), logits)
    provenance = json.loads((tmp_path / "out" / from_olmo_core.PROVENANCE).read_text())
    assert provenance["step"] == "step10" and 0 < provenance["largest_logit_difference"] < 1e-4


@pytest.mark.parametrize("wrong", ["gate and up", "not transposed", "experts moved"])
def test_verification_finds_a_wrong_conversion(wrong, step10, tmp_path, monkeypatch):
    right = from_olmo_core._plan

    def plan(*arguments):
        parts = right(*arguments)
        names = [part.name for part in parts]
        if wrong == "experts moved":
            names = [
                name.replace("experts.0.", "experts.x.").replace("experts.15.", "experts.0.")
                for name in names
            ]
            names = [name.replace("experts.x.", "experts.15.") for name in names]
        elif wrong == "gate and up":
            swap = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
            names = [".".join(swap.get(word, word) for word in name.split(".")) for name in names]
        parts = [dataclasses.replace(part, name=name) for name, part in zip(names, parts, strict=True)]
        if wrong == "not transposed":  # the same numbers in another order
            parts = [dataclasses.replace(part, transposed=False) for part in parts]
        return parts

    monkeypatch.setattr(from_olmo_core, "_plan", plan)
    with pytest.raises(ValueError, match="logits differ"):
        convert_olmo_core(step10, tmp_path / "out", verify=True, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_verification_finds_a_flipped_bit(step10, tmp_path):
    shutil.copytree(step10, tmp_path / "step")
    weights = DistributedCheckpoint(tmp_path / "step" / "model_and_optim")
    name = "model.blocks.1.feed_forward_moe.experts.mlp.w2"
    file, start, *_ = weights[name].ranges(200, 201)[0]
    with open(tmp_path / "step" / "model_and_optim" / file, "r+b") as shard:
        shard.seek(start)
        byte = shard.read(1)[0]
        shard.seek(start)
        shard.write(bytes([byte ^ 1]))  # the lowest bit of one weight: no logit would tell
    with pytest.raises(CheckpointError, match=f"{name} .*checksum .* copy it again"):
        convert_olmo_core(tmp_path / "step", tmp_path / "out", verify=True, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("compression", [8, 12])
def test_a_description_with_a_false_compression_is_damage(compression, step10, tmp_path):
    shutil.copytree(step10, tmp_path / "step")
    for shard in (tmp_path / "step" / "model_and_optim").glob("*.distcp"):
        data = shard.read_bytes()
        for signature, place in ((b"PK\x01\x02", 10), (b"PK\x03\x04", 8)):
            at = -1
            while (at := data.find(signature, at + 1)) >= 0:
                if b"byteorder" in data[at : at + 80]:
                    data = data[: at + place] + bytes([compression]) + data[at + place + 1 :]
        shard.write_bytes(data)
    with pytest.raises(CheckpointError, match="copy the file again"):
        convert_olmo_core(tmp_path / "step", tmp_path / "out", progress=False)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_dtypes(dtype, step10, tmp_path):
    convert_olmo_core(step10, tmp_path / "out", dtype=dtype, verify=True, progress=False)
    wanted = {"bfloat16": torch.bfloat16}.get(dtype, dtype)
    assert same(load(tmp_path / "out"), {name: t.to(wanted) for name, t in load(EXPECTED).items()})
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == wanted


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_any_number_of_ranks_and_shards_gives_the_same(ranks, step10, config, tmp_path):
    write_step(tmp_path / "step", config, model_tensors(step10), ranks)
    convert_olmo_core(tmp_path / "step", tmp_path / "out", max_shard_size="100KB", progress=False)
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert len(files) > 5 and all(file.stat().st_size < 110_000 for file in files)
    assert same(load(tmp_path / "out"), load(EXPECTED))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(load(EXPECTED))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


def standard(config: dict) -> dict:
    """The same network with a router without pools."""
    moe = config["model"]["block"]["feed_forward_moe"]
    moe["router"] = {
        "name": "default",
        "top_k": 4,
        "gating_function": "softmax",
        "num_shared_experts": 1,
        "_CLASS_": "olmo_core.nn.moe.router_lbreducedp_sharedexp.MoELinearLBReduceDPSharedExpRouterConfig",
    }
    config["dataset"]["generate_doc_lengths"] = False
    return config


def dense(config: dict, tensors: dict) -> tuple[dict, dict]:
    """A dense network beside it."""
    block = config["model"]["block"]
    del block["feed_forward_moe"]
    block |= {"name": "default", "feed_forward": {"hidden_size": 40, "bias": False, "name": "default"}}
    tensors = {name: tensor for name, tensor in tensors.items() if "feed_forward_moe" not in name}
    torch.manual_seed(0)
    for layer in range(2):
        for name, shape in {"w1": (40, 64), "w2": (64, 40), "w3": (40, 64)}.items():
            tensors[f"model.blocks.{layer}.feed_forward.{name}.weight"] = torch.randn(shape) / 5
    return config, tensors


def test_standard_mixtures_of_experts(step10, config, tmp_path):
    write_step(tmp_path / "step", standard(config), model_tensors(step10))
    converted = convert_olmo_core(tmp_path / "step", tmp_path / "out", verify=True, progress=False)
    assert converted.document_pool_min is None and not converted.attention_within_documents
    assert converted.num_shared_experts == 1 and same(load(tmp_path / "out"), load(EXPECTED))


def test_dense_models(step10, config, tmp_path):
    write_step(tmp_path / "step", *dense(config, model_tensors(step10)))
    convert_olmo_core(tmp_path / "step", tmp_path / "out", verify=True, progress=False)
    tensors = load(tmp_path / "out")
    assert tensors["model.layers.1.mlp.down_proj.weight"].shape == (64, 40)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_experts_per_layer == [0, 0] and model.num_parameters() == sum(
        tensor.numel() for tensor in tensors.values()
    )


def test_the_tokenizer_is_copied(step10, tmp_path):
    convert_olmo_core(step10, tmp_path / "out", tokenizer=TOY, progress=False)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (TOY / file).read_bytes()
    with pytest.raises(FileNotFoundError, match="no tokenizer files"):
        convert_olmo_core(step10, tmp_path / "other", tokenizer=tmp_path, progress=False)


SETTINGS = {
    "model.d_model": (None, 0, "64", True, 65),
    "model.n_layers": (10**9, 3.0),
    "model.block.name": ("reordered_norm", "normalized", None),
    "model.block.sequence_mixer": (None, "attention"),
    "model.block.sequence_mixer.qk_norm": ({"name": "rms"},),
    "model.block.sequence_mixer.bias": (True,),
    "model.block.sequence_mixer.dropout": (1.0, -0.1, float("nan"), "0.1", True),
    "model.block.dropout": (0.1,),
    "model.block.sequence_mixer.rope.scaling": ({"factor": 8},),
    "model.block.sequence_mixer.rope.theta": (float("inf"), 0, -1.0),
    "model.block.sequence_mixer.sliding_window": ({"pattern": [1]},),
    "model.block.layer_norm.name": ("l2_norm",),
    "model.block.layer_norm.eps": (1e-5,),
    "model.block_overrides": ({"0": {}},),
    "model.block.feed_forward_moe": (None, [], {}),
    "model.block.feed_forward_moe.shared_mlp": ({"hidden_size": 8},),
    "model.block.feed_forward_moe.num_experts": (-1,),
    "model.block.feed_forward_moe.router.gating_function": ("sigmoid",),
    "model.block.feed_forward_moe.router.bias_gamma": (0.1,),
    "model.block.feed_forward_moe.router.num_shared_experts": (2, 5),
    "model.block.feed_forward_moe.router.normalize_expert_weights": (1.0, 2.0),
    "model.block.feed_forward_moe.router.top_k": (17, 0),
    "model.block.feed_forward_moe.router.min_document_expert_pool": (1, None, 20),
    "model.block.feed_forward_moe.router.eos_token_id": (7,),
    "model.block.feed_forward_moe.router._CLASS_": ("os.system", "a.MoETwoLevelRouterConfig", None),
    "dataset.tokenizer.vocab_size": (321, None),
    "model": (None, []),
}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        pytest.param(name, value, id=f"{name}={value}")
        for name, values in SETTINGS.items()
        for value in values
    ],
)
def test_settings_that_change_the_network_are_refused(setting, value, step10, config, tmp_path):
    *path, last = setting.split(".")
    inner = config
    for key in path:
        inner = inner[key]
    inner[last] = value
    step = tmp_path / "step"
    shutil.copytree(step10, step)
    (step / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, CheckpointError)) as error:
        convert_olmo_core(step, tmp_path / "out", progress=False)
    message = str(error.value)
    assert last in message or any(word in message for word in ("token 7", "experts", "document_pool_min"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step"]


@pytest.mark.parametrize("damage", ["extra", "missing", "shape", "integers", "cut"])
def test_checkpoints_that_do_not_fit_are_refused_before_writing(damage, step10, config, tmp_path):
    tensors = model_tensors(step10)
    name = "model.blocks.1.feed_forward_moe.experts.mlp.w2"
    if damage == "extra":
        name = "model.blocks.0.attention.q_norm.weight"
        tensors[name] = torch.ones(64)
    elif damage == "missing":
        del tensors[name]
    elif damage == "shape":
        tensors[name] = tensors[name][:-1]
    elif damage == "integers":
        tensors[name] = tensors[name].int()
    step = write_step(tmp_path / "step", config, tensors, ranks=3)
    if damage == "cut":
        file = step / "model_and_optim" / "__2_0.distcp"
        os.truncate(file, file.stat().st_size - 1)
        name = file.name
    with pytest.raises(CheckpointError, match=name):
        convert_olmo_core(step, tmp_path / "out", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step"]


def test_arguments_are_checked_first(step10, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        convert_olmo_core(step10, tmp_path / "there")
    for wrong in ({"dtype": "int8"}, {"max_shard_size": "5 apples"}, {"max_shard_size": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            convert_olmo_core(step10, tmp_path / "out", **wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_run_that_is_killed_leaves_nothing_under_the_name(step10, tmp_path):
    code = """
import os, signal, sys
from transformers_emo.conversion import convert_olmo_core, from_olmo_core
write, count = from_olmo_core.PartWriter.write, 0
def killing(*args):
    global count
    count += 1
    if count > 5:
        os.kill(os.getpid(), signal.SIGKILL)
    write(*args)
from_olmo_core.PartWriter.write = killing
convert_olmo_core(sys.argv[1], sys.argv[2], progress=False)
"""
    done = fresh_processes.run(code, str(step10), str(tmp_path / "out"))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    convert_olmo_core(step10, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert same(load(tmp_path / "out"), load(EXPECTED))


def test_an_error_while_writing_leaves_nothing(step10, tmp_path, monkeypatch):
    write = from_olmo_core.PartWriter.write

    def fail(writer, part, descriptor, offset):
        if part.name == "model.layers.1.mlp.experts.3.up_proj.weight":
            raise OSError("disk full")
        write(writer, part, descriptor, offset)

    monkeypatch.setattr(from_olmo_core.PartWriter, "write", fail)
    with pytest.raises(OSError, match="disk full"):
        convert_olmo_core(step10, tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_command_converts(step10, tmp_path, capsys):
    words = ["convert", "olmo-core-to-hf", str(step10), str(tmp_path / "out"), "--verify"]
    assert cli.main([*words, "--tokenizer", str(TOY), "--dtype", "bfloat16"]) == 0
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert load(tmp_path / "out")["lm_head.weight"].dtype == torch.bfloat16
    assert cli.main(words) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("emo convert: ")
