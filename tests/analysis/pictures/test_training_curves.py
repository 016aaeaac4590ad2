"""Loss curves come from what Trainer left."""

import csv
import json

import pytest
from transformers_emo.analysis import plot_training, read_training_log, write_training_csv

HISTORY = [
    {"step": 1, "epoch": 0.5, "loss": 4.0, "ce_loss": 3.5, "balance_loss": 1.25},
    {"step": 1, "epoch": 0.5, "eval_loss": 3.9},
    {"step": 2, "epoch": 1.0, "loss": 3.0, "ce_loss": 2.5},
    {"step": 2, "epoch": 1.0, "train_runtime": 8.5},
]


@pytest.fixture
def run(tmp_path):
    for step, history in ((1, HISTORY[:1]), (2, HISTORY)):
        checkpoint = tmp_path / "run" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return tmp_path / "run"


def test_the_log_is_from_the_last_whole_checkpoint(run):
    assert read_training_log(run) == [HISTORY[0], HISTORY[2]]
    assert read_training_log(run / "checkpoint-1") == HISTORY[:1]
    (run / "checkpoint-2" / "trainer_state.json").write_text('{"log_hist')
    assert read_training_log(run) == HISTORY[:1]


def test_a_folder_without_a_log_is_refused(tmp_path, run):
    with pytest.raises(ValueError, match="no whole checkpoint in .*: give an `output_dir`"):
        read_training_log(tmp_path)
    (run / "checkpoint-2" / "trainer_state.json").write_text('{"log_history": []}')
    with pytest.raises(ValueError, match="Nothing was logged .*: set `logging_steps`"):
        read_training_log(run)


def test_csv_has_a_row_for_every_report(run, tmp_path):
    write_training_csv(read_training_log(run), tmp_path / "training.csv")
    with (tmp_path / "training.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["ce_loss"], row["balance_loss"]) for row in rows] == [
        ("1", "3.5", "1.25"),
        ("2", "2.5", ""),
    ]


def test_picture_has_a_line_for_every_run(run, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda self, *points, label, **style: drawn.append((label, points)))
    log = read_training_log(run)
    plot_training({"emo": log, "standard": log[:1]}, tmp_path / "training.png")
    assert drawn[:2] == [("emo", ((1, 2), (3.5, 2.5))), ("standard", ((1,), (3.5,)))]
    assert ("emo", ((1,), (1.25,))) in drawn and (tmp_path / "training.png").stat().st_size > 1000
