"""Converting the released layout to a training checkpoint of OLMo-core: the reverse of `from_olmo_core`."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..checkpoints import Checkpoint, CheckpointError
from ..checkpoints.source_files import SourceFiles
from ..checkpoints.writing.output_folder import check_new, new_folder
from ..checkpoints.writing.safetensors_writing import write_json
from ..configuration import LEGACY_MODEL_TYPE, EmoConfig
from ..quantization.packed_config import refuse_quantised
from .from_olmo_core import PROVENANCE, STEP_FILES
from .model_config import TRAINING_SETTINGS, emo_config, read_model_config
from .olmo_core.config_reader import read_config
from .olmo_core.config_writer import training_config
from .olmo_core.distributed_checkpoint import DistributedCheckpoint
from .olmo_core.distributed_writer import row_ranges, write_distributed_checkpoint
from .olmo_core.layout import EMBEDDINGS, HEAD, TensorPart, training_layout

logger = logging.getLogger(__name__)

_MAX_CHUNK_BYTES = 256 << 20
_OLMO_CORE_VERSION = "2.5.0"  # the version whose names and config.json are written
_PADDED_TO = 128  # OLMo-core pads the vocabulary to a multiple of it


@dataclass(frozen=True)
class _Piece:
    """Rows of a training tensor that follow each other, and a function that reads them in any dtype."""

    source: str
    start: int
    stop: int
    read: Callable[[], torch.Tensor]


def convert_to_olmo_core(
    model_folder: str | os.PathLike,
    out: str | os.PathLike,
    *,
    original: str | os.PathLike | None = None,
    settings: Mapping[str, Any] | None = None,
    verify: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Convert a model in the released layout to a checkpoint from which OLMo-core can continue training.

    `<out>/model_and_optim` is a torch.distributed.checkpoint of the parameters in float32, as OLMo-core
    writes it. It has no state of an optimiser or trainer: load it with `load_optim_state=False` and
    `load_trainer_state=False`. Tensors are read and written 256 MB at a time. The folder appears under its
    name when it is whole.

    Training pads the vocabulary from 100,278 tokens to 100,352 rows, which the released layout does not have.
    The additional rows come from `original`. Without it they are zeros. No text leads to these tokens.
    `conversion.json` says which rows they are. It also has what OLMo-core's config cannot hold: which experts
    of its root model a subset has.

    Args:
        model_folder (`str` or `os.PathLike`): a folder with `config.json` and safetensors weights of an EMO,
            a standard mixture of experts or a dense model. All layers must have the same number of experts.
        out (`str` or `os.PathLike`): the folder to make, such as `step0`. It must not exist.
        original (`str` or `os.PathLike`, *optional*): a step folder of the run that the model comes from. It
            gives the padded rows, the rest of `config.json` (data, optimiser, schedule), and the settings of
            training that the model's own `config.json` lacks: released ones do not name pools.
        settings (`Mapping[str, Any]`, *optional*): settings of training in place of those:
            `document_pool_min`, `document_pool_max`, `document_pool_eval`, `attention_within_documents`,
            `attention_dropout`, `balance_loss_coef`, `router_z_loss_coef`, `lm_z_loss_coef`.
        verify (`bool`, defaults to `False`): read the new checkpoint and compare it, bit for bit.
        progress (`bool`, defaults to `True`): show a progress bar.

    Returns:
        `dict[str, Any]`: the contents of the new `config.json`.

    Raises:
        CheckpointError: if the weights are incomplete, damaged or not those that the config describes, or
            `original` is of another model. Nothing is written then.
        ValueError: if OLMo-core has no such model (tied embeddings, biases, several shared experts, layers
            that differ, documents that do not begin at EOS), a setting is unknown, or verification finds a
            difference.
        FileExistsError: if `out` exists.

    Example:

    ```python
    >>> from transformers_emo.conversion import convert_olmo_core, convert_to_olmo_core
    >>> content = convert_to_olmo_core(
    ...     "model_cards/toy-emo", tmp_path / "step0", verify=True, progress=False,
    ...     settings={"document_pool_min": 3, "document_pool_max": 31},
    ... )
    >>> content["model"]["vocab_size"], content["model"]["block"]["feed_forward_moe"]["num_experts"]
    (4096, 32)
    >>> convert_olmo_core(tmp_path / "step0", tmp_path / "model", progress=False).document_pool_max
    31

    ```
    """
    folder, out = Path(model_folder), Path(out)
    check_new(out)
    before = [SourceFiles.of(folder)]
    if original is not None:
        before.append(SourceFiles.of(original, patterns=STEP_FILES))
    with ExitStack() as stack:
        weights = Checkpoint.from_folder(folder)
        stack.callback(weights.source.close)
        found = read_model_config(folder)
        if found["model_type"] not in (EmoConfig.model_type, LEGACY_MODEL_TYPE):
            raise ValueError(
                f"The model is of type {found['model_type']!r}, expected 'emo': convert it with "
                "`upgrade_checkpoint` first."
            )
        config = emo_config(found, {})
        refuse_quantised(config, os.fspath(folder))
        padding = None
        base: dict[str, Any] = {}
        if original is not None:
            original = Path(original)
            trained = read_config(original / "config.json")
            base = json.loads((original / "config.json").read_text(encoding="utf-8"))
            padding = DistributedCheckpoint(original / "model_and_optim")
            stack.callback(padding.close)
            _check_original(config, trained, padding)
            _take_training_settings(config, trained)
        config = emo_config(config.to_dict(), settings or {})
        rows = padding[EMBEDDINGS].shape[0] if padding else _PADDED_TO * -(-config.vocab_size // _PADDED_TO)
        content = training_config(config, rows, base)
        if config.document_pool_min is None and not config.layer_experts[0].is_dense:
            logger.warning(
                "No document pools are set: config.json names the router of a standard mixture of experts. "
                "To train an EMO, set `document_pool_min` and `document_pool_max` (EMO has 8 and 128)."
            )
        if config.retained_experts is not None:
            logger.warning(
                f"The model is a subset of another model's experts, and OLMo-core's config cannot say which. "
                f"{PROVENANCE} does (`retained_experts`). A model that is converted back does not know them."
            )
        parts, shapes = training_layout(config)
        whole = {name: (rows, *shape[1:]) if shape[0] is None else shape for name, shape in shapes.items()}
        _check_weights(weights, parts)
        pieces = list(_pieces(weights, parts, rows, padding))
        with new_folder(out, sources=before) as step:
            with tqdm(total=len(pieces), desc="Converting", unit="tensor", disable=not progress) as bar:
                hashes = write_distributed_checkpoint(
                    step / "model_and_optim", _known(whole), _chunks(pieces, bar.update)
                )
            write_json(step / "config.json", content)
            write_json(step / ".metadata.json", {"version": _OLMO_CORE_VERSION, "ephemeral": False})
            if verify:
                _verify(step / "model_and_optim", pieces, progress)
            write_json(step / PROVENANCE, _provenance(folder, config, rows, original, hashes))
    return content


def _check_original(config: EmoConfig, trained: EmoConfig, checkpoint: DistributedCheckpoint) -> None:
    for name in ("vocab_size", "hidden_size", "eos_token_id"):
        ours, theirs = getattr(config, name), getattr(trained, name)
        if ours != theirs:
            raise CheckpointError(
                f"`{name}` of the model is {ours}, of the original training checkpoint {theirs}: name a step "
                "of the run that the model comes from."
            )
    if checkpoint[EMBEDDINGS].shape != checkpoint[HEAD].shape:
        raise CheckpointError(
            f"The original's {EMBEDDINGS} is of shape {list(checkpoint[EMBEDDINGS].shape)} and its {HEAD} of "
            f"{list(checkpoint[HEAD].shape)}, expected the same: copy the checkpoint again."
        )
    for name in (EMBEDDINGS, HEAD):
        shape = checkpoint[name].shape
        if len(shape) != 2 or shape[0] < config.vocab_size or shape[1] != config.hidden_size:
            raise CheckpointError(
                f"The original's {name} is of shape {list(shape)}, expected at least {config.vocab_size} "
                f"rows of {config.hidden_size}: name a step of the run that the model comes from."
            )
        checkpoint[name].check()


def _take_training_settings(config: EmoConfig, trained: EmoConfig) -> None:
    """Take over the settings of the original run that the model's config leaves at their defaults."""
    default = EmoConfig()
    has_pools = config.document_pool_min is not None
    for name in TRAINING_SETTINGS:
        is_set = has_pools and name.startswith("document_pool")
        if not is_set and getattr(config, name) == getattr(default, name):
            setattr(config, name, getattr(trained, name))


def _check_weights(weights: Checkpoint, parts: list[TensorPart]) -> None:
    expected = {part.name: part.shape for part in parts}
    unknown = sorted(weights.tensors.keys() - expected.keys())
    if unknown:
        raise CheckpointError(
            f"The model has {len(unknown)} tensors that its config does not explain, such as {unknown[0]}: "
            "they would be lost. Use the config.json that belongs to the weights."
        )
    for name, shape in expected.items():
        lazy = weights.lazy([name])
        if lazy.shape != shape:
            raise CheckpointError(
                f"{name} is of shape {list(lazy.shape)}, expected {list(shape)} by config.json."
            )
        if not lazy.dtype.is_floating_point or lazy.dtype.itemsize not in (2, 4):
            raise CheckpointError(f"{name} is of {lazy.dtype}, expected float32, bfloat16 or float16.")


def _pieces(
    weights: Checkpoint, parts: list[TensorPart], rows: int, padding: DistributedCheckpoint | None
) -> Iterator[_Piece]:
    """All rows of all training tensors, tensor by tensor. Rows that are not transposed come in chunks."""
    by_source: dict[str, list[TensorPart]] = {}
    for part in parts:
        by_source.setdefault(part.source, []).append(part)
    for source, of_source in by_source.items():
        for part in of_source:
            yield from _pieces_of(weights, part)
        stop = of_source[-1].stop
        if source in (EMBEDDINGS, HEAD) and stop < rows:
            yield _Piece(
                source, stop, rows, _padded_rows(source, stop, rows, of_source[-1].shape[1], padding)
            )


def _pieces_of(weights: Checkpoint, part: TensorPart) -> Iterator[_Piece]:
    lazy = weights.lazy([part.name])
    if part.transposed:
        yield _Piece(part.source, part.start, part.stop, lambda: lazy[...].T)
        return
    if part.stop - part.start != part.shape[0]:  # flat, in training
        yield _Piece(part.source, part.start, part.stop, lambda: lazy[...].reshape(-1))
        return
    row_bytes = 4 * math.prod(part.shape[1:])
    for first, last in row_ranges(part.shape[0], row_bytes, _MAX_CHUNK_BYTES):
        yield _Piece(
            part.source,
            part.start + first,
            part.start + last,
            lambda a=first, b=last: lazy[a:b],  # type: ignore[misc]
        )


def _padded_rows(
    source: str, start: int, stop: int, width: int, padding: DistributedCheckpoint | None
) -> Callable[[], torch.Tensor]:
    if padding is None:
        return lambda: torch.zeros(stop - start, width)
    return lambda: padding[source].rows(start, stop)


def _chunks(pieces: list[_Piece], update: Callable[[], Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Join pieces that follow each other, in float32, up to the size of a chunk."""
    first = 0
    while first < len(pieces):
        source, start, last = pieces[first].source, pieces[first].start, first + 1
        head = pieces[first].read()
        row = math.prod(head.shape[1:])
        most = max(1, _MAX_CHUNK_BYTES // (4 * row))
        while last < len(pieces) and pieces[last].source == source and pieces[last].stop - start <= most:
            last += 1
        rows = torch.empty((pieces[last - 1].stop - start, *head.shape[1:]), dtype=torch.float32)
        for number in range(first, last):
            piece = pieces[number]
            rows[piece.start - start : piece.stop - start] = head if number == first else piece.read()
            update()
        yield source, rows
        first = last


def _known(shapes: Mapping[str, tuple[int | None, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(n for n in shape if n is not None) for name, shape in shapes.items()}


def _verify(folder: Path, pieces: list[_Piece], progress: bool) -> None:
    written = DistributedCheckpoint(folder)
    try:
        for piece in tqdm(pieces, "Verifying", unit="tensor", disable=not progress):
            expected = piece.read().float()
            if not _same_bits(written[piece.source].rows(piece.start, piece.stop), expected):
                raise ValueError(
                    f"Rows {piece.start} to {piece.stop} of {piece.source} are others when read back: "
                    "nothing was kept. Check the disk."
                )
    finally:
        written.close()


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether float32 tensors are the same, bit for bit, with NaN and the sign of zero."""
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.contiguous().view(torch.int32))


def _provenance(
    folder: Path, config: EmoConfig, rows: int, original: Path | None, hashes: dict[str, str]
) -> dict[str, Any]:
    padded = rows - config.vocab_size
    origin = "zeros" if original is None else f"rows of {original.resolve().name} of the original run"
    return {
        "converted_from": "Hugging Face",
        "model": folder.resolve().name,
        "dtype": "float32",
        "padded_vocabulary_rows": f"{padded}: {origin}" if padded else "none",
        "retained_experts": config.retained_experts,
        "root_experts_per_layer": config.root_experts_per_layer,
        "sha256": hashes,
    }
