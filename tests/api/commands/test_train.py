"""The command `emo train`."""

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


@pytest.mark.parametrize("setting", ["training.max_steps", "=3", "a=[1"])
def test_settings_that_are_none_are_refused(capsys, setting):
    assert cli.main(["train", "recipe.yaml", "--set", setting]) == 2
    assert repr(setting) in capsys.readouterr().err
