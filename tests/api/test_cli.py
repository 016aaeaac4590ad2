"""The command `emo`."""

import subprocess
import sys

import pytest
from transformers_emo import cli, training


def test_train_hands_over_the_recipe_and_its_changes(monkeypatch):
    calls = []
    monkeypatch.setattr(training, "train", lambda recipe, resume: calls.append((recipe, resume)))
    words = ["train", "examples/recipes/pretrain.yaml", "--set", "training.learning_rate=4e-3", "--resume"]
    assert cli.main([*words, "--set", "model.config.document_pool_min=null"]) == 0
    ((recipe, resume),) = calls
    assert resume and recipe.training["learning_rate"] == 0.004
    assert recipe.model.config["document_pool_min"] is None


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


@pytest.mark.parametrize("setting", ["training.max_steps", "=3", "a=[1"])
def test_settings_that_are_none_are_refused(capsys, setting):
    with pytest.raises(SystemExit):
        cli.main(["train", "recipe.yaml", "--set", setting])
    assert repr(setting) in capsys.readouterr().err


def test_it_is_a_module_too():
    command = [sys.executable, "-m", "transformers_emo", "train", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "--resume" in result.stdout
