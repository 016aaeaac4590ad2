"""Two runs into one folder do not mix."""

import os

import pytest
from transformers_emo.analysis import Domain, Journal, Measurement, measure_retention
from transformers_emo.checkpoints.writing.folder_lock import locked_folder
from transformers_emo.training import Recipe, train

TOY = "model_cards/toy-emo"


def _retention(folder):
    texts = ["one two three four", "five six seven eight"]
    measure_retention(
        {"toy": TOY},
        [Domain("a", texts, texts)],
        folder,
        methods=["random"],
        shares=[0.5],
        num_calibration=1,
        window=16,
        progress=False,
    )


def _train(folder):
    changes = {"training.max_steps": 1, "training.disable_tqdm": True, "output_dir": str(folder)}
    train(Recipe.read("examples/recipes/pretrain.yaml", changes))


@pytest.mark.parametrize("write", [_retention, _train])
def test_a_second_run_is_told_who_writes(write, tmp_path):
    with (
        locked_folder(tmp_path / "out"),
        pytest.raises(
            BlockingIOError, match=rf"Another run is writing .*out \(process {os.getpid()} on .+, since "
        ),
    ):
        write(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write(tmp_path / "out")
    assert not (tmp_path / "out" / ".writer.json").exists()


@pytest.mark.parametrize("note", [b"", b"\xff", b"[" * 5000, b'{"process": "\\u001b[31m"}'], ids=len)
def test_a_damaged_note_does_not_matter(note, tmp_path):
    with locked_folder(tmp_path):
        (tmp_path / ".writer.json").write_bytes(note)
        with (
            pytest.raises(BlockingIOError, match=r"Another run is writing [^(]*: wait"),
            locked_folder(tmp_path),
        ):
            pass


def test_a_journal_that_another_run_has_added_to_is_not_cut(tmp_path):
    def measured(domain):
        return Measurement("emo", domain, "full", 1.0, 32, None, [6.0], [1], [2])

    first, second = Journal(tmp_path / "m.jsonl"), Journal(tmp_path / "m.jsonl")
    first.add(measured("a"))
    with pytest.raises(ValueError, match="Another run has added measurements"):
        second.add(measured("b"))
    first.add(measured("c"))
    assert {key[1] for key in Journal(tmp_path / "m.jsonl").measurements} == {"a", "c"}
