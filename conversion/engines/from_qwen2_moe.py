"""An export to Qwen2-MoE becomes an EMO again, after others have fine-tuned it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ...checkpoints import Checkpoint, CheckpointError
from ...checkpoints.side_files import GENERATION_CONFIG, TOKENIZER_FILES, copy_side_files, side_files
from ...checkpoints.source_files import SourceFiles
from ...checkpoints.writing.long_files import FilePart, remove_notes, write_parts
from ...checkpoints.writing.output_folder import check_new, check_space, new_folder
from ...checkpoints.writing.safetensors_writing import (
    divide,
    header_of,
    length_of,
    size_in_bytes,
    write_index,
    write_json,
)
from ...configuration import EmoConfig
from ..from_olmo_core import PROVENANCE
from ..model_config import emo_config, read_model_config
from ..released_shapes import check_released_shapes
from ..source_folder import name_and_commit, source_folder
from .backbone import OWN_SETTINGS, PARTS, SAME_KEYS, whole
from .export_tensor import DTYPES, ExportTensor, tensor_part

_OTHER_NAMES = {
    "input_layernorm": "pre_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
}
_LARGEST_LOGIT = 2.0**-24  # of a shared expert's gate: the sigmoid is then 0.5 to the last bit


def convert_qwen2_moe(
    model: str | os.PathLike,
    out: str | os.PathLike,
    *,
    type: str | None = None,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
    **hub_kwargs: Any,
) -> EmoConfig:
    """Make an EMO of a Qwen2-MoE that was exported from one, such as after fine-tuning by other tools.

    The reverse of `export_model`: the shared expert is the last one again, and `config.json` says again which
    experts of its root model a subset has, so `write_back` takes it. Without changes in between the tensors
    are bit for bit those of the model that was exported, but for the router's row of the shared expert,
    which nothing reads: it is zeros.

    Args:
        model (`str` or `os.PathLike`): folder or Hub repository of the Qwen2-MoE, in safetensors.
        out (`str` or `os.PathLike`): the folder to make. It must not exist.
        type (`str`, *optional*): convert the weights to `"f32"`, `"bf16"` or `"f16"`; by default every tensor
            keeps its own dtype.
        max_shard_size (`int` or `str`, defaults to `"5GB"`): bytes of one file at most, if tensors allow.
        progress (`bool`, defaults to `True`): show a progress bar.
        hub_kwargs: `revision`, `token`, `cache_dir` and so on for a repository, as for `from_pretrained`.

    Returns:
        `EmoConfig`: the config of the new folder.

    Raises:
        ValueError: if an EMO does not compute the same: the gate of a shared expert was trained, or the
            config is of another model. The message says why.
        CheckpointError: if the weights are quantised, incomplete or damaged.
        FileExistsError: if `out` exists, or another job left files for it.
        OSError: if there is no such folder or repository, or the disk has no room.
        SourceChangedError: if the folder of the model changed meanwhile.

    Example:

    ```python
    >>> from transformers_emo.conversion import convert_qwen2_moe, export_model
    >>> _ = export_model("model_cards/emo-tiny", tmp_path / "qwen", expert_subset="coq", progress=False)
    >>> config = convert_qwen2_moe(tmp_path / "qwen", tmp_path / "emo", progress=False)
    >>> config.num_experts, config.num_shared_experts, len(config.retained_experts)
    (16, 1, 4)

    ```
    """
    out = Path(out)
    check_new(out)
    shard_bytes = size_in_bytes(max_shard_size)
    cast_to = None if type is None else DTYPES.get(type)
    if type is not None and cast_to is None:
        raise ValueError(f"There is no type {type!r}: expected one of {', '.join(DTYPES)}.")
    before = SourceFiles.of(model, subfolder=hub_kwargs.get("subfolder"))
    folder = source_folder(model, without=(".bin", ".pt", ".pth", ".gguf"), **hub_kwargs)
    content = read_model_config(folder)
    if content.get("quantization_config"):
        raise CheckpointError(
            f"The weights of {folder} are quantised: save them in bfloat16 with the tool that quantised them "
            "first."
        )
    with ExitStack() as stack:
        weights = Checkpoint.from_folder(folder)
        stack.callback(weights.source.close)
        config = _config_of(content, weights)
        tensors = _tensors_of(config, weights)
        layouts = {name: (cast_to or tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        config.dtype = cast_to or next(iter(layouts.values()))[0]
        companions = side_files(folder, (GENERATION_CONFIG, *TOKENIZER_FILES, "LICENSE*"))
        check_space(out, sum(map(length_of, layouts.values())))
        with new_folder(out, sources=[before]) as work:
            shards = divide(((name, length_of(layout)) for name, layout in layouts.items()), shard_bytes)
            total = sum(map(length_of, layouts.values()))
            with tqdm(
                total=total, desc="Converting", unit="B", unit_scale=True, disable=not progress, delay=1
            ) as bar:
                hashes = {
                    file: write_parts(
                        work / file,
                        [
                            FilePart.of(header_of({name: layouts[name] for name in names})),
                            *(tensor_part(tensors[name], layouts[name][0]) for name in names),
                        ],
                        done=bar.update,
                    )
                    for file, names in shards.items()
                }
            remove_notes(work)
            write_index(work, shards, layouts)
            config.save_pretrained(work)
            copy_side_files(folder, companions, work)
            name, commit = name_and_commit(model, folder)
            notes = {"converted_from": "qwen2_moe", "model": name, "revision": commit, "sha256": hashes}
            write_json(work / PROVENANCE, notes)
    return config


def _config_of(content: Mapping[str, Any], weights: Checkpoint) -> EmoConfig:
    """The config of the EMO that a Qwen2-MoE computes; `ValueError` if there is none."""
    if content["model_type"] != "qwen2_moe":
        raise ValueError(
            f"The model is of type {content['model_type']!r}, expected 'qwen2_moe': give what `emo export` "
            "wrote, or what was made of it."
        )
    reasons = []
    if content.get("decoder_sparse_step", 1) != 1:
        reasons.append(f"`decoder_sparse_step` is {content['decoder_sparse_step']}, expected 1")
    if content.get("use_sliding_window"):
        reasons.append("its attention has a sliding window")
    width, shared = content.get("moe_intermediate_size"), content.get("shared_expert_intermediate_size")
    said = content.get("emo") or {}
    if not isinstance(said, Mapping) or said.keys() - set(OWN_SETTINGS):
        reasons.append("`emo` in its config.json is not what an export writes")
        said = {}
    dense = list(content.get("mlp_only_layers") or [])
    if shared != width:
        reasons.append(f"its shared expert is {shared} wide, and the others {width}")
    reasons += _reasons_of_gates(weights)
    if reasons:
        raise ValueError(f"An EMO does not compute what this Qwen2-MoE does: {'; '.join(reasons)}.")
    routed, layers = content.get("num_experts", 60), content.get("num_hidden_layers", 24)
    settings = {name: content[name] for name in (*SAME_KEYS, "rope_parameters") if name in content}
    for name in ("rope_scaling", "rope_parameters"):
        rope = settings.get(name)
        if isinstance(rope, Mapping) and "rope_type" in rope:
            settings[name] = {key: value for key, value in rope.items() if key != "type"}
    settings |= {
        "model_type": "emo",
        "intermediate_size": width,
        "num_experts": routed + 1,
        "num_experts_per_tok": content.get("num_experts_per_tok", 4) + 1,
        "num_shared_experts": 1,
        "num_experts_per_layer": [0 if i in dense else routed + 1 for i in range(layers)] if dense else None,
        "dense_intermediate_size": content.get("intermediate_size") if dense else None,
        **said,
        "attention_bias": bool(said.get("attention_bias")) or _has_biases(weights),
    }
    # Exports are untied. If only one of the two was trained, they have to stay so.
    was_tied = said.get("tie_word_embeddings", content.get("tie_word_embeddings"))
    settings["tie_word_embeddings"] = bool(was_tied) and _is_tied(weights)
    config = emo_config(settings, {})
    for index, layer in enumerate(config.layer_experts):
        if layer.is_dense == (index in dense) and (layer.is_dense or layer.num_routed == routed):
            continue
        raise ValueError(
            f"Layer {index} has {'no' if index in dense else routed} routed experts, and `emo` in "
            f"config.json says {layer.num_routed}: the experts were changed after the export. Remove `emo` "
            "from config.json to convert the model as one of its own."
        )
    return config


def _reasons_of_gates(weights: Checkpoint) -> list[str]:
    for name in weights.tensors:
        if not name.endswith("shared_expert_gate.weight"):
            continue
        gate = weights.lazy([name])[...].float()
        if not gate.abs().sum() <= _LARGEST_LOGIT:
            largest = gate.abs().max().item()
            return [
                f"the gate of its shared expert was trained ({name} holds {largest:.3g}, expected 2^-100): "
                "keep `shared_expert_gate` as it is while training"
            ]
    return []


def _has_biases(weights: Checkpoint) -> bool:
    names = [name for name in weights.tensors if re.search(r"\.[qkv]_proj\.bias$", name)]
    return any(bool(weights.lazy([name])[...].any()) for name in names)


def _is_tied(weights: Checkpoint) -> bool:
    if "lm_head.weight" not in weights.tensors:
        return True
    head, embeddings = (
        whole(name, weights.lazy([name])) for name in ("lm_head.weight", "model.embed_tokens.weight")
    )
    if head.shape != embeddings.shape or head.dtype != embeddings.dtype:
        return False
    pairs = zip(head.chunks(head.dtype), embeddings.chunks(head.dtype), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _tensors_of(config: EmoConfig, weights: Checkpoint) -> dict[str, ExportTensor]:
    """The EMO's tensors, in the order in which they are needed."""
    unused = set(weights.tensors)
    found: dict[str, ExportTensor] = {}

    def take(name: str, theirs: str | None = None, *, factor: float = 1.0, more_rows: int = 0) -> None:
        lazy = weights.lazy([theirs or name])
        unused.discard(theirs or name)
        rows, *shape = lazy.shape
        found[name] = ExportTensor(name, (rows + more_rows, *shape), (lazy,), factor=factor)

    take("model.embed_tokens.weight")
    for index, layer in enumerate(config.layer_experts):
        block = f"model.layers.{index}"
        for theirs, ours in _OTHER_NAMES.items():
            take(f"{block}.{ours}.weight", f"{block}.{theirs}.weight")
        for part in "qkvo":
            take(f"{block}.self_attn.{part}_proj.weight")
            bias = f"{block}.self_attn.{part}_proj.bias"
            if config.attention_bias and part != "o":
                take(bias)
            elif config.attention_bias:
                stored = found[f"{block}.self_attn.o_proj.weight"].dtype
                found[bias] = ExportTensor(bias, (config.hidden_size,), stored=stored)
            unused.discard(bias)
        if layer.is_dense:
            for part in PARTS:
                take(f"{block}.mlp.{part}_proj.weight")
            continue
        # A shared expert has a row in the router, which nothing reads. It was not exported.
        take(f"{block}.mlp.gate.weight", more_rows=layer.num_shared)
        for expert in range(layer.num_routed):
            for part in PARTS:
                take(f"{block}.mlp.experts.{expert}.{part}_proj.weight")
        unused.discard(f"{block}.mlp.shared_expert_gate.weight")
        for part in PARTS:
            theirs = f"{block}.mlp.shared_expert.{part}_proj.weight"
            if layer.num_shared:
                name = f"{block}.mlp.experts.{layer.num_routed}.{part}_proj.weight"
                take(name, theirs, factor=0.5 if part == "down" else 1.0)
            elif part == "down" and weights.lazy([theirs])[...].any():
                raise ValueError(
                    f"{theirs} was trained, and the EMO that was exported has no shared expert: keep it at "
                    "zero while training."
                )
            unused.discard(theirs)
    take("model.norm.weight")
    if not config.tie_word_embeddings:
        take("lm_head.weight")
    unused.discard("lm_head.weight")
    if unused:
        raise CheckpointError(
            f"The model has {len(unused)} tensors that no export has, such as {min(unused)}: they would be "
            "lost. Merge adapters first."
        )
    check_released_shapes({name: tensor.shape for name, tensor in found.items()}, config)
    return found
