"""The ablations' runs differ in what they say, and their script makes the table."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "emo_tiny" / "ablations.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def batch():
    """Windows of two documents each; a token says where it was."""
    ids = torch.arange(8 * 512).reshape(8, 512)
    document_ids = (torch.arange(512) >= 300).long().expand(8, 512)
    return {"input_ids": ids, "labels": ids.clone(), "document_ids": document_ids}


@pytest.mark.parametrize("pools", ["document", "random", "window"])
def test_mixed_windows_hold_every_token_once_in_spans_of_different_windows(script, batch, pools):
    mixed = script["MixedWindows"](lambda windows: {k: v.clone() for k, v in batch.items()}, pools)(None)
    ids = mixed["input_ids"]
    assert ids.flatten().sort().values.equal(batch["input_ids"].flatten())
    window_BS = ids // 512
    spans = window_BS.reshape(8, 8, 64)
    assert (spans == spans[..., :1]).all() and all(len(set(row.tolist())) == 8 for row in spans[..., 0])
    counted = mixed["labels"] != -100
    assert counted.sum() == 8 * (512 - 8) and (mixed["labels"][counted] == ids[counted]).all()
    segments = [len(set(row.tolist())) for row in mixed["document_ids"]]
    if pools == "document":
        assert segments == [9] * 8  # one span holds the end of a document and the next one's beginning
        for row, window in zip(mixed["document_ids"], window_BS, strict=True):
            assert len({(int(d), int(w)) for d, w in zip(row, window, strict=True)}) == 9
    else:
        assert segments == [8 if pools == "random" else 1] * 8
        assert (mixed["document_ids"].diff() >= 0).all()


def test_short_runs_make_the_table(small_corpus, tmp_path, monkeypatch, capsys):
    names = ["standard", "annealed", "local", "mixed-window"]
    budget = ["--steps", "10", "--windows", "2"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "out", *budget, "--test", "2", "--only", *names])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    table = (tmp_path / "out" / "README.md").read_text()
    assert [line.split(" | ")[0][2:] for line in table.splitlines() if line.startswith("| ")][1:] == names
    assert "10,240 tokens each" in table and table in capsys.readouterr().out
    pools = [
        json.loads((tmp_path / "out" / name / "config.json").read_text())["document_pool_min"]
        for name in names
    ]
    assert pools == [63, 7, 7, 7]
    files = [tmp_path / "out" / name / "checkpoint-9" / "model.safetensors" for name in names[:2]]
    assert files[0].read_bytes() == files[1].read_bytes()  # nine steps of one are the other's too
    assert not (tmp_path / "out" / "annealed" / "checkpoint-8").exists()
    runpy.run_path(str(SCRIPT), run_name="__main__")  # goes on where it was: nothing is left to do
    assert "ce_loss" not in capsys.readouterr().out.split("10,240 tokens each")[-1]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "out", "--steps", "20", "--only", *names])
    with pytest.raises(ValueError, match="trained with another budget"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
