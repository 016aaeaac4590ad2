"""The command `emo`."""

import subprocess
import sys

import pytest
from transformers_emo import ExpertSubset, cli, select_experts, training


def test_train_hands_over_the_recipe_and_its_changes(monkeypatch):
    calls = []
    monkeypatch.setattr(training, "train", lambda recipe, resume: calls.append((recipe, resume)))
    words = ["train", "examples/recipes/pretrain.yaml", "--set", "training.max_steps=3", "--resume"]
    assert cli.main([*words, "--set", "model.config.document_pool_min=null"]) == 0
    ((recipe, resume),) = calls
    assert resume and recipe.training["max_steps"] == 3
    assert recipe.model.config["document_pool_min"] is None


def test_errors_are_one_line(capsys):
    assert cli.main(["train", "no-such-file.yaml"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("emo train: ") and "no-such-file.yaml" in printed.err


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


def test_select_writes_subsets_from_a_file_of_texts(tmp_path, capsys):
    data = "model_cards/toy-emo/documents/c.jsonl"
    words = ["select", "model_cards/toy-emo", str(tmp_path / "c-{}.json"), "--data", data, "--max-texts", "2"]
    assert cli.main([*words, "--experts", "4", "8", "--method", "global"]) == 0
    small, large = (ExpertSubset.load(tmp_path / f"c-{size}.json") for size in (4, 8))
    expected = select_experts(
        "model_cards/toy-emo", dataset=data, max_texts=2, num_experts=8, method="global"
    )
    assert large == expected and small.experts == expected.top(4).experts
    assert f"c-8.json: 8 experts a layer, from {expected.num_tokens} tokens" in capsys.readouterr().out


def test_select_refuses_one_file_for_two_subsets_before_it_begins(tmp_path, capsys):
    words = ["select", "no-such-model", str(tmp_path / "c.json"), "--text", "a", "--experts", "4", "8"]
    assert cli.main(words) == 1
    assert "put {} in its name" in capsys.readouterr().err and not list(tmp_path.iterdir())
