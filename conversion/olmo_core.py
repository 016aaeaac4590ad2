"""Training checkpoints of OLMo-core to the released layout, tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from ..configuration import EmoConfig
from ..subsets import CheckpointError
from ..subsets.model_folder import TOKENIZER_FILES
from ..subsets.safetensors_files import size_in_bytes, write_json
from .distributed_checkpoint import DistributedCheckpoint, StoredTensor
from .olmo_core_config import read_config
from .safetensors_writer import PlannedTensor, plan_shards, write_checkpoint
from .verification import verify_logits

_PREFIX = "model."
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROVENANCE = "conversion.json"


@dataclass(frozen=True)
class _Part:
    """A tensor of the released layout: rows of one of the checkpoint's, perhaps reshaped or transposed."""

    name: str
    shape: tuple[int, ...]
    source: str
    start: int
    stop: int
    transposed: bool = False

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        rows = tensor.rows(self.start, self.stop)
        return rows.T if self.transposed else rows.reshape(self.shape)


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
    """Convert a training checkpoint to the released layout, for `from_pretrained`.

    Tensors are read, converted and written one after the other. The folder appears under its name when it is
    whole; a run that is killed leaves at most a folder `.<name>.*.partial` beside it.

    Args:
        step_folder (`str` or `os.PathLike`): a `step<N>` folder: `config.json` and `model_and_optim/`,
            written by any number of ranks. EMO, standard mixtures of experts and dense models.
        out (`str` or `os.PathLike`): the folder to make; it must not exist.
        dtype (`torch.dtype` or `str`, defaults to `torch.float32`): what weights are saved in: float32,
            bfloat16 or float16.
        max_shard_size (`int` or `str`, defaults to `"5GB"`): bytes of one file at most, if tensors allow.
        tokenizer (`str` or `os.PathLike`, *optional*): a folder with tokenizer files to be copied.
        verify (`bool`, defaults to `False`): compare the converted model's logits with those computed
            straight from the checkpoint's tensors. Loads the converted model in float32.
        progress (`bool`, defaults to `True`): show a progress bar.

    Returns:
        `EmoConfig`: the model's.

    Raises:
        CheckpointError: if the checkpoint is incomplete, damaged, refused (`UnsafePickleError`), does not fit
            its config, or has parameters that an EMO model has not. Nothing is written then.
        ValueError: if a setting is not supported, or the converted model computes something else.
        FileExistsError: if `out` exists.

    Example:

    ```python
    >>> from transformers_emo.conversion import convert_olmo_core
    >>> try:
    ...     convert_olmo_core("step10", tmp_path / "model", progress=False)
    ... except OSError as error:
    ...     print(str(error)[:31])
    Cannot read step10/config.json:

    ```
    """
    step_folder, out = Path(step_folder), Path(out)
    wanted = _dtype(dtype)
    size = size_in_bytes(max_shard_size)
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} exists already: name a folder that does not.")
    tokenizer_files = _tokenizer_files(tokenizer)
    config = read_config(step_folder / "config.json")
    checkpoint = DistributedCheckpoint(step_folder / "model_and_optim")
    partial = None
    try:
        parts = _plan(config, checkpoint, progress)
        shards = plan_shards([PlannedTensor(part.name, part.shape) for part in parts], wanted, size)
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        hashes = write_checkpoint(partial, shards, wanted, _tensors(parts, checkpoint, progress))
        config.dtype = wanted
        config.save_pretrained(partial)
        _generation_config(config).save_pretrained(partial)
        for file in tokenizer_files:
            shutil.copyfile(file, partial / file.name)
        difference = verify_logits(partial, checkpoint, config, wanted) if verify else None
        write_json(partial / PROVENANCE, _provenance(step_folder, wanted, parts, hashes, difference))
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o777 & ~mask)  # made for this user alone
        os.rename(partial, out)
    except BaseException:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        checkpoint.close()
    return config


def _plan(config: EmoConfig, checkpoint: DistributedCheckpoint, progress: bool) -> list[_Part]:
    """What is written, in order. Every tensor of the model is used, is of its shape and is whole."""
    width, vocabulary, f = config.hidden_size, config.vocab_size, config.intermediate_size
    head_dim = width // config.num_attention_heads
    kv_width = head_dim * (config.num_key_value_heads or config.num_attention_heads)
    parts: list[_Part] = []
    shapes: dict[str, tuple[int | None, ...]] = {}

    def add(name: str, source: str, *shape: int, rows: int | None = -1) -> None:
        """A tensor as it is; `rows=None`: the first of more rows."""
        parts.append(_Part(name, shape, _PREFIX + source, 0, shape[0]))
        shapes[_PREFIX + source] = (rows if rows != -1 else shape[0], *shape[1:])

    add("model.embed_tokens.weight", "embeddings.weight", vocabulary, width, rows=None)
    for layer, experts in enumerate(config.layer_experts):
        to, block = f"model.layers.{layer}", f"blocks.{layer}"
        add(f"{to}.pre_attention_layernorm.weight", f"{block}.attention_norm.weight", width)
        for theirs, ours, rows in (("q", "q", width), ("k", "k", kv_width), ("v", "v", kv_width)):
            add(f"{to}.self_attn.{ours}_proj.weight", f"{block}.attention.w_{theirs}.weight", rows, width)
        add(f"{to}.self_attn.o_proj.weight", f"{block}.attention.w_out.weight", width, width)
        add(f"{to}.pre_feedforward_layernorm.weight", f"{block}.feed_forward_norm.weight", width)
        if experts.is_dense:
            add(f"{to}.mlp.gate_proj.weight", f"{block}.feed_forward.w1.weight", f, width)
            add(f"{to}.mlp.up_proj.weight", f"{block}.feed_forward.w3.weight", f, width)
            add(f"{to}.mlp.down_proj.weight", f"{block}.feed_forward.w2.weight", width, f)
            continue
        count = experts.num_experts
        router = f"{_PREFIX}{block}.feed_forward_moe.router.weight"
        parts.append(_Part(f"{to}.mlp.gate.weight", (count, width), router, 0, count * width))
        shapes[router] = (count * width,)
        stacked = f"{_PREFIX}{block}.feed_forward_moe.experts.mlp"
        for expert in range(count):
            rows_of = (expert * f, (expert + 1) * f)
            name = f"{to}.mlp.experts.{expert}"
            parts.append(_Part(f"{name}.gate_proj.weight", (f, width), f"{stacked}.w1", *rows_of))
            parts.append(_Part(f"{name}.up_proj.weight", (f, width), f"{stacked}.w3", *rows_of))
            parts.append(_Part(f"{name}.down_proj.weight", (width, f), f"{stacked}.w2", *rows_of, True))
        shapes |= {f"{stacked}.{w}": (count * f, width) for w in ("w1", "w2", "w3")}
    add("model.norm.weight", "lm_head.norm.weight", width)
    add("lm_head.weight", "lm_head.w_out.weight", vocabulary, width, rows=None)
    _check(shapes, vocabulary, checkpoint, progress)
    return parts


def _check(
    shapes: dict[str, tuple[int | None, ...]],
    vocabulary: int,
    checkpoint: DistributedCheckpoint,
    progress: bool,
) -> None:
    unknown = [name for name in checkpoint.names if name.startswith(_PREFIX) and name not in shapes]
    if unknown:
        raise CheckpointError(
            f"The checkpoint has {len(unknown)} parameters that its config does not explain, such as "
            f"{unknown[0]}: it cannot be converted without losing them."
        )
    for name, shape in tqdm(shapes.items(), "Checking", unit="tensor", disable=not progress):
        tensor = checkpoint[name]
        got = tensor.shape
        fits = len(got) == len(shape) and all(
            n >= vocabulary if want is None else n == want for n, want in zip(got, shape, strict=True)
        )
        if not fits:
            shown = [f"{vocabulary} or more" if want is None else want for want in shape]
            raise CheckpointError(f"{name} is of shape {list(got)}, expected {shown} by config.json.")
        if not tensor.dtype.is_floating_point:
            raise CheckpointError(f"{name} is of {tensor.dtype}, expected floating point numbers.")
        tensor.check()


def _tensors(parts: list[_Part], checkpoint: DistributedCheckpoint, progress: bool) -> Iterator[torch.Tensor]:
    with tqdm(total=len(parts), desc="Converting", unit="tensor", disable=not progress) as bar:
        for part in parts:
            yield part.read(checkpoint[part.source])
            bar.update()


def _generation_config(config: EmoConfig) -> GenerationConfig:
    """As released, but the padding token under the name that `generate` reads (not `pad_token`)."""
    return GenerationConfig(
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        do_sample=True,
    )


def _provenance(
    step_folder: Path,
    dtype: torch.dtype,
    parts: list[_Part],
    hashes: dict[str, str],
    difference: float | None,
) -> dict[str, Any]:
    described = step_folder / ".metadata.json"
    try:
        version = json.loads(described.read_text(encoding="utf-8"))["version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        version = None  # the training library's own note: not needed
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


def _tokenizer_files(folder: str | os.PathLike | None) -> list[Path]:
    if folder is None:
        return []
    files = [Path(folder) / name for name in TOKENIZER_FILES if (Path(folder) / name).is_file()]
    if not files:
        raise FileNotFoundError(
            f"There are no tokenizer files in {folder}: expected a folder with tokenizer.json."
        )
    return files


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = _DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"dtype is {dtype}, expected one of {', '.join(_DTYPES)}.")
    return found
