"""What is missing is said with the command that brings it, however this package was installed."""

import sys
from importlib.metadata import requires

import pytest
from transformers_emo import cli
from transformers_emo.imports.optional_packages import import_optional, require, requirement_of


def test_all_that_is_missing_is_said_at_once(monkeypatch):
    for name in ("accelerate", "peft"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError) as caught:
        require("Training needs", "accelerate", "json", "peft")
    (peft,) = {r.partition(";")[0].strip() for r in requires("transformers-emo") if r.startswith("peft")}
    assert str(caught.value) == f"Training needs accelerate and peft: `pip install accelerate '{peft}'`."


def test_a_package_that_is_there_and_broken_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import no_such_package")
    (tmp_path / "broken.py").write_text("raise ImportError('libfoo.so: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    for name, reason in (("half_installed", "No module named 'no_such_package'"), ("broken", "libfoo.so")):
        with pytest.raises(ImportError, match=f"Pictures need {name}, which cannot be imported: {reason}"):
            import_optional(name, "Pictures need")


def test_a_package_of_no_extra_is_named_alone():
    assert requirement_of("no_such_package") == "no_such_package"


@pytest.mark.parametrize(
    ("missing", "words", "message"),
    [
        (("accelerate", "datasets"), ["train", "examples/recipes/pretrain.yaml"], "accelerate and datasets"),
        (("peft",), ["train", "examples/recipes/subset_lora.yaml"], "Training needs peft"),
        (
            ("datasets",),
            ["select", "model_cards/toy-emo", "x.json", "--dataset", "me/x"],
            "--dataset needs datasets",
        ),
        (
            ("matplotlib",),
            ["retention", "model_cards/toy-emo", "--texts", "model_cards/toy-emo/documents"],
            "Pictures",
        ),
    ],
)
def test_commands_say_what_is_missing(missing, words, message, monkeypatch, capsys, tmp_path):
    import transformers_emo.training.trainer  # noqa: F401 (Transformers' own trainer wants accelerate once)

    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    words = [*words, "--out", str(tmp_path / "out")] if words[0] == "retention" else words
    words = [*words, "--set", f"output_dir={tmp_path / 'out'}"] if words[0] == "train" else words
    assert cli.main(words) == 1
    said = capsys.readouterr().err
    assert message in said and "`pip install" in said and "transformers-emo[" not in said
