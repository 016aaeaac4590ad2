"""What several commands share: options that mean the same everywhere, and how results are told."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import typer

from ..command_words import EmoCommand

HUB, OUTPUT = "Hugging Face Hub", "Output"
_BY_LAYER = re.compile(r"(\d+):(\d+(?:,\d+)*)")

Revision = Annotated[
    str | None,
    typer.Option(
        help="Branch, tag or commit in the Hub repository.", show_default="main", rich_help_panel=HUB
    ),
]
Token = Annotated[
    str | None,
    typer.Option(
        help="Token for the Hub.", show_default="that of `hf auth login`, or HF_TOKEN", rich_help_panel=HUB
    ),
]
CacheDir = Annotated[
    str | None,
    typer.Option(
        metavar="DIR", help="Folder for downloads.", show_default="HF_HUB_CACHE", rich_help_panel=HUB
    ),
]
MaxShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Most bytes in one file of weights.")]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print the result as one JSON object. Everything else goes to stderr.",
        rich_help_panel=OUTPUT,
    ),
]


class Setting(NamedTuple):
    """One `NAME=VALUE` of a command."""

    name: str
    value: Any


def read_setting(text: str) -> Setting:
    """Read one `NAME=VALUE`, the value as in a YAML file.

    Args:
        text (`str`): the word of the command.

    Returns:
        `Setting`: the name, and the value as Python data.

    Raises:
        typer.BadParameter: if there is no `=`, or the value is not YAML.

    Example:

    ```python
    >>> from transformers_emo.commands.shared import read_setting
    >>> read_setting("training.max_steps=100")
    Setting(name='training.max_steps', value=100)

    ```
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE: write it like max_steps=100")
    import yaml  # imported here: help comes at once
    from transformers_emo.training.recipe_files import read_yaml

    try:
        return Setting(name, read_yaml(value))
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"the value of {text!r} is not YAML: put it in quotes") from error


def given(**options: Any) -> dict[str, Any]:
    """The options that the user gave: all that are not `None`.

    Args:
        options: by name.

    Example:

    ```python
    >>> from transformers_emo.commands.shared import given
    >>> given(revision="main", token=None)
    {'revision': 'main'}

    ```
    """
    return {name: value for name, value in options.items() if value is not None}


def excluded_experts(words: list[str]) -> dict[int, list[int]] | str | None:
    """Read the experts that `--exclude` names.

    Args:
        words (`list[str]`): the values of the option.

    Returns:
        `dict[int, list[int]]`, `str` or `None`: ids by layer, what names a subset, or nothing excluded.

    Raises:
        ValueError: if one is neither, or a subset is not alone.

    Example:

    ```python
    >>> from transformers_emo.commands.shared import excluded_experts
    >>> excluded_experts(["3:17,40", "3:2"])
    {3: [2, 17, 40]}

    ```
    """
    by_layer: dict[int, list[int]] = {}
    for word in words:
        match = _BY_LAYER.fullmatch(word)
        if match is None and len(words) > 1:
            raise ValueError(
                f"--exclude {word!r}: expected LAYER:ID,ID such as 3:17,40, or one subset alone."
            )
        if match is None:
            return word
        by_layer.setdefault(int(match[1]), []).extend(map(int, match[2].split(",")))
    return {layer: sorted(set(ids)) for layer, ids in by_layer.items()} or None


def add_command(
    app: typer.Typer,
    function: Callable[..., None],
    name: str,
    *,
    panel: str | None = None,
    cls: type[EmoCommand] = EmoCommand,
    **settings: Any,
) -> None:
    """Add a function as a command. Its docstring is the help, up to the example.

    Args:
        app (`typer.Typer`): the command that the new one is part of.
        function (`Callable`): what the command does; its parameters are the command's options.
        name (`str`): what the user types.
        panel (`str`, *optional*): where the help of `app` lists the command.
        cls (`type`): how the words are read.
        settings: of `typer.Typer.command`.

    Example:

    ```python
    >>> import typer
    >>> from transformers_emo.commands import cache
    >>> from transformers_emo.commands.shared import add_command
    >>> app = typer.Typer()
    >>> add_command(app, cache.cache, "cache")
    >>> app.registered_commands[0].name
    'cache'

    ```
    """
    text = (inspect.getdoc(function) or "").partition("\n\nExample:")[0]
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    settings = {"help": "\n\n".join(paragraphs), "short_help": paragraphs[0]} | settings
    app.command(name, cls=cls, rich_help_panel=panel, **settings)(function)


@contextlib.contextmanager
def stdout_for_json(as_json: bool) -> Iterator[None]:
    """While a command works, send what anybody prints to stderr, if the result will be JSON.

    Args:
        as_json (`bool`): if not, nothing changes.

    Example:

    ```python
    >>> from transformers_emo.commands.shared import stdout_for_json
    >>> with stdout_for_json(True):
    ...     print("a note of some library")

    ```
    """
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield


def tell(as_json: bool, text: str, **facts: Any) -> None:
    """Print what a command did, for people or as JSON.

    Args:
        as_json (`bool`): print one JSON object of the facts; else the text.
        text (`str`): for people.
        facts: the same for programs.

    Example:

    ```python
    >>> from transformers_emo.commands.shared import tell
    >>> tell(False, "out: 3 files", out="out", files=3)
    out: 3 files
    >>> tell(True, "out: 3 files", out="out", files=3)
    {"out": "out", "files": 3}

    ```
    """
    print(json.dumps(facts, ensure_ascii=False, allow_nan=False) if as_json else text)


def layers_text(layers: Sequence[Any]) -> str:
    """How many layers of how many experts a model has.

    Args:
        layers (`Sequence[LayerExperts]`): `config.layer_experts`.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.commands.shared import layers_text
    >>> layers_text(EmoConfig(num_hidden_layers=2, num_experts=16).layer_experts)
    '2 layers of 16 experts'

    ```
    """
    if all(layer.is_dense for layer in layers):
        return f"{len(layers)} dense layers"
    return f"{len(layers)} layers of {experts_text(layers)} experts"


def experts_text(layers: Sequence[Any]) -> str:
    """The numbers of experts, from the smallest to the largest where layers differ.

    Args:
        layers (`Sequence[LayerExperts]`): `config.layer_experts`.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.commands.shared import experts_text
    >>> experts_text(EmoConfig(num_hidden_layers=2, num_experts_per_layer=[8, 16]).layer_experts)
    '8 to 16'

    ```
    """
    from transformers_emo.subsets.numbering import size_range

    return size_range(layer.num_experts for layer in layers if not layer.is_dense)
