"""The commands `emo extract` and `emo write-back`."""

import torch
from conftest import TOY
from transformers_emo import EmoForCausalLM, ExpertSubset, cli


def test_extract_and_write_back_are_each_others_inverse(tmp_path, capsys):
    ExpertSubset([[0, 1, 31], [0, 1, 2, 31], [5, 31], [6, 31]]).save(tmp_path / "c.json")
    small, out = str(tmp_path / "small"), str(tmp_path / "out")
    assert cli.main(["extract", str(TOY), str(tmp_path / "c.json"), small, "--max-shard-size", "1MB"]) == 0
    assert f"{small}: 2 to 4 experts a layer" in capsys.readouterr().out
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 2
    words = ["write-back", str(TOY), small, small, "--out", out, "--what", "routed+router", "--weight", "0.5"]
    assert cli.main(words) == 0
    number = 7 * 3 + 11  # matrices of the routed experts and router rows of all
    assert f"{out}: {number} tensors and router rows written, {number} of them averaged" in (
        capsys.readouterr().out
    )
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (TOY / weights).read_bytes()
    assert EmoForCausalLM.from_pretrained(small).config.retained_experts[3] == [6, 31]


def test_extract_converts(tmp_path):
    ExpertSubset([[0, 1, 31]] * 4).save(tmp_path / "c.json")
    words = ["extract", str(TOY), str(tmp_path / "c.json"), str(tmp_path / "out"), "--dtype", "bfloat16"]
    assert cli.main(words) == 0
    assert EmoForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_extract_and_write_back_say_what_does_not_fit(tmp_path, capsys):
    assert cli.main(["extract", str(TOY), "no-such-file", str(tmp_path / "out")]) == 1
    assert "emo extract: There is no expert subset 'no-such-file'" in capsys.readouterr().err
    words = ["write-back", str(TOY), str(TOY), "--out", str(tmp_path / "out"), "--what", "experts"]
    assert cli.main(words) == 1
    assert "emo write-back: `what` is 'experts'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
