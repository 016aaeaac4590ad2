"""The command `emo write-back`."""

from typing import Annotated

import typer

from .shared import AsJson, CacheDir, Revision, Token, given, stdout_for_json, tell


def write_back(
    full: Annotated[
        str, typer.Argument(help="Folder or Hub repository of the model that the subsets come from.")
    ],
    tuned: Annotated[list[str], typer.Argument(help="Folder or Hub repository of a fine-tuned subset.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="The folder to make.")],
    what: Annotated[
        str, typer.Option(help="routed, shared, router, backbone, several joined by +, or all.")
    ] = "routed",
    weight: Annotated[
        float, typer.Option(help="Share of the tuned values: 1 replaces, 0.5 is the mean.")
    ] = 1.0,
    no_root_check: Annotated[
        bool,
        typer.Option("--no-root-check", help="Do not compare routers to find subsets of another model."),
    ] = False,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    json: AsJson = False,
) -> None:
    """Put fine-tuned subsets back into the full model.

    The full model is written anew, file by file, with the experts of the subsets in their old places. The
    mean is taken of what several subsets hold. After an interruption, the same command goes on.

    Example:

    ```python
    >>> from transformers_emo.cli import main
    >>> small, out = str(tmp_path / "small"), str(tmp_path / "out")
    >>> main(["extract", "model_cards/emo-tiny", "python", small])
    /.../small: 16 experts a layer
    0
    >>> main(["write-back", "model_cards/emo-tiny", small, "--out", out])
    /.../out: ... tensors and router rows written
    0

    ```
    """
    from .. import subsets

    with stdout_for_json(json):
        result = subsets.write_back(
            full,
            tuned,
            out=out,
            what=what,
            weight=weight,
            check_root=not no_root_check,
            **given(revision=revision, token=token, cache_dir=cache_dir),
        )
    averaged = f", {len(result.averaged)} of them averaged" if result.averaged else ""
    text = f"{out}: {len(result.written)} tensors and router rows written{averaged}"
    tell(json, text, out=out, written=result.written, averaged=result.averaged)
