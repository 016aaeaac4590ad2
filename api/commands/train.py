"""The command `emo train`."""

from typing import Annotated

import typer

from .shared import CacheDir, Revision, Setting, Token, given, read_setting


def train(
    recipe: Annotated[str, typer.Argument(help="YAML file. examples/recipes has some to start from.")],
    set: Annotated[
        list[Setting] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            parser=read_setting,
            help="A setting instead of the file's, such as training.max_steps=100. May be repeated.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last whole checkpoint.")] = False,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
) -> None:
    """Train from a recipe in a YAML file.

    Pretrain, anneal or fine-tune: all of a model, a subset of its experts, or an adapter. On several devices,
    write `torchrun --nproc-per-node=N -m transformers_emo train` for `emo train`.

    The options of the Hub stand for `model.options` of the file. The revision is that of the model. The token
    is used for data from the Hub too.

    Example:

    ```python
    >>> from transformers_emo.cli import main
    >>> main(["train", "no-such-file.yaml"])
    1

    ```
    """
    from transformers_emo.training import Recipe
    from transformers_emo.training import (
        train as run,  # imported here: the other commands start without a training stack
    )

    hub = given(revision=revision, token=token, cache_dir=cache_dir)
    changes = {f"model.options.{name}": value for name, value in hub.items()}
    read = Recipe.read(recipe, dict(set or []) | changes)
    if token is not None:
        for section in filter(None, (read.data, read.evaluation)):
            section.load.setdefault("token", token)
    run(read, resume=resume)
