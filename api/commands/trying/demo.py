"""The command `emo demo`."""

from typing import Annotated

import typer

from ..shared import CacheDir, Revision, Token, excluded_experts, given
from .chat import Device, Domain, Dtype, Model

SPACE = "A Space on the Hugging Face Hub"


def demo(
    model: Model,
    domain: Domain = None,
    host: Annotated[
        str | None,
        typer.Option(help="Address to listen at.", show_default="127.0.0.1, or GRADIO_SERVER_NAME"),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=65535,
            help="Port to listen at.",
            show_default="a free one from 7860 on, or GRADIO_SERVER_PORT",
        ),
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Serve nothing: write the folder of a Space with the page. A local model is copied into it.",
            show_default="none",
            rich_help_panel=SPACE,
        ),
    ] = None,
    package: Annotated[
        str | None,
        typer.Option(
            metavar="REQUIREMENT",
            help="What the Space is to `pip install` for this package, such as "
            "'transformers-emo[demo] @ git+https://...'.",
            show_default="transformers-emo[demo] of this version",
            rich_help_panel=SPACE,
        ),
    ] = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
) -> None:
    """Show a page on which a model can be tried, and its experts be seen while they write.

    The page has the choices of `emo chat`. It needs Gradio (the extra `demo`) and asks nothing of other
    servers.
    Ctrl-C ends it.

    Example:

    ```python
    >>> from transformers_emo.cli import main
    >>> main(["demo", "model_cards/emo-tiny", "--space", str(tmp_path / "space")])
    /...space: app.py, requirements.txt, README.md and the model, ... MB
    0

    ```
    """
    from transformers_emo.imports.optional_packages import require

    hub = given(revision=revision, token=token, cache_dir=cache_dir)
    if space is not None:
        from transformers_emo.analysis.trying.space import write_space

        words = {"--domain": domain, "--dtype": dtype, "--revision": revision}
        print(write_space(model, space, options=given(**words), requirement=package))
        return
    if package is not None:
        raise ValueError(f"--package {package!r} is for a Space: give --space DIR too, or leave it out.")
    require("The page needs", "gradio")
    from transformers_emo.analysis.trying import Session
    from transformers_emo.analysis.trying.web_page import launch_page

    session = Session.open(model, domain=domain, dtype=dtype, device=device, **hub)
    launch_page(session, excluded_experts, host=host, port=port)
