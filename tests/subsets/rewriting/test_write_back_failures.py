"""A write-back that cannot go on: nothing half-written, one clear error, and the next run goes on."""

import errno
import shutil
import signal
import sys

import fresh_processes
import pytest
import torch
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from transformers_emo import CheckpointError, EmoForCausalLM, SubsetError, extract_subset, write_back
from transformers_emo.checkpoints.local_files import LocalFiles
from transformers_emo.checkpoints.writing import output_folder
from tuned_models import FIRST, SECOND, same_files, trained


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

    @pytest.mark.parametrize(
        ("change", "differs"),
        [
            ("weight", "weight"),
            ("tuned", "tuned model 1"),
            ("full", "full"),
            ("config of the tuned", "tuned model 1"),
            ("config of the full", "full"),
        ],
    )
    def test_a_run_of_another_job_uses_and_loses_nothing(
        self, models, tmp_path, monkeypatch, edit_json, change, differs
    ):
        full, tuned = models
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            self.stop_after(patch, 250_000)
            write_back(full, tuned, out=tmp_path / "out", progress=False)
        whole = sorted((tmp_path / ".out.partial").glob("*.safetensors"))
        weight = 0.5 if change == "weight" else 1.0
        if change == "tuned":
            trained(full, FIRST, tuned, steps=2)
        elif change == "full":
            for file in full.glob("*.safetensors"):
                tensors = {n: t * 2 if "q_proj" in n else t for n, t in load_file(file).items()}
                save_file(tensors, file, metadata={"format": "pt"})
        elif "config" in change:
            edit_json((full if "full" in change else tuned) / "config.json", rope_theta=12345.0)
        with pytest.raises(FileExistsError, match=f"files of another job .* differs in {differs} "):
            write_back(full, tuned, out=tmp_path / "out", weight=weight, progress=False)
        assert whole and all(file.exists() for file in whole)
        shutil.rmtree(tmp_path / ".out.partial")
        write_back(full, tuned, out=tmp_path / "out", weight=weight, progress=False)
        write_back(full, tuned, out=tmp_path / "afresh", weight=weight, progress=False)
        assert same_files(tmp_path / "afresh", tmp_path / "out")
        assert not same_files(tmp_path / "expected", tmp_path / "out") or change == "config of the tuned"

    def test_of_a_model_in_memory_nothing_is_kept(self, models, tmp_path, monkeypatch):
        full, tuned = models
        model = EmoForCausalLM.from_pretrained(tuned)
        for _ in range(2):
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                self.stop_after(patch, 250_000)
                write_back(full, model, out=tmp_path / "out", progress=False)
            assert not (tmp_path / ".out.partial").exists()
        write_back(full, model, out=tmp_path / "out", progress=False)
        assert same_files(tmp_path / "expected", tmp_path / "out")

    @pytest.mark.parametrize("which", ["full", "tuned"])
    def test_a_model_that_changes_meanwhile_is_told(self, models, tmp_path, monkeypatch, which):
        full, tuned = models
        module, folder = sys.modules[write_back.__module__], full if which == "full" else tuned
        original = module._copy_rest

        def meanwhile(*args):
            original(*args)
            file = min(folder.glob("*.safetensors"))
            shutil.copy(file, tmp_path / "new")
            (tmp_path / "new").replace(file)

        with monkeypatch.context() as patch:
            patch.setattr(module, "_copy_rest", meanwhile)
            message = f"{which} changed while it was read.*Nothing of .*out is left"
            with pytest.raises(CheckpointError, match=message):
                write_back(full, tuned, out=tmp_path / "out", progress=False)
        assert not (tmp_path / ".out.partial").exists()
        write_back(full, tuned, out=tmp_path / "out", progress=False)
        assert same_files(tmp_path / "expected", tmp_path / "out")

    def test_a_repository_that_changes_between_two_runs_is_another_job(self, models, tmp_path):
        full, tuned = models
        other = tmp_path / "other"
        shutil.copytree(full, other)
        for file in other.glob("*.safetensors"):  # of the same sizes, to the byte
            save_file({n: t * 2 for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
        code = f"""
import sys
from transformers_emo import write_back
module, left = sys.modules[write_back.__module__], 20
original = module._copy
def stopped(*args):
    global left
    left -= 1
    if left == 0:
        raise KeyboardInterrupt
    original(*args)
module._copy = stopped
tuned, out = {str(tuned)!r}, {str(tmp_path / "out")!r}
for revision in ("main", "later", "main"):
    try:
        write_back("user/emo", tuned, out=out, revision=revision, progress=False)
    except (KeyboardInterrupt, FileExistsError) as error:
        print(type(error).__name__, error)
"""
        with HubServer() as hub:
            hub.commit("user/emo", full)
            hub.commit("user/emo", other, branch="later")
            first, second = hub.run(code).splitlines()
        assert first.startswith("KeyboardInterrupt")
        assert second.startswith("FileExistsError") and "differs in full " in second
        assert same_files(tmp_path / "expected", tmp_path / "out")

    def test_two_runs_do_not_write_to_one_folder(self, models, tmp_path):
        full, tuned = models
        with pytest.raises(KeyboardInterrupt), output_folder.new_folder(tmp_path / "out") as work:
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
from transformers_emo.checkpoints import checkpoint
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
        process = fresh_processes.run(code)
        assert process.returncode == -signal.SIGKILL, process.stderr
        assert not (tmp_path / "out").exists()
        whole = {p.name: p.stat().st_mtime_ns for p in (tmp_path / ".out.partial").glob("*.safetensors")}
        assert whole
        write_back(full, tuned, out=tmp_path / "out", progress=False)
        assert all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in whole.items())
        assert same_files(tmp_path / "expected", tmp_path / "out")

    @pytest.mark.skipif(sys.platform != "linux", reason="file sizes are limited by the kernel")
    def test_what_the_system_refuses_to_write_loses_nothing(self, models, tmp_path):
        full, tuned = models
        sizes = {file.name: file.stat().st_size for file in full.glob("*.safetensors")}
        most = sorted(set(sizes.values()))[-1]  # the largest file is one byte too long
        assert min(sizes) not in [name for name in sizes if sizes[name] == most]
        code = f"""
import resource
from transformers_emo import write_back
resource.setrlimit(resource.RLIMIT_FSIZE, ({most - 1}, {most - 1}))
try:
    write_back({str(full)!r}, {str(tuned)!r}, out={str(tmp_path / "out")!r}, progress=False)
except OSError as error:
    print(error)
"""
        process = fresh_processes.run(code, check=True)
        assert "File too large" in process.stdout and "partial holds what was finished" in process.stdout
        whole = list((tmp_path / ".out.partial").glob("*.safetensors"))
        assert whole and not (tmp_path / "out").exists()
        write_back(full, tuned, out=tmp_path / "out", progress=False)
        assert same_files(tmp_path / "expected", tmp_path / "out")

    @pytest.mark.parametrize("error", ["full disk", "damaged shard"])
    def test_an_error_on_the_way_loses_nothing(self, models, tmp_path, monkeypatch, error):
        full, tuned = models

        def failing(checkpoint, file, *args):
            if "00003" not in file:
                return original(checkpoint, file, *args)
            if error == "full disk":
                raise OSError(errno.ENOSPC, "No space left on device")
            raise CheckpointError("The shard is cut short.")

        module = sys.modules[write_back.__module__]
        original = module._copy
        message = {"full disk": "disk is full", "damaged shard": "cut short"}[error]
        with (
            monkeypatch.context() as patch,
            pytest.raises(OSError, match=rf"{message}.*\.out\.partial holds .*to continue"),
        ):
            patch.setattr(module, "_copy", failing)
            write_back(full, tuned, out=tmp_path / "out", progress=False)
        assert len(list((tmp_path / ".out.partial").glob("*.safetensors"))) == 2
        write_back(full, tuned, out=tmp_path / "out", progress=False)
        assert same_files(tmp_path / "expected", tmp_path / "out")

    def test_a_disk_without_room_is_told_beforehand(self, models, tmp_path, monkeypatch):
        full, tuned = models
        with monkeypatch.context() as patch:
            usage = shutil.disk_usage(tmp_path)
            patch.setattr(output_folder.shutil, "disk_usage", lambda path: usage._replace(free=1000))
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

    @pytest.mark.parametrize("where", ["folder", "memory"])
    def test_values_that_are_not_finite(self, make_checkpoint, tmp_path, where):
        full = make_checkpoint(shards=True)
        model = EmoForCausalLM.from_pretrained(full, expert_subset=FIRST)
        model.model.layers[1].mlp.experts.down_proj.data[0, 0, 0] = float("nan")
        model.save_pretrained(tmp_path / "tuned")
        tuned = model if where == "memory" else tmp_path / "tuned"
        message = r"layers\.1\.mlp\.experts\.1\.down_proj\.weight would hold .*Nothing of .*out is left"
        with pytest.raises(ValueError, match=message):
            write_back(full, tuned, out=tmp_path / "out", progress=False)
        assert [path.name for path in tmp_path.iterdir()] == ["tuned"]
