"""The scripts that measure emo-tiny, on little text."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "emo_tiny"


def run(monkeypatch, script: str, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
    runpy.run_path(str(SCRIPTS / script), run_name="__main__")


def test_fine_tuned_subsets_are_measured_before_and_after(small_corpus, monkeypatch, capsys):
    words = ["emo=" + str(ROOT / "model_cards" / "emo-tiny"), "--domains", "coq", "--test", "1"]
    words += ["--steps", "3", "--windows", "1", "--learning-rate", "0.01", "--out", "out"]
    run(monkeypatch, "fine_tuned.py", *words)
    lines = Path("out/README.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| emo")]
    assert [row[1] for row in rows] == ["before", "after"]
    assert all(before != after for before, after in zip(rows[0][2:], rows[1][2:], strict=True))
    capsys.readouterr()
    run(monkeypatch, "fine_tuned.py", *words)  # nothing is left to measure
    assert "emo before, coq" not in capsys.readouterr().out
    (small_corpus / "train" / "coq.jsonl").write_text('{"text": "other"}')
    with pytest.raises(ValueError, match="was measured with texts of coq"):
        run(monkeypatch, "fine_tuned.py", *words)


def test_prompts_of_every_length_choose_experts(small_corpus, monkeypatch):
    words = [ROOT / "model_cards" / "emo-tiny", "--test", "1", "--following", "16", "--out", "out"]
    run(monkeypatch, "prompts.py", *words)
    lines = Path("out/README.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line[2:3].isdigit()]
    assert [row[0].strip("| ") for row in rows] == ["16", "32", "64", "128", "256"]
    assert all(len(row) == 5 for row in rows)
