"""The command `emo extract`."""

from typing import Annotated

import typer

from .shared import (
    AsJson,
    CacheDir,
    MaxShardSize,
    Revision,
    Token,
    experts_text,
    given,
    stdout_for_json,
    tell,
)


def extract(
    model: Annotated[str, typer.Argument(help="Folder or Hub repository.")],
    subset: Annotated[str, typer.Argument(help="JSON file, or the name of one in the model's subsets/.")],
    out: Annotated[str, typer.Argument(help="The folder to make.")],
    max_shard_size: MaxShardSize = "5GB",
    dtype: Annotated[
        str | None, typer.Option(help="Convert to it, such as bfloat16.", show_default="as they are")
    ] = None,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    json: AsJson = False,
) -> None:
    """Write a subset of experts as a model of its own.

    The new model loads without the subset. Bytes are copied from file to file: no model is built.

    Example:

    ```python
    >>> from transformers_emo.cli import main
    >>> main(["extract", "model_cards/emo-tiny", "python", str(tmp_path / "python-only")])
    /.../python-only: 16 experts a layer
    0

    ```
    """
    from transformers_emo.subsets import extract_subset

    with stdout_for_json(json):
        config = extract_subset(
            model,
            subset,
            out,
            max_shard_size=max_shard_size,
            dtype=dtype,
            **given(revision=revision, token=token, cache_dir=cache_dir),
        )
    layers = config.layer_experts
    text = f"{out}: {experts_text(layers)} experts a layer"
    tell(json, text, out=out, experts_per_layer=[layer.num_experts for layer in layers])
