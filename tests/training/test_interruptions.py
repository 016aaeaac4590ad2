"""What is left of a training run that ends early: after a power cut, and after Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from training_runs import make_trainer
from transformers_emo import cli
from transformers_emo.training import last_checkpoint, trainer

RECIPE = "examples/recipes/pretrain.yaml"


class TestDurability:
    @pytest.fixture
    def events(self, monkeypatch):
        """What reaches the disk and what is deleted, in order."""
        events = []
        sync, rotate = trainer.sync_tree, trainer.rotate_checkpoints

        def synced(folder):
            events.append(("sync", os.path.basename(folder), frozenset(os.listdir(folder))))
            sync(folder)

        def rotated(**kwargs):
            before = set(os.listdir(kwargs["output_dir"]))
            rotate(**kwargs)
            gone = before - set(os.listdir(kwargs["output_dir"]))
            events.extend(("delete", name) for name in sorted(gone))

        monkeypatch.setattr(trainer, "sync_tree", synced)
        monkeypatch.setattr(trainer, "rotate_checkpoints", rotated)
        return events

    def test_a_checkpoint_is_on_disk_before_it_is_whole_and_before_another_is_deleted(
        self, make_model, tmp_path, events
    ):
        run = make_trainer(
            make_model(), tmp_path, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1
        )
        run.train()
        assert [event[:2] for event in events] == [
            ("sync", "checkpoint-1"),
            ("sync", "checkpoint-1"),
            ("sync", "checkpoint-2"),
            ("sync", "checkpoint-2"),
            ("delete", "checkpoint-1"),
            ("sync", "checkpoint-3"),
            ("sync", "checkpoint-3"),
            ("delete", "checkpoint-2"),
        ]
        before, after = events[0][2], events[1][2]
        assert after - before == {"trainer_state.json"}
        assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= before
        assert run.args.save_total_limit == 1
        assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
        assert "save_to_json" not in vars(run.state)

    def test_a_full_disk_leaves_the_older_checkpoint(self, make_model, tmp_path, monkeypatch):
        run = make_trainer(
            make_model(), tmp_path, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1
        )

        def full(folder):
            if folder.endswith("checkpoint-2"):
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(trainer, "sync_tree", full)
        with pytest.raises(OSError, match="No space left"):
            run.train()
        assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
        assert run.args.save_total_limit == 1


@pytest.mark.parametrize("to_all", [True, False], ids=["as_a_terminal_does", "to_the_command_alone"])
@pytest.mark.parametrize(
    ("settings", "begun"),
    [
        (["training.dataloader_num_workers=2", "training.save_steps=1"], "checkpoint-1/trainer_state.json"),
        (["data.num_proc=2"], ""),
    ],
    ids=["while_training", "while_the_data_is_read"],
)
def test_ctrl_c_ends_a_training_and_its_processes(tmp_path, settings, begun, to_all):
    out = tmp_path / "out"
    words = [sys.executable, "-c", "from transformers_emo.cli import main; raise SystemExit(main())", "train"]
    settings = [*settings, "training.max_steps=5000", "training.windows_per_step=1", f"output_dir={out}"]
    words += [RECIPE, *(word for setting in settings for word in ("--set", setting))]
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=open(tmp_path / "errors", "w"),
        text=True,
        start_new_session=True,  # a group of its own, as a shell gives it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        try:
            deadline = time.monotonic() + 300
            while not (out / begun).exists():
                assert process.poll() is None and time.monotonic() < deadline, errors_of(tmp_path)
                time.sleep(0.1)
            (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
            process.communicate(timeout=120)
            ends = time.monotonic() + 30
            while group_is_there(process.pid):  # a worker may take a moment longer
                assert time.monotonic() < ends, "processes of the command are left"
                time.sleep(0.1)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    errors = errors_of(tmp_path)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "emo train: stopped by Ctrl-C. " + cli._GO_ON["train"]
    assert "Traceback" not in errors


def errors_of(folder):
    return (folder / "errors").read_text()


def group_is_there(number):
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True
