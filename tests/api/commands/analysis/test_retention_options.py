"""Options of `emo retention` that stand for arguments of `measure_retention`."""

import pytest
from transformers_emo import analysis, cli

WORDS = [
    "retention",
    "model_cards/toy-emo",
    "--texts",
    "model_cards/toy-emo/documents",
    "--no-plots",
    "--out",
]


@pytest.mark.parametrize(
    ("words", "least"),
    [
        (["--batch-tokens", "0"], 1),
        (["--batch-tokens", "-3"], 1),
        (["--calibration", "0"], 1),
        (["--window", "0"], 2),
        (["--window", "1"], 2),
    ],
)
def test_numbers_out_of_range_are_named_with_their_range(tmp_path, capsys, words, least):
    assert cli.main([*WORDS, str(tmp_path / "out"), *words]) == 2
    errors = capsys.readouterr().err
    assert f"'{words[0]}'" in errors and f"greater than or equal to {least}" in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words", [["--shares", "0"], ["--shares", "0.5", "1.5"], ["--test", "0"], ["--seeds", "0"]]
)
def test_others_say_so_too(tmp_path, capsys, words):
    assert cli.main([*WORDS, str(tmp_path / "out"), *words]) == 1
    errors = capsys.readouterr().err
    assert "expected" in errors or "no seeds" in errors
    assert not (tmp_path / "out").exists()


def test_options_of_the_hub_are_passed_on(tmp_path, monkeypatch):
    given = {}

    def measure(*args, **kwargs):
        given.update(kwargs)
        raise ValueError("enough")

    monkeypatch.setattr(analysis, "measure_retention", measure)
    hub = ["--revision", "v2", "--token", "hf_secret", "--cache-dir", "cache"]
    assert cli.main([*WORDS, str(tmp_path / "out"), *hub]) == 1
    assert [given[name] for name in ("revision", "token", "cache_dir")] == ["v2", "hf_secret", "cache"]
