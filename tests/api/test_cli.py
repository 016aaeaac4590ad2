"""The command `emo`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS, TOY
from transformers_emo import EmoForCausalLM, ExpertSubset, cli, training


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


SMALL = ["--texts", str(TOY / "documents"), "--domains", "coq", "man_fr", "--test", "2", "--window", "48"]


def test_retention_measures_models_side_by_side(tmp_path, capsys):
    other = tmp_path / "other"
    model = EmoForCausalLM.from_pretrained(TOY)
    model.model.layers[0].mlp.gate.weight.data.neg_()
    model.save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((TOY / name).read_bytes())
    words = ["retention", str(TOY), f"bad={other}", *SMALL, "--out", str(tmp_path / "out"), "--seeds", "2"]
    words += ["--calibration", "2", "--shares", "0.25", "0.125", "0.02", "--methods", "layerwise", "random"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "| toy-emo | *experts kept* | 32 | 8 | 4 | – |" in printed and "toy-emo against bad" in printed
    claims = json.loads((tmp_path / "out" / "claims.json").read_text())
    assert set(claims["topic_cosine"]) == {"toy-emo", "bad"} and set(claims["against"]) == {"toy-emo"}
    assert 0 < claims["topic_cosine"]["toy-emo"]["mean"] < 1
    lines = (tmp_path / "out" / "retention.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 2 * (1 + 2 * 2 * 2)
    pictures = ("retention.png", "retention_domains.png", "topics.png")
    assert all((tmp_path / "out" / name).is_file() for name in pictures)


def test_retention_without_pictures_needs_no_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = ["retention", str(TOY), *SMALL, "--out", str(tmp_path), "--methods", "random", "--shares", "0.5"]
    assert cli.main(words) == 1
    assert "Pictures need matplotlib: `pip install 'matplotlib>=" in capsys.readouterr().err
    assert cli.main([*words, "--no-plots", "--no-topics"]) == 0
    expected = ["claims.json", "measurements.jsonl", "retention.csv", "retention.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([str(TOY), f"{TOY}/", *SMALL], "give each a name of its own"),
        ([str(TOY), *SMALL, "--baseline", "std"], "baseline 'std' is none of"),
        ([str(TOY), *SMALL, "--methods", "best"], "Unknown method 'best'"),
        ([str(TOY), "--texts", "no-such-folder"], "There is no folder 'no-such-folder' (seen from "),
        ([str(TOY), *SMALL, "--seeds", "0"], "no seeds"),
    ],
)
def test_retention_refuses_what_cannot_be_measured(tmp_path, capsys, words, message):
    assert cli.main(["retention", *words, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "emo retention: " in error and message in error
    assert not list(tmp_path.iterdir())


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
