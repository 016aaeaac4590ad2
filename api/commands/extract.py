"""The command `emo extract`."""

from pathlib import Path
from typing import Annotated, Any

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
    bits: Annotated[int | None, typer.Option(help="Quantise: 8 or 4.", show_default="as they are")] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="Weights that share a scale; -1 for rows.", show_default="32 for 4 bits, -1 for 8"),
    ] = None,
    zero_points: Annotated[
        bool | None,
        typer.Option(
            "--zero-points/--symmetric", help="With or without zero points.", show_default="with, for 4 bits"
        ),
    ] = None,
    head_bits: Annotated[int | None, typer.Option(help="Bits of the head: 8 or 4.", show_default="8")] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Quantise by text, which is better: a JSONL file with a column text. The subset is then "
            "held in memory.",
        ),
    ] = None,
    max_texts: Annotated[
        int | None, typer.Option(metavar="N", help="Take its first N texts.", show_default="all")
    ] = None,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    json: AsJson = False,
) -> None:
    """Write a subset of experts as a model of its own.

    The new model loads without the subset. Bytes are copied from file to file: no model is built. With
    `--bits` its weights are quantised on the way, and with `--calibrate` by text like that of its use.

    Example:

    ```python
    >>> from transformers_emo.cli import main
    >>> main(["extract", "model_cards/emo-tiny", "python", str(tmp_path / "python-only")])
    /.../python-only: 16 experts a layer
    0

    ```
    """
    from transformers_emo.subsets import extract_subset

    packing = None
    if bits is not None:
        from transformers_emo import PackedConfig

        symmetric = None if zero_points is None else not zero_points
        packing = PackedConfig(bits, group_size, symmetric, 8 if head_bits is None else head_bits)
    elif any(option is not None for option in (zero_points, group_size, head_bits, calibrate)):
        raise ValueError(
            "`--group-size`, `--zero-points`, `--head-bits` and `--calibrate` say how to quantise: give "
            "`--bits` too."
        )
    if max_texts is not None and calibrate is None:
        raise ValueError("`--max-texts` is about the text of `--calibrate`: give both.")
    hub_kwargs = given(revision=revision, token=token, cache_dir=cache_dir)
    settings: dict[str, Any] = {
        "max_shard_size": max_shard_size,
        "dtype": dtype,
        "quantization_config": packing,
    }
    with stdout_for_json(json):
        if calibrate is None:
            config = extract_subset(model, subset, out, **settings, **hub_kwargs)
        else:
            config = _extract_by_text(model, subset, out, calibrate, max_texts, **settings, **hub_kwargs)
    layers = config.layer_experts
    text = f"{out}: {experts_text(layers)} experts a layer"
    tell(json, text, out=out, experts_per_layer=[layer.num_experts for layer in layers])


def _extract_by_text(
    model: str,
    subset: str,
    out: str,
    file: str,
    max_texts: int | None,
    *,
    max_shard_size: str,
    dtype: str | None,
    quantization_config: Any,
    **hub_kwargs: Any,
) -> Any:
    """Load the subset, quantise it by the texts of a file, and save it."""
    from transformers_emo import EmoForCausalLM, quantize_model
    from transformers_emo.checkpoints.source_files import SourceFiles
    from transformers_emo.checkpoints.writing.output_folder import check_new, new_folder
    from transformers_emo.checkpoints.writing.safetensors_writing import floating_dtype, size_in_bytes
    from transformers_emo.subsets.choosing.calibration import CalibrationText, tokenizer_of

    check_new(Path(out))
    size_in_bytes(max_shard_size)
    text = CalibrationText(dataset=file, max_texts=max_texts)
    before = SourceFiles.of(model)
    kwargs: dict[str, Any] = {} if dtype is None else {"dtype": floating_dtype(dtype)}
    loaded = EmoForCausalLM.from_pretrained(model, expert_subset=subset, **kwargs, **hub_kwargs)
    if getattr(loaded.config, "quantization_config", None) is not None:
        raise ValueError(
            f"{model} is in few bits already: give the unquantised model, or leave out `--bits`."
        )
    (batches,) = text.batches(loaded.config, lambda: tokenizer_of(model, **hub_kwargs), progress=True)
    masks = [batch.attention_mask.long() for batch in batches]
    quantize_model(loaded, quantization_config, [b.input_ids for b in batches], attention_mask=masks)
    with new_folder(out, sources=[before]) as work:
        loaded.save_pretrained(work, max_shard_size=max_shard_size)
    return loaded.config
