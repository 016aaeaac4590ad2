"""The examples run as they are written, on the small model that the repository holds."""

import os
import re
import runpy
import sys
from pathlib import Path

import pytest
from transformers_emo import EmoForCausalLM, cli

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "examples" / "recipes"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder to write into, where the paths of the examples lead to the repository."""
    for name in ("examples", "model_cards"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def emo(*words: str) -> None:
    assert cli.main(["train", *words, "--set", "training.disable_tqdm=true"]) == 0


def test_a_model_pretrained_without_pools_is_annealed_into_an_emo(elsewhere):
    no_pools = [f"model.config.document_pool_{end}=null" for end in ("min", "max")]
    changes = ["output_dir=out/standard", "training.max_steps=4", "training.warmup_steps=1", *no_pools]
    emo("examples/recipes/pretrain.yaml", *(word for change in changes for word in ("--set", change)))
    assert EmoForCausalLM.from_pretrained("out/standard").config.document_pool_min is None
    emo("examples/recipes/anneal.yaml", "--set", "training.max_steps=2")
    assert EmoForCausalLM.from_pretrained("out/anneal").config.document_pool_min == 3


@pytest.mark.slow
def test_pretraining_runs_as_written(elsewhere):
    emo("examples/recipes/pretrain.yaml")
    assert EmoForCausalLM.from_pretrained("out/pretrain").config.document_pool_min == 3


def test_subset_is_fine_tuned(elsewhere):
    emo("examples/recipes/subset_sft.yaml", "--set", "training.num_train_epochs=6")
    assert EmoForCausalLM.from_pretrained("out/subset_sft").config.num_experts == 8


def test_adapter_is_trained_on_a_subset(elsewhere):
    emo("examples/recipes/subset_lora.yaml", "--set", "training.num_train_epochs=10")
    assert {"adapter_config.json", "expert_subset.json"} <= set(os.listdir("out/subset_lora"))


@pytest.mark.parametrize("name", ["subset_sft", pytest.param("subset_lora", marks=pytest.mark.slow)])
def test_scripts_teach_the_answers(elsewhere, monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", [f"examples/{name}.py", "out"])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    losses = [float(value) for value in re.findall(r"'ce_loss': '([0-9.]+)'", printed)]
    assert len(losses) > 3 and losses[-1] < losses[0] / 3
    assert re.search(r"ls - .*<eos>$", printed.strip())  # an answer, with its end
