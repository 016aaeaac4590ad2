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


def test_options_of_the_hub_reach_the_model_and_the_token_the_data_too(monkeypatch):
    calls = []
    monkeypatch.setattr(training, "train", lambda recipe, resume: calls.append(recipe))
    hub = {"revision": "v2", "token": "hf_secret", "cache_dir": "cache"}
    words = [word for name, value in hub.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert cli.main(["train", "examples/recipes/pretrain.yaml", *words]) == 0
    (recipe,) = calls
    assert recipe.model.hub == hub and recipe.data.load["token"] == "hf_secret"
    assert cli.main(["train", "examples/recipes/pretrain.yaml"]) == 0
    assert calls[1].model.hub == {} and "token" not in calls[1].data.load
