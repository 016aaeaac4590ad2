"""Cutting a checkpoint by expert, so that a download of some experts needs only their files.

One file holds the backbone, with the shared experts, which every subset keeps. Each routed expert of each
layer has a file of its own. The index is the standard one: Transformers and other tools load the whole model
as usual.

Why one expert in a file? A subset keeps other experts in each layer, and a download gets all that is in a
file. With two experts in a file, 16 random experts of 128 already cost 1.9 times their bytes. The 2,033 files
of the 14B model are well below the most that the Hub advises (`benchmarks/expert_shards.py`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..checkpoints import Checkpoint, CheckpointError, TensorSpan
from ..checkpoints.local_files import file_inside
from ..checkpoints.side_files import identity_of
from ..checkpoints.source_files import SourceFiles
from ..checkpoints.writing.output_folder import check_new, new_folder
from ..checkpoints.writing.safetensors_writing import header_of, write_json
from ..configuration import EmoConfig
from ..modeling_emo.weight_names import EXPERT_MATRIX, STACKED_EXPERTS
from ..quantization.packed_config import refuse_quantised
from ..subsets.loading.wanted_tensors import lazy_parameters
from ..subsets.loading.weights_check import check_whole
from .from_olmo_core import PROVENANCE
from .source_folder import ALL_FILES, source_folder

BACKBONE = "model-backbone.safetensors"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
_BUFFER = 16 << 20
_FREE = 64 << 20  # bytes of the disk that stay free


def shard_experts(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    experts_per_file: int = 1,
    progress: bool = True,
    **hub_kwargs: Any,
) -> dict[str, list[str]]:
    """Cut a checkpoint into a backbone and experts, so that only chosen experts need to be downloaded.

    Bytes are copied as they are, a few megabytes at a time. The folder appears under its name when it is
    whole. A run that is killed leaves `.<name>.partial` beside it. The same call continues from there, if the
    source has not changed.

    Args:
        source (`str` or `os.PathLike`): folder or Hub repository of an EMO model.
        out (`str` or `os.PathLike`): the folder to make. It must not exist.
        experts_per_file (`int`, defaults to 1): how many neighbouring routed experts of a layer are in one
            file. With one, 16 layers of 128 experts are 2,033 files, and no byte is fetched in vain. With two
            they are half as many files, and 16 random experts fetch 1.58 times their bytes
            (`benchmarks/expert_shards.py`).
        progress (`bool`, defaults to `True`): show a progress bar in bytes.
        hub_kwargs: `revision`, `token`, `cache_dir`, `subfolder` and so on for a repository, as for
            `from_pretrained`. The repository is downloaded first.

    Returns:
        `dict[str, list[str]]`: the files of weights, and the names of the tensors in each.

    Raises:
        CheckpointError: if the checkpoint is damaged, does not fit its config or has stacked experts.
        FileExistsError: if `out` exists, or another job left files for it.
        ValueError: if `experts_per_file` is below 1.

    Example:

    ```python
    >>> from transformers_emo import EmoForCausalLM
    >>> from transformers_emo.conversion import shard_experts
    >>> files = shard_experts("model_cards/toy-emo", tmp_path / "sharded", progress=False)
    >>> len(files), files["model-layer00-expert007.safetensors"][0]
    (125, 'model.layers.0.mlp.experts.7.down_proj.weight')
    >>> model = EmoForCausalLM.from_pretrained(tmp_path / "sharded")

    ```
    """
    out = Path(out)
    if type(experts_per_file) is not int or experts_per_file < 1:
        raise ValueError(f"`experts_per_file` is {experts_per_file!r}, expected an integer from 1.")
    check_new(out)
    without = [ending for ending in _WEIGHTS if ending != ".safetensors"]
    before = SourceFiles.of(source, patterns=ALL_FILES, subfolder=hub_kwargs.get("subfolder"))
    folder = source_folder(source, without=without, **hub_kwargs)
    config = EmoConfig.from_pretrained(folder)
    refuse_quantised(config, os.fspath(source))
    checkpoint = Checkpoint.from_folder(folder)
    try:
        # Refuses a checkpoint in which a tensor is missing or has another shape.
        check_whole(lazy_parameters(checkpoint, config, None), config, os.fspath(source))
        files = plan_expert_files(checkpoint.tensors, config, experts_per_file)
        # A downloaded folder has the commit in its name, so the plan has it too.
        plan = {"source": identity_of(folder, checkpoint), "files": files}
        with new_folder(out, plan=plan, sources=[before]) as partial:
            for left in partial.glob("*.partial"):
                left.unlink()
            headers = {file: _header(names, checkpoint.tensors) for file, names in files.items()}
            total = sum(len(header) for header in headers.values()) + _size(checkpoint.tensors)
            free = shutil.disk_usage(partial).free
            there = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
            if free < total - there + _FREE:
                raise CheckpointError(
                    f"{out.parent} has room for {free} bytes, expected "
                    f"{total - there + _FREE}: make room, or name a folder on another disk."
                )
            with tqdm(total=total, desc="Sharding", unit="B", unit_scale=True, disable=not progress) as bar:
                for file, names in files.items():
                    _write(partial / file, headers[file], names, checkpoint, bar)
            _finish(partial, folder, files, _size(checkpoint.tensors))
    finally:
        checkpoint.source.close()
    return files


def plan_expert_files(
    names: Iterable[str], config: EmoConfig, experts_per_file: int = 1
) -> dict[str, list[str]]:
    """Decide which tensors go into which file.

    Args:
        names (`Iterable[str]`): the tensors of a checkpoint.
        config (`EmoConfig`): its config.
        experts_per_file (`int`, defaults to 1): how many neighbouring routed experts of a layer are in one
            file.

    Returns:
        `dict[str, list[str]]`: the tensors of each file, sorted by name. The backbone is the first file.

    Raises:
        CheckpointError: if all experts of a layer are in one tensor.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.conversion.expert_shards import plan_expert_files
    >>> config = EmoConfig(num_hidden_layers=1, num_experts=8, num_experts_per_tok=4)
    >>> names = [f"model.layers.0.mlp.experts.{e}.up_proj.weight" for e in range(8)]
    >>> list(plan_expert_files(names, config, 4))
    ['model-backbone.safetensors', 'model-layer00-expert000-003.safetensors',
     'model-layer00-expert004-006.safetensors']

    ```
    """
    files: dict[str, list[str]] = {BACKBONE: []}
    for name in sorted(names, key=_by_numbers):
        if STACKED_EXPERTS.fullmatch(name):
            raise CheckpointError(
                f"{name} holds all experts of a layer: load the model and save it with `save_pretrained`, "
                "which writes each expert by itself."
            )
        file = BACKBONE
        if match := EXPERT_MATRIX.fullmatch(name):
            number, expert = int(match["layer"]), int(match["expert"])
            layer = config.layer_experts[number]
            if expert not in layer.always_used:
                first = expert - expert % experts_per_file
                last = min(first + experts_per_file, layer.num_routed) - 1
                span = f"{first:03d}" if experts_per_file == 1 else f"{first:03d}-{last:03d}"
                file = f"model-layer{number:02d}-expert{span}.safetensors"
        files.setdefault(file, []).append(name)
    return files


def _by_numbers(name: str) -> tuple:
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split("."))


def _size(tensors: dict[str, TensorSpan]) -> int:
    return sum(span.end - span.start for span in tensors.values())


def _header(names: list[str], tensors: dict[str, TensorSpan]) -> bytes:
    """The header of a file with these tensors. The widest dtypes come first, so that all are aligned."""
    names.sort(key=lambda name: -tensors[name].dtype.itemsize)
    return header_of({name: (tensors[name].dtype, tensors[name].shape) for name in names})


def _write(path: Path, header: bytes, names: list[str], checkpoint: Checkpoint, bar: tqdm) -> None:
    """Write a file under another name and rename it. A file that has its full size already is skipped."""
    spans = [checkpoint.tensors[name] for name in names]
    size = len(header) + sum(span.end - span.start for span in spans)
    if path.exists() and path.stat().st_size == size:
        bar.update(size)
        return
    partial = path.with_name(f"{path.name}.partial")
    buffer = memoryview(bytearray(_BUFFER))
    with open(partial, "wb") as out:
        out.write(header)
        bar.update(len(header))
        for span in spans:
            for start in range(span.start, span.end, _BUFFER):
                part = buffer[: min(_BUFFER, span.end - start)]
                checkpoint.source.read_into(span.file, start, part)
                out.write(part)
                bar.update(len(part))
        out.flush()
        os.fsync(out.fileno())
    partial.replace(path)


def _finish(partial: Path, folder: Path, files: dict[str, list[str]], size: int) -> None:
    """Write everything but the weights: copied files, the conversion notes and the index."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        is_weights = path.name.endswith(_WEIGHTS) or path.name == SAFE_WEIGHTS_INDEX_NAME
        if path.is_file() and not is_weights and not any(part.startswith(".") for part in name.parts):
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file_inside(folder, name), partial / name)
    provenance = partial / PROVENANCE
    if provenance.is_file():  # how the source was converted; its hashes are those of other files
        with suppress(ValueError, RecursionError):
            said = json.loads(provenance.read_text(encoding="utf-8"))
            if isinstance(said, dict) and said.pop("sha256", None) is not None:
                write_json(provenance, said)
    weight_map = {name: file for file, names in files.items() for name in names}
    write_json(
        partial / SAFE_WEIGHTS_INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": weight_map}
    )
