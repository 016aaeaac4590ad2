"""`emo extract --bits`."""

import json

import pytest
import torch
from conftest import TOY
from transformers_emo import EmoForCausalLM, PackedConfig, cli

TEXTS = TOY / "documents"


@pytest.fixture
def subset(tmp_path):
    path = tmp_path / "subset.json"
    path.write_text(json.dumps({"experts": [[0, 1, 2, 5, 31]] * 4}))
    return str(path)


@pytest.mark.parametrize(
    ("options", "packing"),
    [
        (["--bits", "8"], PackedConfig(8)),
        (["--bits", "4", "--group-size", "64", "--symmetric"], PackedConfig(4, 64, symmetric=True)),
    ],
)
def test_it_is_the_model_that_is_quantised_while_loading(tmp_path, subset, options, packing):
    assert cli.main(["extract", str(TOY), subset, str(tmp_path / "out"), *options]) == 0
    found = EmoForCausalLM.from_pretrained(tmp_path / "out")
    expected = EmoForCausalLM.from_pretrained(TOY, expert_subset=subset, quantization_config=packing)
    assert found.config.quantization_config == packing
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(found(ids).logits, expected(ids).logits)


def test_by_text(tmp_path, subset):
    file = next(TEXTS.glob("*.jsonl"))
    options = ["--bits", "4", "--calibrate", str(file), "--max-texts", "2"]
    assert cli.main(["extract", str(TOY), subset, str(tmp_path / "out"), *options]) == 0
    found = EmoForCausalLM.from_pretrained(tmp_path / "out")
    nearest = EmoForCausalLM.from_pretrained(TOY, expert_subset=subset, quantization_config=PackedConfig(4))
    assert found.config.quantization_config == PackedConfig(4)
    assert found.config.retained_experts == nearest.config.retained_experts
    ids = torch.tensor([[5, 6, 7]])
    assert not torch.equal(found(ids).logits, nearest(ids).logits)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "5"], "expected 8 or 4"),
        (["--bits", "4", "--group-size", "48"], "groups of 48"),
        (["--group-size", "32"], "give `--bits` too"),
        (["--symmetric"], "give `--bits` too"),
        (["--calibrate", "texts.jsonl"], "give `--bits` too"),
        (["--bits", "4", "--max-texts", "2"], "give both"),
        (["--bits", "4", "--calibrate", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, subset, capsys, options, message):
    assert cli.main(["extract", str(TOY), subset, str(tmp_path / "out"), *options]) != 0
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
