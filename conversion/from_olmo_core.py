"""Converting training checkpoints of OLMo-core to the released layout, tensor by tensor."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from ..checkpoints import CheckpointError
from ..checkpoints.hub.names import existing_folder
from ..checkpoints.side_files import TOKENIZER_FILES, copy_side_files, side_files
from ..checkpoints.small_files import read_json
from ..checkpoints.source_files import SourceFiles
from ..checkpoints.writing.output_folder import check_new, new_folder
from ..checkpoints.writing.safetensors_writing import size_in_bytes, write_json
from ..checkpoints.writing.tensor_writer import PlannedTensor, plan_shards, write_checkpoint
from ..configuration import EmoConfig
from .olmo_core.config_reader import read_config
from .olmo_core.distributed_checkpoint import DistributedCheckpoint
from .olmo_core.layout import PREFIX, TensorPart, training_layout
from .olmo_core.part_writer import PartWriter
from .olmo_core.verification import verify_logits

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROVENANCE = "conversion.json"
STEP_FILES = ("config.json", ".metadata.json", "model_and_optim/.metadata", "model_and_optim/*.distcp")


def convert_olmo_core(
    step_folder: str | os.PathLike,
    out: str | os.PathLike,
    *,
    dtype: torch.dtype | str = torch.float32,
    max_shard_size: int | str = "5GB",
    tokenizer: str | os.PathLike | None = None,
    verify: bool = False,
    progress: bool = True,
) -> EmoConfig:
    """Convert a training checkpoint to the released layout, which `from_pretrained` reads.

    Several threads read, convert and write a few tensors at a time. The folder appears under its name when it
    is whole. A run that is killed leaves `.<name>.partial` beside it, which the next run removes.

    Args:
        step_folder (`str` or `os.PathLike`): a `step<N>` folder with `config.json` and `model_and_optim/`, by
            any number of ranks. The model may be an EMO, a standard mixture of experts or dense.
        out (`str` or `os.PathLike`): the folder to make. It must not exist.
        dtype (`torch.dtype` or `str`, defaults to `torch.float32`): the dtype to save weights in: float32,
            bfloat16 or float16.
        max_shard_size (`int` or `str`, defaults to `"5GB"`): the most bytes of one file. A larger tensor gets
            a file of its own.
        tokenizer (`str` or `os.PathLike`, *optional*): a folder of which the tokenizer files are copied.
        verify (`bool`, defaults to `False`): check the checksums of the training checkpoint, and compare the
            logits of the converted model with those computed from the tensors of the training checkpoint.
            This loads the converted model in float32.
        progress (`bool`, defaults to `True`): show a progress bar.

    Returns:
        `EmoConfig`: the config of the converted model.

    Raises:
        CheckpointError: if the checkpoint is incomplete, damaged or refused (`UnsafePickleError`), does not
            fit its config, or has parameters that an EMO model does not have. Nothing is written then.
        ValueError: if a setting is not supported, or the converted model computes something else.
        FileExistsError: if `out` exists.

    Example:

    ```python
    >>> from transformers_emo.conversion import convert_olmo_core
    >>> try:
    ...     convert_olmo_core("step10", tmp_path / "model", progress=False)
    ... except OSError as error:
    ...     print(str(error)[:27])
    There is no folder 'step10'

    ```
    """
    step_folder, out = Path(step_folder), Path(out)
    wanted = _dtype(dtype)
    size = size_in_bytes(max_shard_size)
    check_new(out)
    tokenizer_files = _tokenizer_files(tokenizer)
    before = [SourceFiles.of(step_folder, patterns=STEP_FILES)]
    if tokenizer is not None:
        before.append(SourceFiles.of(tokenizer, patterns=TOKENIZER_FILES))
    config = read_config(step_folder / "config.json")
    checkpoint = DistributedCheckpoint(step_folder / "model_and_optim")
    try:
        parts = _plan(config, checkpoint, progress)
        if verify:
            sources = sorted({part.source for part in parts})
            for source in tqdm(sources, "Checking sums", unit="tensor", disable=not progress):
                checkpoint[source].check_bytes()
        shards = plan_shards([PlannedTensor(part.name, part.shape) for part in parts], wanted, size)
        with new_folder(out, sources=before) as folder:
            hashes = _write(folder, shards, wanted, parts, checkpoint, progress)
            config.dtype = wanted
            config.save_pretrained(folder)
            generation_config(config).save_pretrained(folder)
            copy_side_files(tokenizer or "", tokenizer_files, folder)
            difference = verify_logits(folder, checkpoint, config, wanted) if verify else None
            write_json(folder / PROVENANCE, _provenance(step_folder, wanted, parts, hashes, difference))
    finally:
        checkpoint.close()
    return config


def _plan(config: EmoConfig, checkpoint: DistributedCheckpoint, progress: bool) -> list[TensorPart]:
    """The tensors to write, in order. All must be in the checkpoint, whole and in their shapes."""
    parts, shapes = training_layout(config)
    _check(shapes, config.vocab_size, checkpoint, progress)
    return parts


def _check(
    shapes: dict[str, tuple[int | None, ...]],
    vocabulary: int,
    checkpoint: DistributedCheckpoint,
    progress: bool,
) -> None:
    unknown = [name for name in checkpoint.names if name.startswith(PREFIX) and name not in shapes]
    if unknown:
        raise CheckpointError(
            f"The checkpoint has {len(unknown)} parameters that its config does not explain, such as "
            f"{unknown[0]}: they would be lost. Use the config.json of the same step."
        )
    for name, shape in tqdm(shapes.items(), "Checking", unit="tensor", disable=not progress):
        tensor = checkpoint[name]
        got = tensor.shape
        fits = len(got) == len(shape) and all(
            n >= vocabulary if want is None else n == want for n, want in zip(got, shape, strict=True)
        )
        if not fits:
            shown = [f"{vocabulary} or more" if want is None else want for want in shape]
            raise CheckpointError(
                f"{name} is of shape {list(got)}, expected {shown} by config.json: use the config.json of "
                "the same step."
            )
        if not tensor.dtype.is_floating_point:
            raise CheckpointError(
                f"{name} is of {tensor.dtype}, expected floating-point numbers: this is no checkpoint of "
                "a model. Name a `step<N>` folder."
            )
        tensor.check()


def _write(
    folder: Path,
    shards: dict[str, list[PlannedTensor]],
    dtype: torch.dtype,
    parts: list[TensorPart],
    checkpoint: DistributedCheckpoint,
    progress: bool,
) -> dict[str, str]:
    by_name = {part.name: part for part in parts}
    writer = PartWriter(checkpoint, dtype)
    try:
        with tqdm(total=len(parts), desc="Converting", unit="tensor", disable=not progress) as bar:
            return write_checkpoint(
                folder,
                shards,
                dtype,
                lambda name, descriptor, offset: writer.write(by_name[name], descriptor, offset),
                done=bar.update,
            )
    finally:
        writer.close()


def generation_config(config: EmoConfig) -> GenerationConfig:
    """The generation config of the released models, with the padding token by the name that `generate` reads.

    Args:
        config (`EmoConfig`): the config of the model. It has the special tokens.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.conversion.from_olmo_core import generation_config
    >>> generation_config(EmoConfig()).pad_token_id
    100277

    ```
    """
    return GenerationConfig(
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        do_sample=True,
    )


def _provenance(
    step_folder: Path,
    dtype: torch.dtype,
    parts: list[TensorPart],
    hashes: dict[str, str],
    difference: float | None,
) -> dict[str, Any]:
    described = step_folder / ".metadata.json"
    try:
        version = read_json(described)["version"]
    except (OSError, ValueError, KeyError, TypeError):
        version = None  # only a note of the training library
    sources = ("config.json", "model_and_optim/.metadata")
    return {
        "converted_from": "OLMo-core",
        "step": step_folder.resolve().name,
        "olmo_core_version": version,
        "source_sha256": {
            file: hashlib.sha256((step_folder / file).read_bytes()).hexdigest() for file in sources
        },
        "dtype": str(dtype).removeprefix("torch."),
        "tensors": len(parts),
        "sha256": hashes,
        "largest_logit_difference": difference,
    }


def _tokenizer_files(folder: str | os.PathLike | None) -> list[str]:
    if folder is None:
        return []
    files = side_files(existing_folder(folder), TOKENIZER_FILES)
    if not files:
        raise FileNotFoundError(
            f"There are no tokenizer files in {folder}: expected a folder with tokenizer.json."
        )
    return files


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = _DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"`dtype` is {dtype}, expected one of {', '.join(_DTYPES)}.")
    return found
