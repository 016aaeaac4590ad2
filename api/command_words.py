"""How the words of a command are read, where that differs from what Typer does by itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

_NEGATIVE = re.compile(r"-\d+|-\d*\.\d+")


class EmoGroup(TyperGroup):
    """A command that has others, whose flags are `False` and not `None` where nobody gives them.

    Typer imports pydantic to look at a `None`, which takes longer than all else that help needs.

    Example:

    ```python
    >>> import typer
    >>> from transformers_emo.command_words import EmoGroup
    >>> typer.Typer(cls=EmoGroup).info.cls.__name__
    'EmoGroup'

    ```
    """

    def get_params(self, ctx: Any) -> list[Any]:
        """The options and arguments. Typer calls this."""
        params = super().get_params(ctx)
        for param in params:
            if getattr(param, "is_flag", False) and param.default is None:
                param.default = False
        return params


class EmoCommand(TyperCommand):
    """A command of `emo`: some options take several words, and no option is taken for a value.

    An option takes several words if the help shows its value with `...` at the end. `--experts 4 8` is then
    read as `--experts 4 --experts 8`. The name of an option is never the value of another: in
    `--text --data FILE` the text is missing. `--text=--data` gives that very word.

    Example:

    ```python
    >>> import typer
    >>> from transformers_emo.command_words import EmoCommand
    >>> app = typer.Typer()
    >>> @app.command(cls=EmoCommand)
    ... def add(numbers: list[int] = typer.Option(metavar="N...")) -> None:
    ...     print(sum(numbers))
    >>> app(["--numbers", "1", "2"], standalone_mode=False)
    3

    ```
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words behind the command's name. Typer calls this."""
        return super().parse_args(ctx, list(self._one_by_one(ctx, args)))

    def options(self, ctx: Any) -> dict[str, TyperOption]:
        """The options, by each of their names."""
        own = [param for param in self.get_params(ctx) if isinstance(param, TyperOption)]
        return {name: option for option in own for name in option.opts}

    def _one_by_one(self, ctx: Any, words: Sequence[str]) -> Iterator[str]:
        """The words, with the name of the option before each of its values."""
        options = self.options(ctx)
        position = 0
        while position < len(words):
            word = words[position]
            if word == "--" or not (word.startswith("-") or ctx.allow_interspersed_args):
                yield from words[position:]
                return
            position += 1
            option = options.get(word)
            if option is None or option.is_flag:
                yield word
                continue
            end = position + 1
            if position == len(words) or words[position].partition("=")[0] in options:
                found = "it stands last" if position == len(words) else f"{words[position]!r} is an option"
                raise typer.BadParameter(f"a value is missing: {found}", ctx=ctx, param=option)
            if (option.metavar or "").endswith("..."):
                while end < len(words) and (
                    not words[end].startswith("-") or _NEGATIVE.fullmatch(words[end])
                ):
                    end += 1
            for value in words[position:end]:
                yield from (word, value)
            position = end


def usage_text(error: typer.TyperException) -> str:
    """What is wrong with the words of a command, in one sentence, with the value that was found.

    Args:
        error (`typer.TyperException`): from reading the words.

    Returns:
        `str`: ends in a full stop or a question mark.

    Example:

    ```python
    >>> import typer
    >>> from transformers_emo.command_words import usage_text
    >>> usage_text(typer.BadParameter("'x' is no number"))
    "Invalid value: 'x' is no number."

    ```
    """
    text = error.format_message().replace(": Value error, ", ": ")  # pydantic's word for any `ValueError`
    found = [
        fault["input"]
        for fault in getattr(error.__cause__, "errors", list)()
        if fault["type"] != "value_error"
    ]
    if found:
        text += f", found {found[0]!r}"
    return text if text.endswith((".", "?")) else f"{text}."
