"""The command `emo convert`, one part of it for each kind of conversion."""

from typing import Annotated

import typer

from ..command_words import EmoGroup
from .shared import (
    AsJson,
    CacheDir,
    MaxShardSize,
    Revision,
    Setting,
    Token,
    add_command,
    given,
    layers_text,
    read_setting,
    stdout_for_json,
    tell,
)

Settings = Annotated[
    list[Setting] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        parser=read_setting,
        help="A setting of training, such as document_pool_min=8. May be repeated.",
    ),
]
Out = Annotated[str, typer.Argument(help="The folder to make.")]


def olmo_core_to_hf(
    step: Annotated[str, typer.Argument(help="Folder with config.json and model_and_optim/.")],
    out: Out,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 or float16.")] = "float32",
    max_shard_size: MaxShardSize = "5GB",
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Copy the tokenizer files of this folder.", show_default="none"),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Check saved sums, and compare logits with the training checkpoint."),
    ] = False,
    json: AsJson = False,
) -> None:
    """Make a training checkpoint of OLMo-core ready for from_pretrained.

    Converts a step folder (EMO, standard mixture of experts, or dense) tensor by tensor. Nothing in it is
    unpickled.

    Example:

    ```python
    >>> from transformers_emo.cli import main
    >>> main(["convert", "olmo-core-to-hf", "no-such-step", str(tmp_path / "out")])
    1

    ```
    """
    from transformers_emo.conversion import convert_olmo_core

    with stdout_for_json(json):
        config = convert_olmo_core(
            step, out, dtype=dtype, max_shard_size=max_shard_size, tokenizer=tokenizer, verify=verify
        )
    without = "" if tokenizer else "; without a tokenizer, which --tokenizer copies"
    layers = config.layer_experts
    text = f"{out}: {layers_text(layers)}{without}"
    experts = [layer.num_experts for layer in layers]
    tell(json, text, out=out, experts_per_layer=experts, tokenizer=tokenizer is not None, verified=verify)


def hf_to_olmo_core(
    model: Annotated[str, typer.Argument(help="Folder with config.json and safetensors weights.")],
    out: Annotated[str, typer.Argument(help="The folder to make, such as step0.")],
    original: Annotated[
        str | None,
        typer.Option(
            metavar="STEP",
            help="A step of the run that the model comes from. Padded vocabulary rows, data and optimiser "
            "settings are taken from it.",
            show_default="none; padded rows are zeros",
        ),
    ] = None,
    set: Settings = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read everything back and compare it.")] = False,
    json: AsJson = False,
) -> None:
    """Make a model ready for OLMo-core to go on training it.

    Converts a model folder to a step folder, tensor by tensor. The step folder holds parameters in float32
    and config.json, and no state of an optimiser.

    Example:

    ```python
    >>> from transformers_emo.cli import main
    >>> main(["convert", "hf-to-olmo-core", "model_cards/emo-tiny", str(tmp_path / "step0")])
    /.../step0: config.json and model_and_optim/
    0

    ```
    """
    from transformers_emo.conversion import convert_to_olmo_core

    with stdout_for_json(json):
        convert_to_olmo_core(model, out, original=original, settings=dict(set or []), verify=verify)
    tell(json, f"{out}: config.json and model_and_optim/", out=out, verified=verify)


def upgrade(
    repo: Annotated[str, typer.Argument(help="Folder or Hub repository.")],
    out: Out,
    set: Settings = None,
    link: Annotated[
        bool, typer.Option("--link", help="Make hard links to the weights instead of copies.")
    ] = False,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    json: AsJson = False,
) -> None:
    """Make a clean Transformers 5 folder of an older repository.

    Takes an EMO repository with old names or remote code, or a standard mixture of experts that an EMO
    computes exactly. Weights are copied byte for byte.

    Example:

    ```python
    >>> from transformers_emo.cli import main
    >>> main(["convert", "upgrade", "no-such-folder", str(tmp_path / "out")])
    1

    ```
    """
    from transformers_emo.conversion import upgrade_checkpoint

    with stdout_for_json(json):
        hub = given(revision=revision, token=token, cache_dir=cache_dir)
        config = upgrade_checkpoint(repo, out, settings=dict(set or []), link=link, **hub)
    layers = config.layer_experts
    text = f"{out}: {layers_text(layers)}"
    tell(json, text, out=out, experts_per_layer=[layer.num_experts for layer in layers])


def conversions() -> typer.Typer:
    """Make `emo convert` with its parts.

    Returns:
        `typer.Typer`: to be added to the command `emo`.

    Example:

    ```python
    >>> from transformers_emo.commands.convert import conversions
    >>> [command.name for command in conversions().registered_commands]
    ['olmo-core-to-hf', 'hf-to-olmo-core', 'upgrade']

    ```
    """
    app = typer.Typer(
        cls=EmoGroup, help="Convert checkpoints from one layout to another.", subcommand_metavar="KIND ..."
    )
    add_command(app, olmo_core_to_hf, "olmo-core-to-hf")
    add_command(app, hf_to_olmo_core, "hf-to-olmo-core")
    add_command(app, upgrade, "upgrade")
    return app
