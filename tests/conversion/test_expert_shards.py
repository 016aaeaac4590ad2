"""Cutting a checkpoint by expert."""

import json
import os
import shutil
import signal

import fresh_processes
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers_emo import CheckpointError, EmoConfig, EmoForCausalLM
from transformers_emo.conversion import expert_shards, shard_experts, upgrade_checkpoint
from transformers_emo.conversion.expert_shards import BACKBONE, plan_expert_files


def tensors_of(folder):
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("experts_per_file", [1, 4])
def test_every_tensor_is_in_one_file_and_plain_transformers_loads_them(
    make_checkpoint, tmp_path, experts_per_file
):
    source = make_checkpoint(shards=True)
    (source / "subsets").mkdir()
    (source / "subsets" / "math.json").write_text('{"experts": [[0, 11], [1, 11], [2, 11]]}')
    out = tmp_path / "out"
    files = shard_experts(source, out, experts_per_file=experts_per_file, progress=False)
    assert same(tensors_of(source), tensors_of(out))
    assert len(files) == len(list(out.glob("*.safetensors"))) == 1 + 3 * (11 if experts_per_file == 1 else 3)
    whole = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert same(whole, EmoForCausalLM.from_pretrained(source).state_dict())
    part = EmoForCausalLM.from_pretrained(out, expert_subset=[[0, 11], [1, 11], [2, 11]]).state_dict()
    assert part["model.layers.1.mlp.gate.weight"].shape == (2, 32)
    copied = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} - set(files)
    there = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    assert copied == {name for name in there if not name.endswith(".safetensors")}


def test_the_notes_of_a_conversion_come_along_without_hashes_of_other_files(make_checkpoint, tmp_path):
    upgrade_checkpoint(make_checkpoint(), tmp_path / "model", progress=False)
    shard_experts(tmp_path / "model", tmp_path / "out", progress=False)
    before, after = (json.loads((tmp_path / f / "conversion.json").read_text()) for f in ("model", "out"))
    assert before.pop("sha256") and after == before


def test_experts_that_every_subset_keeps_are_in_the_backbone():
    config = EmoConfig(num_hidden_layers=2, num_experts=8, num_experts_per_tok=4, num_shared_experts=2)
    names = [f"model.layers.{i}.mlp.experts.{e}.up_proj.weight" for i in range(2) for e in range(8)]
    files = plan_expert_files([*names, "model.norm.weight"], config)
    shared = [name for name in names if ".6." in name or ".7." in name]
    assert sorted(files[BACKBONE]) == sorted([*shared, "model.norm.weight"])
    assert all(len(held) == 1 for file, held in files.items() if file != BACKBONE)


def test_tensors_of_several_dtypes_are_aligned(make_checkpoint, tmp_path):
    source = make_checkpoint()
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    shard_experts(source, tmp_path / "out", progress=False)
    assert same(tensors, tensors_of(tmp_path / "out"))


def test_a_killed_run_is_continued(make_checkpoint, tmp_path):
    source, out = make_checkpoint(), tmp_path / "out"
    # Killed after the tenth file: in the middle of the next one.
    code = f"""
import os, signal
from transformers_emo.conversion import expert_shards
write, count = expert_shards._write, 0
def killing(path, *args):
    global count
    count += 1
    if count > 10:
        (path.parent / (path.name + ".partial")).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, *args)
expert_shards._write = killing
expert_shards.shard_experts({str(source)!r}, {str(out)!r}, progress=False)
"""
    done = fresh_processes.run(code)
    partial = tmp_path / ".out.partial"
    assert done.returncode == -signal.SIGKILL and not out.exists()
    first = {path: path.stat().st_ino for path in partial.glob("*.safetensors")}
    assert len(first) == 10
    cut = first.popitem()[0]  # as a disk leaves it that was full or torn off
    os.truncate(cut, 100)
    shard_experts(source, out, progress=False)
    assert not partial.exists() and not list(out.glob("*.partial")) and not (out / ".plan.json").exists()
    assert all((out / path.name).stat().st_ino == inode for path, inode in first.items())
    assert same(tensors_of(source), tensors_of(out))


@pytest.mark.parametrize("changed", ["weights", "config"])
def test_files_of_a_run_on_another_source_are_not_used(
    make_checkpoint, tmp_path, monkeypatch, edit_json, changed
):
    source, original = make_checkpoint(), expert_shards._write

    def stopped(path, *args):
        if "layer01" in path.name:
            raise KeyboardInterrupt
        original(path, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(expert_shards, "_write", stopped)
        shard_experts(source, tmp_path / "out", progress=False)
    if changed == "config":
        edit_json(source / "config.json", rope_theta=12345.0)
    else:
        shutil.copy(make_checkpoint(1) / "model.safetensors", source / "model.safetensors")
    with pytest.raises(FileExistsError, match="files of another job .* differs in source"):
        shard_experts(source, tmp_path / "out", progress=False)
    shutil.rmtree(tmp_path / ".out.partial")
    shard_experts(source, tmp_path / "out", progress=False)
    assert same(tensors_of(source), tensors_of(tmp_path / "out"))


def test_bad_input_is_refused_and_nothing_is_written(make_checkpoint, tmp_path):
    source = make_checkpoint()
    with pytest.raises(ValueError, match="experts_per_file"):
        shard_experts(source, tmp_path / "out", experts_per_file=0)
    with pytest.raises(FileExistsError):
        shard_experts(source, source)
    with pytest.raises(CheckpointError, match="save_pretrained"):
        plan_expert_files(["model.layers.0.mlp.experts.gate_up_proj"], EmoConfig())
    tensors = load_file(source / "model.safetensors")
    for name in ("model.layers.1.self_attn.v_proj.weight", "lm_head.weight"):
        save_file({n: t for n, t in tensors.items() if n != name}, source / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"lacks the tensor {name.removeprefix('model.')}"):
            shard_experts(source, tmp_path / "out", progress=False)
    os.truncate(source / "model.safetensors", 1000)
    with pytest.raises(CheckpointError):
        shard_experts(source, tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []
