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


def test_short_runs_make_the_table(tmp_path, monkeypatch, capsys):
    toy, corpus = ROOT / "model_cards" / "toy-emo", tmp_path / "corpus"
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (corpus / "tokenizer-4096").mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (corpus / "tokenizer-4096" / name).write_text((toy / name).read_text())
    for split in ("train", "calibration", "test"):
        (corpus / split).mkdir()
        for domain in ("coq", "man_fr"):
            lines = (toy / "documents" / f"{domain}.jsonl").read_text().splitlines()
            wanted = "test" if split == "test" else "calibration"
            kept = [line for line in lines if json.loads(line)["split"] == wanted]
            (corpus / split / f"{domain}.jsonl").write_text("\n".join(kept))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names = ["standard", "local", "mixed-window"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "out", "--steps", "2", "--test", "2", "--only", *names])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    table = (tmp_path / "out" / "README.md").read_text()
    assert [line.split(" | ")[0][2:] for line in table.splitlines() if line.startswith("| ")][1:] == names
    assert "8,192 tokens each" in table and table in capsys.readouterr().out
    pools = [
        json.loads((tmp_path / "out" / name / "config.json").read_text())["document_pool_min"]
        for name in names
    ]
    assert pools == [63, 7, 7]
    runpy.run_path(str(SCRIPT), run_name="__main__")  # goes on where it was: nothing is left to do
    assert "ce_loss" not in capsys.readouterr().out.split("8,192 tokens each")[-1]
