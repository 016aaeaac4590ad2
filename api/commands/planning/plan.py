"""The command `emo plan`."""

from typing import Annotated, Any

import typer

from ..shared import AsJson, CacheDir, Revision, Token, given, stdout_for_json, tell

_SHARING, _HARDWARE, _WORK = "How ranks share the model", "Hardware", "What they do"
_PEAKS = "instead of the preset's"


def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub repository.")],
    task: Annotated[
        str, typer.Option(help="serve: a token of every sequence. train: an update.", rich_help_panel=_WORK)
    ] = "serve",
    sequences: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Sequences at a time, of each rank with texts of its own.",
            rich_help_panel=_WORK,
        ),
    ] = 1,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens of a sequence.",
            show_default="the model's context",
            rich_help_panel=_WORK,
        ),
    ] = None,
    experts: Annotated[
        int | None,
        typer.Option(metavar="K", help="Keep K experts a layer.", show_default="all", rich_help_panel=_WORK),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="8 or 4, for serving.", show_default="those of the model", rich_help_panel=_WORK
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of weights, gradients and moments.", show_default="that of the model", rich_help_panel=_WORK
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="All ranks.", show_default="--tp times --fsdp", rich_help_panel=_SHARING
        ),
    ] = None,
    tp: Annotated[
        int,
        typer.Option(metavar="N", help="Ranks that share each matrix.", rich_help_panel=_SHARING),
    ] = 1,
    fsdp: Annotated[
        int,
        typer.Option(
            metavar="N", help="Ranks that share all weights and gather a layer's.", rich_help_panel=_SHARING
        ),
    ] = 1,
    ep: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Ranks that share the experts: of those of --tp and --fsdp.",
            rich_help_panel=_SHARING,
        ),
    ] = 1,
    hardware: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="laptop, rtx4090, a100, h100, h200, b200 or mi300x, by their makers' figures.",
            rich_help_panel=_HARDWARE,
        ),
    ] = "h200",
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory of a rank.", show_default=_PEAKS, rich_help_panel=_HARDWARE
        ),
    ] = None,
    bandwidth: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="What it reads from memory in a second, such as 3.35TB.",
            show_default=_PEAKS,
            rich_help_panel=_HARDWARE,
        ),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="What it sends within its node in a second.",
            show_default=_PEAKS,
            rich_help_panel=_HARDWARE,
        ),
    ] = None,
    node_link: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="What it sends to other nodes in a second.",
            show_default=_PEAKS,
            rich_help_panel=_HARDWARE,
        ),
    ] = None,
    flops: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help="Operations in a second, such as 989e12.",
            show_default=_PEAKS,
            rich_help_panel=_HARDWARE,
        ),
    ] = None,
    per_node: Annotated[
        int | None,
        typer.Option(metavar="N", help="Ranks in a node.", show_default=_PEAKS, rich_help_panel=_HARDWARE),
    ] = None,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    json: AsJson = False,
) -> None:
    """Say what serving or training a model takes of each rank, from one laptop to 1,024 GPUs.

    Memory, operations, bytes read and sent, and the least time by the hardware's rates. Of a repository only
    the config is fetched. What loading would refuse is refused.

    Example:

    ```python
    >>> from transformers_emo.cli import main
    >>> main(["plan", "model_cards/emo-tiny", "--gpus", "1024", "--fsdp", "8", "--task", "train"])
    model_cards/emo-tiny, trained by 1,024 ranks of h200 (FSDP2 8, replicas 128)
    ...
    0

    ```
    """
    from transformers_emo.planning import ParallelLayout, plan_run
    from transformers_emo.planning.hardware import hardware_named
    from transformers_emo.planning.plan_text import plan_text

    together = tp * fsdp
    ranks = together if gpus is None else gpus
    if together < 1 or ranks < 1 or ranks % together:
        raise ValueError(
            f"{ranks} GPUs are no multiple of --tp {tp} times --fsdp {fsdp}: the rest would be no whole "
            "replica. Give another number."
        )
    rates = {"memory": memory, "bandwidth": bandwidth, "link": link, "node_link": node_link}
    numbers: dict[str, Any] = {name: _bytes(name, size) for name, size in rates.items() if size is not None}
    with stdout_for_json(json):
        found = plan_run(
            model,
            task=task,
            layout=ParallelLayout(tp, fsdp, ep, ranks // together),
            hardware=hardware_named(hardware).replace(flops=flops, per_node=per_node, **numbers),
            experts=experts,
            bits=bits,
            dtype=dtype,
            sequences=sequences,
            context=context,
            **given(revision=revision, token=token, cache_dir=cache_dir),
        )
    tell(json, plan_text(found, model), **found.to_dict())


def _bytes(name: str, size: str) -> int:
    from transformers_emo.checkpoints.writing.safetensors_writing import size_in_bytes

    return size_in_bytes(size, name=f"--{name.replace('_', '-')}")
