"""The command `emo retention`."""

import json
import sys

import pytest
from conftest import TOY
from transformers_emo import EmoForCausalLM, cli

SMALL = ["--texts", str(TOY / "documents"), "--domains", "coq", "man_fr", "--test", "2", "--window", "48"]


def test_retention_measures_models_side_by_side(tmp_path, capsys):
    other = tmp_path / "other"
    model = EmoForCausalLM.from_pretrained(TOY)
    model.model.layers[0].mlp.gate.weight.data.neg_()
    model.save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((TOY / name).read_bytes())
    words = ["retention", str(TOY), f"bad={other}", *SMALL, "--out", str(tmp_path / "out"), "--seeds", "2"]
    words += ["--calibration", "2", "--shares", "0.25", "0.125", "0.02", "--methods", "layerwise", "random"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "| toy-emo | *experts kept* | 32 | 8 | 4 | – |" in printed and "toy-emo against bad" in printed
    claims = json.loads((tmp_path / "out" / "claims.json").read_text())
    assert set(claims["topic_cosine"]) == {"toy-emo", "bad"} and set(claims["against"]) == {"toy-emo"}
    assert 0 < claims["topic_cosine"]["toy-emo"]["mean"] < 1
    lines = (tmp_path / "out" / "retention.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 2 * (1 + 2 * 2 * 2)
    pictures = ("retention.png", "retention_domains.png", "topics.png")
    assert all((tmp_path / "out" / name).is_file() for name in pictures)


def test_retention_without_pictures_needs_no_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = ["retention", str(TOY), *SMALL, "--out", str(tmp_path), "--methods", "random", "--shares", "0.5"]
    assert cli.main(words) == 1
    assert "Pictures need matplotlib: `pip install 'matplotlib>=" in capsys.readouterr().err
    assert cli.main([*words, "--no-plots", "--no-topics"]) == 0
    expected = ["claims.json", "measurements.jsonl", "retention.csv", "retention.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([str(TOY), f"{TOY}/", *SMALL], "give each a name of its own"),
        ([str(TOY), *SMALL, "--baseline", "std"], "baseline 'std' is none of"),
        ([str(TOY), *SMALL, "--methods", "best"], "Unknown method 'best'"),
        ([str(TOY), "--texts", "no-such-folder"], "There is no folder 'no-such-folder' (seen from "),
        ([str(TOY), *SMALL, "--seeds", "0"], "no seeds"),
    ],
)
def test_retention_refuses_what_cannot_be_measured(tmp_path, capsys, words, message):
    assert cli.main(["retention", *words, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "emo retention: " in error and message in error
    assert not list(tmp_path.iterdir())
