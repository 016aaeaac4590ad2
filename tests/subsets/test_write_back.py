"""Fine-tuned subsets go back into the full model: only what is meant to changes, to the byte."""

import errno
import hashlib
import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from hub_server import HubServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers_emo import (
    CheckpointError,
    EmoForCausalLM,
    ExpertSubset,
    SubsetError,
    extract_subset,
    write_back,
)
from transformers_emo.subsets import model_folder
from transformers_emo.subsets.checkpoint import LocalFiles
from transformers_emo.training import train_only

INPUT_IDS = torch.tensor([[5, 17, 60, 2, 33, 8, 90], [44, 44, 3, 71, 12, 9, 28]])
FIRST = [[0, 3, 4, 11], [1, 5, 11], [0, 6, 9, 10, 11]]
SECOND = [[3, 7, 11], [5, 6, 8, 11], [2, 11]]
MATRICES = ("gate_proj", "up_proj", "down_proj")


def hashes(folder) -> dict[str, str]:
    """The SHA-256 of every tensor, router rows one by one."""
    found = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            rows = {f"{name}[{i}]": row for i, row in enumerate(tensor)} if "mlp.gate." in name else {}
            for key, value in (rows or {name: tensor}).items():
                raw = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                found[key] = hashlib.sha256(raw).hexdigest()
    return found


def changed(before, after) -> set[str]:
    before, after = hashes(before), hashes(after)
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def expert_names(experts, *, drop=()) -> set[str]:
    return {
        f"model.layers.{layer}.mlp.experts.{e}.{matrix}.weight"
        for layer, ids in enumerate(experts)
        for e in ids or ()
        if e not in drop
        for matrix in MATRICES
    }


def router_names(experts) -> set[str]:
    return {f"model.layers.{i}.mlp.gate.weight[{e}]" for i, ids in enumerate(experts) for e in ids or ()}


def trained(folder, experts, out, what="all", steps: int = 1):
    """A subset after training steps, in memory and saved."""
    model = EmoForCausalLM.from_pretrained(folder, expert_subset=experts)
    train_only(model, what)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(out)
    return model


def same_files(first, second, files=("*.safetensors", "*.json")) -> bool:
    names = sorted(path.name for pattern in files for path in first.glob(pattern))
    return bool(names) and all((first / n).read_bytes() == (second / n).read_bytes() for n in names)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_shared_experts": 0},
        {"num_experts_per_layer": [12, 0, 12], "dense_intermediate_size": 20},
        {"num_shared_experts": 0, "always_active_experts": [11, 3]},
    ],
    ids=["released", "no shared", "dense layer", "always active"],
)
def test_after_training_exactly_the_kept_experts_change(make_checkpoint, tmp_path, changes):
    full = make_checkpoint(shards=True, **changes)
    experts = [[0, 3, 4, 11], [1, 3, 11], [0, 3, 9, 10, 11]]
    if "num_experts_per_layer" in changes:
        experts[1] = None
    model = trained(full, experts, tmp_path / "tuned", "routed")
    result = write_back(full, tmp_path / "tuned", out=tmp_path / "out", progress=False)
    always = changes.get("always_active_experts") or ([] if "num_shared_experts" in changes else [11])
    expected = expert_names(experts, drop=always)
    assert changed(full, tmp_path / "out") == expected == {f"model.{name}" for name in result.written}
    assert result.averaged == []
    # The full model, masked to the subset, now is the tuned one.
    updated = EmoForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad(), updated.use_experts(experts):
        torch.testing.assert_close(
            updated(INPUT_IDS).logits, model.eval()(INPUT_IDS).logits, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("routed", {"routed"}),
        ("shared", {"shared"}),
        ("router", {"router"}),
        ("routed+shared+router", {"routed", "shared", "router"}),
        ("backbone", {"backbone"}),
        ("all", {"routed", "shared", "router", "backbone"}),
    ],
)
def test_only_what_is_asked_for_is_written(make_checkpoint, tmp_path, what, parts):
    full = make_checkpoint()
    trained(full, FIRST, tmp_path / "tuned", "all")  # everything was trained
    write_back(full, tmp_path / "tuned", out=tmp_path / "out", what=what, progress=False)
    shared = expert_names([[11]] * 3)
    # With one shared expert, its softmax weight is 1 whatever its row: that row gets no gradient.
    by_part = {
        "routed": expert_names(FIRST) - shared,
        "shared": shared,
        "router": router_names(FIRST) - router_names([[11]] * 3),
    }
    others = {name for name in hashes(full) if ".experts." not in name and ".mlp.gate." not in name}
    by_part["backbone"] = others
    assert changed(full, tmp_path / "out") == set().union(*(by_part[part] for part in parts))


@pytest.mark.parametrize("layout", ["single", "sharded", "stacked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("what", "weight"), [("routed", 1.0), ("all", 1.0), ("all", 0.3)])
def test_without_training_every_file_is_the_same(make_checkpoint, tmp_path, layout, dtype, what, weight):
    full = make_checkpoint(shards=layout == "sharded")
    if layout == "stacked":
        model = EmoForCausalLM.from_pretrained(full)
        full = tmp_path / "stacked"
        model.save_pretrained(full, save_original_format=False)
    tuned = []
    for number, experts in enumerate((FIRST, SECOND, FIRST)):  # saved in bf16, weights lose digits
        tuned.append(tmp_path / str(number))
        EmoForCausalLM.from_pretrained(full, expert_subset=experts, dtype=dtype).save_pretrained(tuned[-1])
    write_back(full, tuned, out=tmp_path / "out", what=what, weight=weight, progress=False)
    assert same_files(full, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in full.iterdir()}


def test_an_extracted_subset_goes_back_to_where_it_came_from(make_checkpoint, tmp_path):
    full = make_checkpoint(shards=True)
    extract_subset(full, FIRST, tmp_path / "small", progress=False)
    write_back(full, tmp_path / "small", out=tmp_path / "out", what="all", progress=False)
    assert same_files(full, tmp_path / "out")


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), weight=st.sampled_from([0.25, 0.5, 1.0]))
def test_overlaps_are_averaged_and_blended(make_checkpoint, tmp_path_factory, monkeypatch, data, weight):
    # Less than a matrix at a time.
    monkeypatch.setattr(sys.modules[write_back.__module__], "_BUFFER_BYTES", 1000)
    full = make_checkpoint()
    folder = tmp_path_factory.mktemp("blend")
    routed = st.sets(st.integers(0, 10), min_size=1, max_size=5)
    before = load_file(full / "model.safetensors")
    total: dict[str, list[torch.Tensor]] = {}
    for number in range(data.draw(st.integers(1, 3))):
        experts = [sorted(data.draw(routed)) + [11] for _ in range(3)]
        model = EmoForCausalLM.from_pretrained(full, expert_subset=experts)
        for layer in model.model.layers:
            for parameter in layer.mlp.experts.parameters():
                parameter.data += torch.randn_like(parameter)
        model.save_pretrained(folder / str(number))
        saved = load_file(folder / str(number) / "model.safetensors")
        for layer, ids in enumerate(experts):
            for local, e in enumerate(ids[:-1]):
                for matrix in MATRICES:
                    stem = f"model.layers.{layer}.mlp.experts"
                    total.setdefault(f"{stem}.{e}.{matrix}.weight", []).append(
                        saved[f"{stem}.{local}.{matrix}.weight"]
                    )
    tuned = sorted(folder.iterdir())
    result = write_back(full, tuned, out=folder / "out", weight=weight, progress=False)
    after = load_file(folder / "out" / "model.safetensors")
    assert {f"model.{n}" for n in result.averaged} == {n for n, tensors in total.items() if len(tensors) > 1}
    for name, tensor in after.items():
        if name in total:
            mean = torch.stack(total[name]).mean(0)
            expected = before[name] + weight * (mean - before[name])
            torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-6)
            if weight == 1 and len(total[name]) == 1:
                assert torch.equal(tensor, total[name][0])
        else:
            assert torch.equal(tensor, before[name])


def test_a_model_in_memory_is_written_like_its_folder(make_checkpoint, tmp_path):
    full = make_checkpoint()
    model = trained(full, FIRST, tmp_path / "tuned")
    write_back(full, tmp_path / "tuned", out=tmp_path / "a", what="all", progress=False)
    write_back(full, [model], out=tmp_path / "b", what="all", progress=False)
    assert changed(full, tmp_path / "a") and same_files(tmp_path / "a", tmp_path / "b")


def test_a_subset_of_a_subset_is_written_back_to_either(make_checkpoint, tmp_path):
    full = make_checkpoint()
    extract_subset(full, FIRST, tmp_path / "middle", progress=False)
    inner = [[3, 11], [5, 11], [6, 10, 11]]  # ids of the root model
    trained(tmp_path / "middle", inner, tmp_path / "tuned", "routed")
    write_back(full, tmp_path / "tuned", out=tmp_path / "a", progress=False)
    assert changed(full, tmp_path / "a") == expert_names(inner, drop={11})
    write_back(tmp_path / "middle", tmp_path / "tuned", out=tmp_path / "b", progress=False)
    extract_subset(tmp_path / "a", FIRST, tmp_path / "c", progress=False)
    assert hashes(tmp_path / "b") == hashes(tmp_path / "c")


def test_what_was_trained_in_half_precision_is_taken_and_the_rest_keeps_its_digits(make_checkpoint, tmp_path):
    full = make_checkpoint()
    model = EmoForCausalLM.from_pretrained(full, expert_subset=FIRST, dtype=torch.bfloat16)
    model.model.layers[0].mlp.experts.down_proj.data[1, 0, 0] = 2.0  # local expert 1 is expert 3
    model.save_pretrained(tmp_path / "tuned")
    write_back(full, tmp_path / "tuned", out=tmp_path / "out", progress=False)
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    assert changed(full, tmp_path / "out") == {name}
    before = load_file(full / "model.safetensors")[name]
    after = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert after[0, 0] == 2.0 and (before != after).sum() == 1


def test_other_files_of_the_full_model_come_along(make_checkpoint, tmp_path):
    full = make_checkpoint(shards=True)
    (full / "tokenizer_config.json").write_text("{}")
    ExpertSubset(FIRST).save(full / "subsets" / "math.json")
    trained(full, FIRST, tmp_path / "tuned")
    write_back(full, tmp_path / "tuned", out=tmp_path / "out", progress=False)
    files = {path.relative_to(full) for path in full.rglob("*")}
    assert {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")} == files
    assert EmoForCausalLM.from_pretrained(tmp_path / "out", expert_subset="math")


def test_code_that_stays_behind_is_not_named(make_checkpoint, tmp_path, edit_json):
    full = make_checkpoint()
    edit_json(full / "config.json", auto_map={"AutoModelForCausalLM": "modeling_emo.EmoForCausalLM"})
    trained(full, FIRST, tmp_path / "tuned")
    write_back(full, tmp_path / "tuned", out=tmp_path / "out", progress=False)
    config = json.loads((full / "config.json").read_text())
    del config["auto_map"]
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config


class TestInterruptions:
    """A run can be stopped at any time, and goes on where it was."""

    @staticmethod
    def stop_after(monkeypatch, bytes_read: int):
        """Stop as a signal would, after so many bytes of the full model were copied."""
        count = 0
        original = LocalFiles.read_into

        def counted(self, file, start, buffer):
            nonlocal count
            count += len(buffer) if self.folder.name == "full" else 0
            if count > bytes_read:
                raise KeyboardInterrupt
            original(self, file, start, buffer)

        monkeypatch.setattr(LocalFiles, "read_into", counted)

    @pytest.fixture
    def models(self, make_checkpoint, tmp_path):
        full = tmp_path / "full"
        shutil.copytree(make_checkpoint(shards=True), full)
        trained(full, FIRST, tmp_path / "tuned")
        write_back(full, tmp_path / "tuned", out=tmp_path / "expected", progress=False)
        return full, tmp_path / "tuned"

    def test_the_next_run_goes_on_with_the_file_it_was_at(self, models, tmp_path, monkeypatch):
        full, tuned = models
        files = sorted(full.glob("*.safetensors"))
        assert len(files) > 4
        work, out = tmp_path / ".out.partial", tmp_path / "out"
        finished: dict[str, int] = {}
        rounds = 0
        while not out.exists():
            rounds += 1
            with monkeypatch.context() as patch:
                self.stop_after(patch, 150_000)
                try:
                    write_back(full, tuned, out=out, progress=False)
                except KeyboardInterrupt:
                    assert not out.exists()
            folder = out if out.exists() else work
            whole = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
            assert finished.items() <= whole.items() and len(whole) > len(finished)
            finished = whole
        assert rounds > 2
        assert same_files(tmp_path / "expected", out) and not work.exists()
        assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "expected").iterdir()}

    @pytest.mark.parametrize("change", ["weight", "tuned", "full"])
    def test_a_run_with_other_arguments_begins_anew(self, models, tmp_path, monkeypatch, change):
        full, tuned = models
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            self.stop_after(patch, 250_000)
            write_back(full, tuned, out=tmp_path / "out", progress=False)
        assert list((tmp_path / ".out.partial").glob("*.safetensors"))
        weight = 0.5 if change == "weight" else 1.0
        if change == "tuned":
            trained(full, FIRST, tuned, steps=2)
        elif change == "full":
            for file in full.glob("*.safetensors"):
                tensors = {n: t * 2 if "q_proj" in n else t for n, t in load_file(file).items()}
                save_file(tensors, file, metadata={"format": "pt"})
        write_back(full, tuned, out=tmp_path / "out", weight=weight, progress=False)
        write_back(full, tuned, out=tmp_path / "afresh", weight=weight, progress=False)
        assert same_files(tmp_path / "afresh", tmp_path / "out")
        assert not same_files(tmp_path / "expected", tmp_path / "out")

    def test_two_runs_do_not_write_to_one_folder(self, models, tmp_path):
        full, tuned = models
        with pytest.raises(KeyboardInterrupt), model_folder.new_folder(tmp_path / "out") as work:
            (work / "of another run").touch()
            with pytest.raises(OSError, match="Another run is writing"):
                write_back(full, tuned, out=tmp_path / "out", progress=False)
            assert [path.name for path in work.iterdir()] == ["of another run"]
            raise KeyboardInterrupt
        write_back(full, tuned, out=tmp_path / "out", progress=False)
        assert same_files(tmp_path / "expected", tmp_path / "out")

    def test_a_killed_process_leaves_what_the_next_one_goes_on_with(self, models, tmp_path):
        full, tuned = models
        code = f"""
import os, signal
from transformers_emo import write_back
from transformers_emo.subsets import checkpoint
original, count = checkpoint.LocalFiles.read_into, 0

def counted(self, file, start, buffer):
    global count
    count += len(buffer)
    if count > 300_000:
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, file, start, buffer)

checkpoint.LocalFiles.read_into = counted
write_back({str(full)!r}, {str(tuned)!r}, out={str(tmp_path / "out")!r}, progress=False)
"""
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300, check=False)
        assert process.returncode == -signal.SIGKILL, process.stderr
        assert not (tmp_path / "out").exists()
        whole = {p.name: p.stat().st_mtime_ns for p in (tmp_path / ".out.partial").glob("*.safetensors")}
        assert whole
        write_back(full, tuned, out=tmp_path / "out", progress=False)
        assert all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in whole.items())
        assert same_files(tmp_path / "expected", tmp_path / "out")

    def test_a_disk_that_fills_up_on_the_way_loses_nothing(self, models, tmp_path, monkeypatch):
        full, tuned = models

        def no_room(checkpoint, file, *args):
            if "00003" in file:
                raise OSError(errno.ENOSPC, "No space left on device")
            original(checkpoint, file, *args)

        module = sys.modules[write_back.__module__]
        original = module._copy
        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk is full.*to go on"):
            patch.setattr(module, "_copy", no_room)
            write_back(full, tuned, out=tmp_path / "out", progress=False)
        assert len(list((tmp_path / ".out.partial").glob("*.safetensors"))) == 2
        write_back(full, tuned, out=tmp_path / "out", progress=False)
        assert same_files(tmp_path / "expected", tmp_path / "out")

    def test_a_disk_without_room_is_told_beforehand(self, models, tmp_path, monkeypatch):
        full, tuned = models
        with monkeypatch.context() as patch:
            usage = shutil.disk_usage(tmp_path)
            patch.setattr(model_folder.shutil, "disk_usage", lambda path: usage._replace(free=1000))
            with pytest.raises(OSError, match="make room"):
                write_back(full, tuned, out=tmp_path / "out", progress=False)
        assert not (tmp_path / "out").exists()
        write_back(full, tuned, out=tmp_path / "out", progress=False)
        assert same_files(tmp_path / "expected", tmp_path / "out")


class TestRefusals:
    """What cannot be right is said before anything is written."""

    @staticmethod
    def refused(tmp_path, error, message, *args, **kwargs):
        with pytest.raises(error, match=message):
            write_back(*args, out=tmp_path / "new" / "out", progress=False, **kwargs)
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"num_experts": 16}, SubsetError, "made for another model"),
            ({"num_hidden_layers": 2}, SubsetError, "2 layers, the model 3"),
            ({"hidden_size": 64}, CheckpointError, "`hidden_size` 64, expected 32"),
            ({"intermediate_size": 16}, CheckpointError, "`intermediate_size` 16, expected 24"),
        ],
    )
    def test_models_of_other_sizes(self, make_checkpoint, tmp_path, changes, error, message):
        other = make_checkpoint(**changes)
        self.refused(tmp_path, error, message, make_checkpoint(), other)

    def test_another_model_of_the_same_sizes(self, make_checkpoint, tmp_path):
        full, other = make_checkpoint(), make_checkpoint(seed=1)
        extract_subset(other, FIRST, tmp_path / "tuned", progress=False)
        self.refused(tmp_path, SubsetError, "does not come from", full, tmp_path / "tuned")
        write_back(full, tmp_path / "tuned", out=tmp_path / "out", check_root=False, progress=False)

    def test_the_right_model_with_the_wrong_ids(self, make_checkpoint, tmp_path, edit_json):
        full = make_checkpoint()
        extract_subset(full, FIRST, tmp_path / "tuned", progress=False)
        wrong = [FIRST[0], [2, 7, 11], FIRST[2]]
        edit_json(tmp_path / "tuned" / "config.json", retained_experts=wrong)
        self.refused(tmp_path, SubsetError, "router rows of layer 1", full, tmp_path / "tuned")

    def test_experts_that_the_full_model_has_not(self, make_checkpoint, tmp_path):
        root = make_checkpoint()
        extract_subset(root, FIRST, tmp_path / "a", progress=False)
        extract_subset(root, SECOND, tmp_path / "b", progress=False)
        self.refused(tmp_path, SubsetError, "Expert 7 of layer 0 is not in", tmp_path / "a", tmp_path / "b")

    def test_a_backbone_of_another_shape(self, make_checkpoint, tmp_path):
        full = make_checkpoint()
        model = EmoForCausalLM.from_pretrained(full, expert_subset=FIRST)
        model.resize_token_embeddings(100)
        self.refused(tmp_path, CheckpointError, r"embed_tokens.weight has shape", full, model, what="all")
        write_back(full, model, out=tmp_path / "out", progress=False)  # the experts are as they were
        assert same_files(full, tmp_path / "out")

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"what": "experts"}, "`what` is 'experts'"),
            ({"what": ""}, "`what` is ''"),
            ({"weight": 1.5}, "`weight` is 1.5"),
            ({"weight": float("nan")}, "`weight` is nan"),
            ({"weight": "1"}, "`weight` is '1'"),
        ],
    )
    def test_arguments(self, make_checkpoint, tmp_path, kwargs, message):
        full = make_checkpoint()
        self.refused(tmp_path, ValueError, message, full, full, **kwargs)

    def test_what_is_no_model(self, make_checkpoint, tmp_path):
        full = make_checkpoint()
        self.refused(tmp_path, ValueError, "at least one", full, [])
        self.refused(tmp_path, ValueError, "Cannot write back a Linear", full, torch.nn.Linear(2, 2))

    def test_nothing_to_write(self, make_checkpoint, tmp_path):
        full = make_checkpoint(num_shared_experts=0)
        self.refused(tmp_path, ValueError, "Nothing to write", full, full, what="shared")

    def test_a_folder_that_is_there(self, make_checkpoint, tmp_path):
        full = make_checkpoint()
        with pytest.raises(FileExistsError, match="exists already"):
            write_back(full, full, out=full, progress=False)

    def test_quantised_models(self, make_checkpoint, tmp_path, edit_json):
        full, tuned = make_checkpoint(), make_checkpoint()
        edit_json(tuned / "config.json", quantization_config={"quant_method": "bitsandbytes"})
        self.refused(tmp_path, CheckpointError, "quantised", full, tuned)

    def test_values_that_are_not_finite(self, make_checkpoint, tmp_path):
        full = make_checkpoint()
        model = EmoForCausalLM.from_pretrained(full, expert_subset=FIRST)
        model.model.layers[1].mlp.experts.down_proj.data[0, 0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.1\.down_proj\.weight would hold"):
            write_back(full, model, out=tmp_path / "out", progress=False)
        assert not (tmp_path / "out").exists()


def test_models_on_the_hub_are_taken_apart_and_put_together(make_checkpoint, tmp_path):
    full = make_checkpoint(shards=True)
    ExpertSubset(FIRST).save(full / "subsets" / "math.json")
    extract_subset(full, FIRST, tmp_path / "local", progress=False)
    code = f"""
from pathlib import Path
from transformers_emo import extract_subset, write_back
work = Path({str(tmp_path)!r})
extract_subset("user/emo", "math", work / "small", revision="main", progress=False)
write_back("user/emo", work / "small", out=work / "out", revision="main", progress=False)
"""
    with HubServer() as hub:
        hub.commit("user/emo", full)
        hub.run(code)
    assert same_files(tmp_path / "local", tmp_path / "small")
    assert same_files(full, tmp_path / "out")
