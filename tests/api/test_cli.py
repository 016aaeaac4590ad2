"""The command `emo`: what holds for all its commands."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOLDENS, TOY
from transformers_emo import cli


def test_errors_are_one_line(capsys, tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [1\nb: 2")  # of which the parser says much
    for file in ("no-such-file.yaml", str(tmp_path / "bad.yaml")):
        assert cli.main(["train", file]) == 1
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1
        assert printed.err.startswith("emo train: ") and file in printed.err


def test_where_an_error_comes_from_can_be_seen():
    with pytest.raises(FileNotFoundError):
        cli.main(["--traceback", "train", "no-such-file.yaml"])


def test_it_is_a_module_too():
    command = [sys.executable, "-m", "transformers_emo", "train", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "--resume" in result.stdout


STEP, DOCUMENTS = str(GOLDENS / "D_olmo_core_checkpoint" / "step10"), str(TOY / "documents")
PRETRAIN = str(TOY.parents[1] / "examples" / "recipes" / "pretrain.yaml")
TAKES_FOLDERS = [
    ["push", "{}", "me/repo"],
    ["convert", "olmo-core-to-hf", "{}", "out"],
    ["convert", "olmo-core-to-hf", STEP, "out", "--tokenizer", "{}"],
    ["convert", "hf-to-olmo-core", "{}", "out"],
    ["convert", "hf-to-olmo-core", str(TOY), "out", "--original", "{}"],
    ["retention", str(TOY), "--texts", "{}", "--out", "out"],
    ["cache", "--cache-dir", "{}"],
]
TAKES_REPOSITORIES = [
    ["extract", "{}", "math.json", "out"],
    ["shard", "{}", "out"],
    ["convert", "upgrade", "{}", "out"],
    ["write-back", "{}", str(TOY), "--out", "out"],
    ["write-back", str(TOY), "{}", "--out", "out"],
    ["select", "{}", "math.json", "--text", "2 + 2"],
    ["select", str(TOY), "math.json", "--text", "2 + 2", "--tokenizer", "{}"],
    ["train", PRETRAIN, "--set", "model.path={}"],
    ["train", PRETRAIN, "--set", "model.tokenizer={}"],
    ["retention", "{}", "--texts", DOCUMENTS, "--out", "out"],
]
TAKES_FILES = [
    ["train", "{}"],
    ["train", PRETRAIN, "--set", "data.load.data_files={}"],
    ["select", str(TOY), "math.json", "--data", "{}"],
]


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """What a command says that is given a path, and that makes nothing."""
    monkeypatch.chdir(tmp_path)
    Path("model_cards").symlink_to(TOY.parent)  # for the recipe

    def refuse(words, path):
        assert cli.main([word.format(path) for word in words]) == 1
        assert not Path("math.json").exists() and not Path("out", "config.json").exists()
        return capsys.readouterr().err

    return refuse


@pytest.mark.parametrize("words", TAKES_FOLDERS, ids=" ".join)
def test_a_folder_that_is_not_there_is_named(words, refusal, tmp_path):
    assert f"There is no folder 'no/such' (seen from {tmp_path})" in refusal(words, "no/such")


@pytest.mark.parametrize("words", TAKES_REPOSITORIES, ids=" ".join)
def test_what_is_neither_a_folder_nor_a_repository_is_named_as_both(words, refusal, tmp_path):
    said = refusal(words, "no/such")
    assert f"There is no folder 'no/such' (seen from {tmp_path}), and as a Hub repository it cannot" in said
    said = refusal(words, "./no/such")
    assert (
        "There is no folder './no/such' (seen from" in said and "Hub repository cannot have this name" in said
    )


@pytest.mark.parametrize("words", TAKES_FILES, ids=" ".join)
def test_a_file_that_is_not_there_is_named(words, refusal):
    assert "no/such" in refusal(words, "no/such")


def test_a_file_is_not_taken_for_a_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["push", str(tmp_path / "file"), "me/repo"]) == 1
    assert "file' is a file, expected a folder" in capsys.readouterr().err
