"""What the manual takes from the project while it is built."""

import argparse
import importlib.util
from pathlib import Path

import pytest

HOOKS = Path(__file__).parents[2] / "docs" / "hooks.py"
pytestmark = pytest.mark.docs


@pytest.fixture
def hooks():
    pytest.importorskip("mkdocs")  # `make test-docs` installs it
    spec = importlib.util.spec_from_file_location("hooks", HOOKS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def help_of_argparse():
    parser = argparse.ArgumentParser(prog="emo", description="Words.")
    parser.add_argument("model", help="folder")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("train", help="train from a recipe")
    commands.add_parser("write-back", help="put fine-tuned subsets back into the full model, file by file")
    return parser.format_help()


def help_of_typer(rich):
    typer = pytest.importorskip("typer")
    from typer.testing import CliRunner

    app = typer.Typer(rich_markup_mode="rich" if rich else None)

    @app.callback()
    def main(traceback: bool = typer.Option(False, help="show where")):
        """Words: more words."""

    @app.command(help="train from a recipe", rich_help_panel="Training")
    def train(recipe: str, out: str = typer.Argument("out", help="a folder")):
        pass

    @app.command("write-back", help="put fine-tuned subsets back into the full model, file by file " * 3)
    def write_back():
        pass

    colourless = {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "100"}
    found = [CliRunner().invoke(app, words, env=colourless) for words in (["--help"], ["train", "--help"])]
    return [each.output for each in found]


def test_commands_are_found_in_the_help_of_argparse(hooks):
    assert hooks.listed_commands(help_of_argparse()) == ["train", "write-back"]


@pytest.mark.parametrize("rich", [False, True])
def test_commands_are_found_in_the_help_of_typer(hooks, rich):
    whole, of_one = help_of_typer(rich)
    assert sorted(hooks.listed_commands(whole)) == ["train", "write-back"], whole
    assert hooks.listed_commands(of_one) == [], of_one


def test_the_help_of_every_command_is_shown(hooks):
    text = hooks.commands_help()
    for command in ("train", "run", "select", "write-back", "convert upgrade", "retention"):
        assert f"`emo {command}`" in text


def test_a_module_without_a_list_of_names_is_an_error(hooks, tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "PACKAGE", tmp_path)
    with pytest.raises(hooks.PluginError, match="no list `__all__`"):
        hooks.public_names("nothing")
