"""The command `emo export`."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from .shared import (
    AsJson,
    CacheDir,
    MaxShardSize,
    Revision,
    Token,
    given,
    stdout_for_json,
    tell,
)


def export(
    model: Annotated[str, typer.Argument(help="Folder or Hub repository.")],
    out: Annotated[str, typer.Argument(help="The folder to make.")],
    to: Annotated[
        str | None,
        typer.Option(
            metavar="LAYOUT",
            help="qwen2-moe (Transformers, vLLM, MLX, SGLang), deepseek (vLLM, MLX), gguf (llama.cpp).",
            show_default="qwen2-moe",
        ),
    ] = None,
    from_: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="LAYOUT", help="qwen2-moe: make an EMO again of an export that others trained."
        ),
    ] = None,
    expert_subset: Annotated[
        str | None,
        typer.Option(
            metavar="SUBSET",
            help="Only these experts: JSON file, or the name of one in the model's subsets/.",
            show_default="all",
        ),
    ] = None,
    type: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="The numbers: f32, bf16, f16, and for gguf q8_0.",
            show_default="the model's",
        ),
    ] = None,
    max_shard_size: MaxShardSize = "5GB",
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read the files back, and compare logits or tensors with the model's."),
    ] = False,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    json: AsJson = False,
) -> None:
    """Write a model, or a subset of its experts, for other engines.

    The result needs nothing of this package and computes the same. Tensors are copied one by one: no model is
    built. After an interruption, the same command goes on.

    Example:

    ```python
    >>> from transformers_emo.cli import main
    >>> main(["export", "model_cards/emo-tiny", str(tmp_path / "coq"), "--expert-subset", "coq"])
    /.../coq: qwen2-moe, 16 experts a layer, bf16
    0

    ```
    """
    from transformers_emo.conversion import convert_qwen2_moe, export_model

    options = {"max_shard_size": max_shard_size} | given(revision=revision, token=token, cache_dir=cache_dir)
    if from_ is not None:
        _check_way_back(from_, {"--to": to, "--expert-subset": expert_subset, "--verify": verify})
        with stdout_for_json(json):
            config = convert_qwen2_moe(model, out, type=type, **options)
        experts = [layer.num_experts for layer in config.layer_experts]
        text = f"{out}: emo, {_numbers(experts)} experts a layer"
        tell(json, text, out=out, layout="emo", experts_per_layer=experts)
        return
    with stdout_for_json(json):
        layout = to or "qwen2-moe"
        notes = export_model(
            model, out, to=layout, expert_subset=expert_subset, type=type, verify=verify, **options
        )
    experts = notes["experts_per_layer"]
    verified = f", {notes['verified']} verified" if verify else ""
    text = f"{out}: {layout}, {_numbers(experts)} experts a layer, {notes['type']}{verified}"
    tell(json, text, out=out, layout=layout, type=notes["type"], experts_per_layer=experts, verified=verify)


def _check_way_back(layout: str, others: Mapping[str, Any]) -> None:
    if layout != "qwen2-moe":
        raise typer.BadParameter(f"--from is {layout!r}, expected 'qwen2-moe'")
    for name, value in others.items():
        if value:
            raise typer.BadParameter(f"{name} does not go with --from: leave out one of the two")


def _numbers(experts: Sequence[int]) -> str:
    from transformers_emo.subsets.numbering import size_range

    return size_range(number for number in experts if number)
