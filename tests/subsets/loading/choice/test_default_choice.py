"""Models loaded inside `emo run`: the choice that its user made holds where the program makes none."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers_emo import EmoForCausalLM, SubsetError
from transformers_emo.subsets.loading.choice.run_choice import RunChoice

TINY = str(Path(__file__).parents[4] / "model_cards" / "emo-tiny")
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def choose(monkeypatch, tmp_path):
    """Make a choice as `emo run` does; returns the mark of a model loaded with it."""

    def choose(**choice) -> Path:
        mark = tmp_path / "mark"
        for name, value in RunChoice(mark=str(mark), **choice).variables().items():
            monkeypatch.setenv(name, value)
        return mark

    return choose


def told(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("emo run: ")]


@pytest.mark.parametrize(
    "auto_class", [AutoModelForCausalLM, EmoForCausalLM, AutoModelForSequenceClassification]
)
def test_a_model_is_loaded_as_with_the_argument(choose, capsys, auto_class):
    expected = auto_class.from_pretrained(TINY, expert_subset="python", exclude_experts={0: [18]})
    mark = choose(expert_subset="python", exclude_experts={"0": [18]})
    model = auto_class.from_pretrained(TINY)
    assert model.config.retained_experts == expected.config.retained_experts
    assert all(map(torch.equal, model.base_model.parameters(), expected.base_model.parameters()))
    least = min(map(len, expected.config.retained_experts))
    number = "16" if least == 16 else f"{least} to 16"
    assert told(capsys) == [
        f"emo run: {TINY}: experts of subset 'python' but those of --exclude ({number} of 64 a layer)"
    ]
    assert mark.is_file()


def test_what_the_program_says_itself_wins(choose, capsys):
    mark = choose(expert_subset="python")
    assert EmoForCausalLM.from_pretrained(TINY, exclude_experts={}).config.num_experts == 64
    model, information = EmoForCausalLM.from_pretrained(TINY, expert_subset="coq", output_loading_info=True)
    assert model.config.num_experts == 16 and not information["missing_keys"]
    everything, coq = told(capsys)
    assert "experts that the program itself chooses (64 of 64 a layer), not those of `--expert" in everything
    assert "experts that the program itself chooses (16 of 64 a layer)" in coq and not mark.exists()


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"expert_subset": "nope"}, "There is no expert subset 'nope'"),
        ({"exclude_experts": {"3": [99]}}, "Layer 3 has no expert 99"),
        ({"document_pool": 64}, "`document_pool` is 64"),
    ],
)
def test_a_choice_that_does_not_fit_is_an_error_and_no_whole_model(choose, choice, message):
    mark = choose(**choice)
    with pytest.raises(ValueError, match=message) as raised:
        AutoModelForCausalLM.from_pretrained(TINY)
    assert f"`emo run {RunChoice(**choice)}` asks for this" in raised.value.__notes__[0] and not mark.exists()


def test_a_model_that_is_that_subset_already_stays_as_it_is(choose, capsys, tmp_path):
    subset = EmoForCausalLM.from_pretrained(TINY, expert_subset="python")
    subset.save_pretrained(tmp_path / "small")
    choose(expert_subset=f"{TINY}/subsets/python.json")
    again = EmoForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(again(IDS).logits, subset(IDS).logits)
    assert "(16 of 64 a layer)" in told(capsys)[0]
    choose(expert_subset=f"{TINY}/subsets/coq.json")  # of which it lacks some
    with pytest.raises(SubsetError):
        EmoForCausalLM.from_pretrained(tmp_path / "small")


def test_other_models_are_left_alone(choose, capsys, tmp_path):
    config = LlamaConfig(
        vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    mark = choose(expert_subset="nope", document_pool=3)
    AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert told(capsys) == [] and not mark.exists()


def test_pools_hold_for_generation_and_scoring_and_are_not_saved(choose, capsys, tmp_path):
    plain = EmoForCausalLM.from_pretrained(TINY)
    mark = choose(document_pool=8)
    model = EmoForCausalLM.from_pretrained(TINY)
    assert told(capsys) == [
        f"emo run: {TINY}: all its experts (64 of 64 a layer), in document pools of 8 routed experts"
    ]
    assert mark.is_file()
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(IDS, **settings), plain.generate(IDS, document_pool=8, **settings))
    torch.testing.assert_close(model(IDS).logits, plain(IDS, document_pool=8).logits)
    model.save_pretrained(tmp_path / "saved")
    assert "document_pool" not in (tmp_path / "saved" / "generation_config.json").read_text()


def test_one_worker_of_several_speaks(choose, capsys, monkeypatch):
    mark = choose(expert_subset="python")
    monkeypatch.setenv("RANK", "1")
    assert EmoForCausalLM.from_pretrained(TINY).config.num_experts == 16
    assert told(capsys) == [] and mark.is_file()


def test_a_damaged_variable_is_an_error(monkeypatch):
    monkeypatch.setenv("EMO_RUN", "1")
    with pytest.raises(ValueError, match="EMO_RUN is '1'.*unset it"):
        EmoForCausalLM.from_pretrained(TINY)
