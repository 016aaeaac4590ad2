"""`emo retention --tasks`."""

import json
from pathlib import Path

import pytest
from conftest import TOY
from huggingface_hub import ModelCard
from transformers_emo import cli

ROOT = Path(__file__).parents[4]
LOCAL = str(ROOT / "examples" / "data" / "tasks")
PAIR = [str(TOY.parent / "emo-tiny"), str(TOY.parent / "std-tiny")]


def test_two_models_are_scored_side_by_side(tmp_path, capsys):
    words = ["--tasks", "emo_code,emo_bits", "--experts", "64", "4", "--include-path", LOCAL, "--limit", "4"]
    words += ["--out", str(tmp_path / "out"), "--dtype", "float32", "--prompts", "1", "--json"]
    assert cli.main(["retention", *PAIR, *words]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    found = {(s["model"], s["task"], s["num_experts"]): s["value"] for s in scores}
    assert len(found) == 2 * 2 * 2
    assert found["std-tiny", "emo_bits", 4] > 1.2 * found["std-tiny", "emo_bits", 64]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tasks.csv", "tasks.jsonl", "tasks.md", "tasks.png"} <= names
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\n---\n# m\n")
    again = [word for word in words if word != "--json"] + ["--card", str(card)]
    assert cli.main(["retention", PAIR[0], *again]) == 0
    assert "emo_bits (bits_per_byte)" in capsys.readouterr().out
    assert len(ModelCard.load(card).data.eval_results) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give `--texts` DIR, or `--tasks`"),
        (["--tasks", "x", "--texts", "y"], "--texts is not for `--tasks`"),
        (
            ["--tasks", "x", "--shares", "0.5", "--no-topics"],
            "--shares and --no-topics are not for `--tasks`",
        ),
        (["--tasks", "x", "--calibration", "4"], "--calibration is not for `--tasks`"),
        (
            ["--texts", "y", "--experts", "4", "--prompts", "2"],
            "--experts and --prompts are not for `--texts`",
        ),
        (["--texts", "y", "--card", "c"], "--card is not for `--texts`"),
    ],
)
def test_options_that_would_do_nothing_are_refused(tmp_path, capsys, words, said):
    assert cli.main(["retention", PAIR[0], "--out", str(tmp_path / "out"), *words]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out" / "tasks.jsonl").exists()
