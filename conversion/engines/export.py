"""Exporting an EMO, or a subset of its experts, to what other engines load."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ...checkpoints import CheckpointError
from ...checkpoints.lazy_tensor import LazyTensor
from ...checkpoints.side_files import GENERATION_CONFIG, TOKENIZER_FILES, copy_side_files, side_files
from ...checkpoints.source_files import SourceFiles
from ...checkpoints.writing.long_files import FilePart, remove_notes, write_parts
from ...checkpoints.writing.output_folder import check_new, check_space, new_folder
from ...checkpoints.writing.safetensors_writing import (
    divide,
    header_of,
    size_in_bytes,
    write_index,
    write_json,
)
from ...configuration import EmoConfig
from ...subsets.expert_subset import ExpertSubset
from ...subsets.loading.model_source import ModelSource
from ...subsets.loading.weights_check import check_whole
from ...subsets.rewriting.expert_tensors import released_tensors
from ..from_olmo_core import PROVENANCE
from .backbone import OWN_SETTINGS
from .deepseek import CONFIG_CODE, CONFIG_TEXT, deepseek_config, deepseek_tensors
from .export_card import Exported, export_card, licence_of
from .export_tensor import DTYPES, tensor_part
from .gguf_file import TYPES, gguf_parts, gguf_tensors
from .qwen2_moe import qwen2_moe_config, qwen2_moe_tensors
from .routing_shape import LAYOUTS, RoutingShape, routing_shape
from .verification import verify_gguf, verify_logits, verify_tensors

logger = logging.getLogger(__name__)

_BY_DTYPE = {dtype: kind for kind, dtype in DTYPES.items()}
_HOPELESS = (ValueError, ImportError, CheckpointError)  # the same call would fail again
_WRITTEN = {
    "qwen2-moe": (qwen2_moe_config, qwen2_moe_tensors),
    "deepseek": (deepseek_config, deepseek_tensors),
}


def export_model(
    model: str | os.PathLike,
    out: str | os.PathLike,
    *,
    to: str = "qwen2-moe",
    expert_subset: Any = None,
    exclude_experts: Any = None,
    type: str | None = None,
    max_shard_size: int | str = "5GB",
    verify: bool = False,
    progress: bool = True,
    **hub_kwargs: Any,
) -> dict[str, Any]:
    """Write a model, or a subset of its experts, as a model that other engines know.

    The result needs nothing of this package. It computes the same as the model: weights are copied, and what
    changes is multiplied by powers of two. Tensors are copied one after the other, with a few megabytes of
    memory, and only the kept experts' bytes are read. The folder appears under its name when it is whole; if
    the run is killed, the same call continues.

    - `"qwen2-moe"`: plain Transformers, vLLM, MLX, SGLang.
    - `"deepseek"`: vLLM and MLX, for models whose first layers are dense.
    - `"gguf"`: llama.cpp, Ollama, LM Studio; one file.

    Args:
        model (`str` or `os.PathLike`): folder or Hub repository, in the released layout, cut by expert
            (`shard_experts`), or a subset.
        out (`str` or `os.PathLike`): the folder to make. It must not exist. A GGUF is the file
            `<name of the folder>.gguf` in it.
        to (`str`, defaults to `"qwen2-moe"`): the layout.
        expert_subset (*optional*): the experts to keep: anything that `ExpertSubset.of` takes, such as the
            name of a subset in the model's `subsets/`.
        exclude_experts (*optional*): experts to leave out, as for `from_pretrained`.
        type (`str`, *optional*): the numbers: `"f32"`, `"bf16"` or `"f16"`, and for a GGUF `"q8_0"`; by
            default those of the model. `"f16"` is refused for `"qwen2-moe"`, whose gate is too small for it.
        max_shard_size (`int` or `str`, defaults to `"5GB"`): bytes of one safetensors file at most.
        verify (`bool`, defaults to `False`): read what was written. For `"qwen2-moe"` logits are computed
            from the files, layer by layer in float32, and compared with the model's. Otherwise tensors are
            compared.
        progress (`bool`, defaults to `True`): show a progress bar.
        hub_kwargs: `revision`, `token`, `cache_dir` and so on, as for `from_pretrained`.

    Returns:
        `dict[str, Any]`: the contents of `conversion.json`: the source, the kept experts, the hashes of the
        files, and with `verify` the largest difference.

    Raises:
        ValueError: if the layout cannot hold the model exactly, with every reason; if llama.cpp would not
            give the ids of the tokenizer; if `to` or `type` is unknown; or if verification finds a
            difference.
        SubsetError: if the subset does not fit the model.
        CheckpointError: if the checkpoint is damaged, incomplete, quantised or no safetensors.
        ImportError: if a GGUF is wanted and the `gguf` package is not installed.
        FileExistsError: if `out` exists, or another job left files for it.
        OSError: if the disk has no room for it.
        SourceChangedError: if the folder of the model changed meanwhile.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM
    >>> from transformers_emo.conversion import export_model
    >>> _ = export_model(
    ...     "model_cards/emo-tiny", tmp_path / "coq", expert_subset="coq", verify=True, progress=False
    ... )
    >>> type(AutoModelForCausalLM.from_pretrained(tmp_path / "coq")).__name__
    'Qwen2MoeForCausalLM'

    ```
    """
    out = Path(out)
    _check_choices(to, type)
    check_new(out)
    shard_bytes = size_in_bytes(max_shard_size)
    before = SourceFiles.of(model, subfolder=hub_kwargs.get("subfolder"))
    with ExitStack() as stack:
        source = stack.enter_context(ModelSource.open(model, **hub_kwargs))
        source.refuse_quantised()
        kept, config = None, source.config
        if expert_subset is not None or exclude_experts is not None:
            kept = source.keep(_subset_of(expert_subset, source), exclude_experts)
            config = source.config_of(kept)
        parameters = source.parameters(None if kept is None else kept.local)
        tensors = released_tensors(parameters)
        check_whole(parameters, config, os.fspath(model))
        shape = routing_shape(config, to, _output_biases(tensors))
        kind = type or _kind_of(tensors)
        _check_type(to, kind)
        source.fetch(tensors.values(), progress=progress)
        if kept is not None:
            source.warn_if_chosen_elsewhere(kept, tensors)
        companions = side_files(model, (GENERATION_CONFIG, *TOKENIZER_FILES, "LICENSE*"), **source.hub_kwargs)
        plan = {
            "source": source.identity(),
            "experts": None if kept is None else kept.subset.experts,
            "to": to,
            "type": kind,
            "max_shard_size": shard_bytes,
        }
        with new_folder(out, plan=plan, sources=[before], hopeless=_HOPELESS) as work:
            copy_side_files(model, companions, work, **source.hub_kwargs)
            job = _Job(config, shape, tensors, parameters, kind, work, out, progress)
            about = _about(model, source, config)
            if to == "gguf":
                content = _write_gguf(job, about, verify)
            else:
                content = _write_safetensors(job, to, shard_bytes, verify)
            remove_notes(work)
            notes = {"exported_to": to, "type": kind, **about, **content}
            write_json(work / PROVENANCE, notes)
            exported = Exported(out.name, to, kind, about, config, shape)
            (work / "README.md").write_text(export_card(exported), encoding="utf-8")
    return notes


@dataclass(frozen=True)
class _Job:
    config: EmoConfig
    shape: RoutingShape
    tensors: Mapping[str, LazyTensor]
    parameters: Mapping[str, LazyTensor]
    kind: str
    folder: Path
    out: Path
    progress: bool

    def write(self, files: Mapping[str, Sequence[FilePart]]) -> dict[str, str]:
        """Write files, and return their SHA-256."""
        total = sum(part.length for parts in files.values() for part in parts)
        there = sum(path.stat().st_size for name in files if (path := self.folder / name).exists())
        check_space(self.out, total - min(there, total))
        with tqdm(
            total=total, desc="Exporting", unit="B", unit_scale=True, disable=not self.progress, delay=1
        ) as bar:
            return {
                name: write_parts(self.folder / name, parts, done=bar.update) for name, parts in files.items()
            }


def _write_safetensors(job: _Job, to: str, shard_bytes: int, verify: bool) -> dict[str, Any]:
    config_of, tensors_of = _WRITTEN[to]
    dtype = DTYPES[job.kind]
    planned = {tensor.name: tensor for tensor in tensors_of(job.config, job.shape, job.tensors)}
    layouts = {name: (dtype, tensor.shape) for name, tensor in planned.items()}
    shards = divide(((name, part.numel * dtype.itemsize) for name, part in planned.items()), shard_bytes)
    files = {
        file: [
            FilePart.of(header_of({name: layouts[name] for name in names})),
            *(tensor_part(planned[name], dtype) for name in names),
        ]
        for file, names in shards.items()
    }
    hashes = job.write(files)
    write_index(job.folder, shards, layouts)
    content = config_of(job.config, job.shape) | {"dtype": str(dtype).removeprefix("torch.")}
    write_json(job.folder / "config.json", content)
    if to == "deepseek":
        (job.folder / CONFIG_CODE).write_text(CONFIG_TEXT, encoding="utf-8")
    if not verify:
        return {"sha256": hashes}
    verify_tensors(job.folder, planned, dtype, progress=job.progress)
    if to != "qwen2-moe":
        return {"sha256": hashes, "verified": "tensors"}
    difference = verify_logits(job.folder, job.config, job.parameters, dtype, progress=job.progress)
    return {"sha256": hashes, "verified": "logits", "largest_difference": difference}


def _write_gguf(job: _Job, about: Mapping[str, Any], verify: bool) -> dict[str, Any]:
    tensors = gguf_tensors(job.config, job.shape, job.tensors, job.kind)
    has_tokenizer = (job.folder / "tokenizer.json").is_file()
    if not has_tokenizer:
        logger.warning(
            "The model has no tokenizer.json, so the GGUF has no tokenizer: llama.cpp needs one to take text."
        )
    description = {
        "name": job.out.name,
        "license": about.get("license"),
        "base_model": about["model"],
        "experts": json.dumps(_own_settings(job.config)),
    }
    tokenizer = job.folder if has_tokenizer else None
    parts = gguf_parts(job.config, job.shape, tensors, job.kind, tokenizer=tokenizer, about=description)
    file = f"{job.out.name}.gguf"
    hashes = job.write({file: parts})
    if not job.shape.dense:  # Transformers' reader of GGUF does not take the experts' width from the file
        write_json(job.folder / "config.json", qwen2_moe_config(job.config, job.shape))
    if not verify:
        return {"sha256": hashes}
    verify_gguf(job.folder / file, tensors, progress=job.progress)
    return {"sha256": hashes, "verified": "tensors"}


def _check_choices(to: str, kind: str | None) -> None:
    if to not in LAYOUTS:
        raise ValueError(f"There is no layout {to!r}: expected one of {', '.join(LAYOUTS)}.")
    if kind is not None and kind not in TYPES:
        raise ValueError(f"There is no type {kind!r}: expected one of {', '.join(TYPES)}.")


def _check_type(to: str, kind: str) -> None:
    if kind == "q8_0" and to != "gguf":
        raise ValueError(f"{to!r} has no type 'q8_0', expected 'f32' or 'bf16': only a GGUF has it.")
    if kind == "f16" and to == "qwen2-moe":
        raise ValueError(
            "float16 cannot hold the gate of a shared expert in the layout 'qwen2-moe' (2^-100): give type "
            "'bf16' or 'f32'."
        )


def _kind_of(tensors: Mapping[str, LazyTensor]) -> str:
    """The type that most of the model's numbers have."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        bytes_of = sum(piece.end - piece.start for piece in tensor.pieces)
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + bytes_of
    most = max(sizes, key=lambda dtype: sizes[dtype])
    if most not in _BY_DTYPE:
        raise CheckpointError(f"The weights are of {most}, expected float32, bfloat16 or float16.")
    return _BY_DTYPE[most]


def _output_biases(tensors: Mapping[str, LazyTensor]) -> list[str]:
    """The biases behind attention's output that are not zeros."""
    names = (name for name in tensors if name.endswith("o_proj.bias"))
    return sorted(name for name in names if tensors[name][...].any())


def _subset_of(expert_subset: Any, source: ModelSource) -> ExpertSubset | None:
    return None if expert_subset is None else ExpertSubset.of(expert_subset, *source.library)


def _own_settings(config: EmoConfig) -> dict[str, Any]:
    content = config.to_dict()
    return {name: content[name] for name in OWN_SETTINGS if content.get(name) is not None}


def _about(model: str | os.PathLike, source: ModelSource, config: EmoConfig) -> dict[str, Any]:
    """What a model was exported from."""
    name = os.fspath(model) if source.commit else Path(model).resolve().name
    return {
        "model": name,
        "revision": source.commit,
        "license": licence_of(model, **source.hub_kwargs),
        "retained_experts": config.retained_experts,
        "root_experts_per_layer": config.root_experts_per_layer,
        "experts_per_layer": [layer.num_experts for layer in config.layer_experts],
    }
