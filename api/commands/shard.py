"""The command `emo shard`."""

from typing import Annotated

import typer

from .shared import AsJson, CacheDir, Revision, Token, given, stdout_for_json, tell


def shard(
    model: Annotated[str, typer.Argument(help="Folder or Hub repository.")],
    out: Annotated[str, typer.Argument(help="The folder to make.")],
    experts_per_file: Annotated[
        int,
        typer.Option(metavar="N", help="More give fewer files, and subsets download more than they need."),
    ] = 1,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    json: AsJson = False,
) -> None:
    """Cut a checkpoint by expert, so that a subset downloads only its own files.

    The backbone is one file, and each expert another. Any tool loads the whole model as before. After an
    interruption, the same command goes on.

    Example:

    ```python
    >>> from transformers_emo.cli import main
    >>> main(["shard", "model_cards/emo-tiny", str(tmp_path / "sharded"), "--experts-per-file", "8"])
    /.../sharded: ... files of weights
    0

    ```
    """
    from transformers_emo.conversion import shard_experts

    with stdout_for_json(json):
        hub = given(revision=revision, token=token, cache_dir=cache_dir)
        files = shard_experts(model, out, experts_per_file=experts_per_file, **hub)
    tell(json, f"{out}: {len(files)} files of weights", out=out, files=sorted(files))
