"""The command `emo chat`."""

from typing import Annotated

import typer

from ..shared import CacheDir, Revision, Token, excluded_experts, given

EXPERTS, DRAWING = "Which experts answer", "How answers are drawn"

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub repository.")]
Domain = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Read only this domain's experts: a name in the model's library, or a subset's file.",
        show_default="all experts",
        rich_help_panel=EXPERTS,
    ),
]
Pool = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Let each prompt choose N experts in every layer.",
        show_default="no pool",
        rich_help_panel=EXPERTS,
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        metavar="WHAT",
        help="Never use these: LAYER:ID,ID (several times), or a domain.",
        show_default="none",
        rich_help_panel=EXPERTS,
    ),
]
MaxNewTokens = Annotated[
    int, typer.Option(metavar="N", min=1, help="The longest answer, in tokens.", rich_help_panel=DRAWING)
]
Temperature = Annotated[
    float,
    typer.Option(metavar="T", min=0, help="0 takes the likeliest token each time.", rich_help_panel=DRAWING),
]
TopP = Annotated[
    float,
    typer.Option(
        metavar="P",
        min=0.01,
        max=1,
        help="Draw among the likeliest tokens, of this probability together.",
        rich_help_panel=DRAWING,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="The same draws each time.", show_default="other draws", rich_help_panel=DRAWING
    ),
]
Dtype = Annotated[str | None, typer.Option(help="Number format.", show_default="that of the files")]
Device = Annotated[str, typer.Option(help="Where the model runs, such as cuda.")]


def chat(
    model: Model,
    domain: Domain = None,
    pool: Pool = None,
    exclude: Exclude = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = None,
    no_experts: Annotated[
        bool, typer.Option("--no-experts", help="Show no experts below answers.", rich_help_panel=DRAWING)
    ] = False,
    dtype: Dtype = None,
    device: Device = "cpu",
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
) -> None:
    """Talk to a model in the terminal, with the experts that answer below.

    A model without a chat template continues the text that is typed. Commands begin with a slash: /domain
    NAME exchanges the experts in memory and says what it cost, /pool and /exclude choose among them, /help
    lists all.
    Without a terminal, lines are read from stdin, and the first error ends it.

    Example:

    ```python
    >>> import io, sys
    >>> from transformers_emo.cli import main
    >>> sys.stdin = io.StringIO("/domain german\\nEs war einmal\\n")
    >>> words = ["--domain", "python", "--max-new-tokens", "4", "--temperature", "0", "--no-experts"]
    >>> main(["chat", "model_cards/emo-tiny", *words])
    emo-tiny: python (16 of 64 in each layer) in memory. It has no chat template: ...
    german: ... MB read (... experts in, ... out, ... kept) in ... ms. ... MB of experts are in memory.
    Es war einmal...
    4 tokens, ... a second; routing: ...
    0

    ```
    """
    from transformers_emo.analysis.trying import ExpertChoice, Session
    from transformers_emo.analysis.trying.terminal import Chat, ChatSettings

    choice = ExpertChoice(pool, excluded_experts(exclude or []))
    hub = given(revision=revision, token=token, cache_dir=cache_dir)
    session = Session.open(model, domain=domain, dtype=dtype, device=device, **hub)
    session.check(choice)
    settings = ChatSettings(max_new_tokens, temperature, top_p, seed, not no_experts)
    Chat(session, excluded_experts, choice=choice, settings=settings).run()
