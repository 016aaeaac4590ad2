"""The command `emo push`."""

from typing import Annotated

import typer

from .shared import HUB, AsJson, Token, given, stdout_for_json, tell


def push(
    folder: Annotated[str, typer.Argument(help="A model, an adapter, or documents.")],
    repo: Annotated[str, typer.Argument(help="user/name. It is made if it is not there.")],
    private: Annotated[
        bool | None, typer.Option("--private", help="Make it private, if it is made.", show_default=False)
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="The branch.", show_default="main", rich_help_panel=HUB)
    ] = None,
    token: Token = None,
    json: AsJson = False,
) -> None:
    """Put a model, an adapter or documents on the Hub.

    A folder of <domain>.jsonl becomes a dataset. After an interruption, the same command goes on: what has
    been sent is not sent again.

    Example:

    ```python
    >>> from transformers_emo.cli import main
    >>> main(["push", "no-such-folder", "me/emo-math"])
    1

    ```
    """
    from transformers_emo.subsets import push_folder

    with stdout_for_json(json):
        commit = push_folder(folder, repo, private=private, revision=revision, **given(token=token))
    tell(json, commit.commit_url, url=commit.commit_url, commit=commit.oid)
