"""The command `emo`; also `python -m transformers_emo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import yaml


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments (`Sequence[str]`, *optional*): the command's words; `sys.argv` by default.

    Returns:
        `int`: the exit status: 0, or 1 after an error, which stands on stderr in one line.

    Example:

    ```python
    >>> from transformers_emo.cli import main
    >>> main(["train", "no-such-file.yaml"])
    1

    ```
    """
    parsed = _parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except (ValueError, OSError, ImportError) as error:
        if parsed.traceback:
            raise
        print(f"emo {parsed.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="emo", description="EMO for Hugging Face Transformers.")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser(
        "train",
        help="train from a recipe in a YAML file",
        description="Train from a recipe: pretrain, anneal or fine-tune, all of a model, a subset of its "
        "experts or an adapter. On several devices: `torchrun --nproc-per-node=N -m transformers_emo train`.",
    )
    train.add_argument(
        "recipe", help="YAML file; see `transformers_emo.training.Recipe` and examples/recipes"
    )
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        type=_setting,
        help="a setting instead of the file's, such as training.max_steps=100; may be repeated",
    )
    train.add_argument("--resume", action="store_true", help="go on from the last whole checkpoint")
    train.set_defaults(run=_train)
    return parser


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=VALUE")
    from .training.runs import read_yaml

    try:
        return name, read_yaml(value)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"the value of {text!r} is no YAML") from error


def _train(parsed: argparse.Namespace) -> None:
    from .training import Recipe, train  # imported here: the other commands start without a training stack

    train(Recipe.read(parsed.recipe, dict(parsed.set)), resume=parsed.resume)
