"""The command `emo info`."""

from typing import Annotated

import typer

from ..shared import AsJson, CacheDir, Revision, Token, given, stdout_for_json, tell


def info(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub repository.")],
    experts: Annotated[
        list[int] | None,
        typer.Option(
            metavar="K...",
            help="Numbers of experts a layer to give sizes for.",
            show_default="all, by halves",
        ),
    ] = None,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    json: AsJson = False,
) -> None:
    """Say what a model is and takes, before anything of it is downloaded.

    Sizes by number of experts and of bits, what a budget for experts holds, the subsets in its library, and
    which commands fit this machine. Of a repository only the config, headers and the library are fetched.

    Example:

    ```python
    >>> from transformers_emo.cli import main
    >>> main(["info", "model_cards/emo-tiny", "--experts", "16"])
    model_cards/emo-tiny: a full EMO, trained with document pools
    ...
    0

    ```
    """
    from transformers_emo.planning import model_info
    from transformers_emo.planning.info_text import info_text

    with stdout_for_json(json):
        found = model_info(
            model, experts=experts, **given(revision=revision, token=token, cache_dir=cache_dir)
        )
    tell(json, info_text(found), **found.to_dict())
