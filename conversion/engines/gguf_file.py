"""An EMO as a GGUF, the file of llama.cpp and of what is built on it (Ollama, LM Studio).

It is written as a Qwen2-MoE (`qwen2moe`), or as a DeepSeek-MoE (`deepseek`) if the first layers are dense.
The `gguf` package writes the header; tensors follow one by one. Norms, biases and routers are in float32, as
llama.cpp wants them. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...checkpoints.lazy_tensor import LazyTensor
from ...checkpoints.writing.long_files import FilePart, Piece
from ...configuration import EmoConfig
from ...imports.optional_packages import require
from .backbone import (
    PARTS,
    attention_tensors,
    dense_tensors,
    embeddings,
    head_tensors,
    router,
    shared_expert,
)
from .export_tensor import DTYPES, ExportTensor, tensor_bytes, tensor_reads
from .gguf_blocks import BLOCK, BLOCK_BYTES, q8_0_blocks
from .gguf_tokenizer import add_tokenizer
from .qwen2_moe import GATE
from .routing_shape import RoutingShape

if TYPE_CHECKING:
    from gguf import GGUFWriter

TYPES = (*DTYPES, "q8_0")
"""The types of numbers that a GGUF is written with. Fewer bits are llama.cpp's own work."""
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ALIGNMENT = 32


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a GGUF.

    Args:
        tensor (`ExportTensor`): its numbers.
        type (`str`): one of `TYPES`.

    Example: see `gguf_tensors`.
    """

    tensor: ExportTensor
    type: str

    @property
    def length(self) -> int:
        """`int`: its bytes."""
        if self.type == "q8_0":
            return self.tensor.numel // BLOCK * BLOCK_BYTES
        return self.tensor.numel * DTYPES[self.type].itemsize

    def pieces(self) -> Iterator[Piece]:
        """Its bytes, piece by piece."""
        if self.type != "q8_0":
            return tensor_bytes(self.tensor, DTYPES[self.type])
        chunks = self.tensor.chunks(torch.float32)
        return (q8_0_blocks(chunk, self.tensor.name).numpy().data for chunk in chunks)


def architecture(shape: RoutingShape) -> str:
    """llama.cpp's name for the architecture that the model is written as.

    Args:
        shape (`RoutingShape`): the model's experts.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.conversion.engines.gguf_file import architecture
    >>> from transformers_emo.conversion.engines.routing_shape import routing_shape
    >>> architecture(routing_shape(EmoConfig(num_hidden_layers=2), "gguf", []))
    'qwen2moe'

    ```
    """
    return "deepseek" if shape.dense else "qwen2moe"


def gguf_tensors(
    config: EmoConfig, shape: RoutingShape, tensors: Mapping[str, LazyTensor], kind: str
) -> list[GGUFTensor]:
    """The tensors of an EMO as those of a GGUF.

    Args:
        config (`EmoConfig`): the config of the model.
        shape (`RoutingShape`): its experts.
        tensors (`Mapping[str, LazyTensor]`): the model's, from `released_tensors`.
        kind (`str`): one of `TYPES`. A tensor whose rows are no multiple of 32 cannot be `q8_0`, and becomes
            `f16`.

    Example:

    ```python
    >>> from transformers_emo.conversion.engines.gguf_file import gguf_tensors
    >>> from transformers_emo.conversion.engines.routing_shape import routing_shape
    >>> from transformers_emo.subsets.loading.model_source import ModelSource
    >>> from transformers_emo.subsets.rewriting.expert_tensors import released_tensors
    >>> with ModelSource.open("model_cards/toy-emo") as source:
    ...     tensors = released_tensors(source.parameters())
    ...     shape = routing_shape(source.config, "gguf", [])
    ...     written = gguf_tensors(source.config, shape, tensors, "q8_0")
    >>> [(part.tensor.name, part.type) for part in written if "blk.0.ffn_gate" in part.tensor.name]
    [('blk.0.ffn_gate_inp.weight', 'f32'), ('blk.0.ffn_gate_exps.weight', 'q8_0'),
     ('blk.0.ffn_gate_inp_shexp.weight', 'f32'), ('blk.0.ffn_gate_shexp.weight', 'q8_0')]

    ```
    """
    # The rows of queries and keys stand as the rotary embedding of each architecture pairs them.
    heads = {"q": config.num_attention_heads, "k": _kv_heads(config)} if shape.dense else {}
    found = []
    for tensor in _tensors(config, shape, tensors):
        match = re.fullmatch(r"(?:blk\.\d+\.)?attn_([qk])\.weight", tensor.name)
        if match and heads:
            tensor = replace(tensor, parts=(_interleaved(tensor.parts[0], heads[match[1]]),))
        is_small = tensor.role != "weight"
        fits = kind != "q8_0" or tensor.shape[-1] % BLOCK == 0
        found.append(GGUFTensor(tensor, "f32" if is_small else kind if fits else "f16"))
    return found


def gguf_parts(
    config: EmoConfig,
    shape: RoutingShape,
    tensors: Sequence[GGUFTensor],
    kind: str,
    *,
    tokenizer: Path | None,
    about: Mapping[str, Any],
) -> list[FilePart]:
    """A GGUF, part by part: its header, and its tensors.

    Args:
        config (`EmoConfig`): the config of the model.
        shape (`RoutingShape`): its experts.
        tensors (`Sequence[GGUFTensor]`): from `gguf_tensors`.
        kind (`str`): one of `TYPES`.
        tokenizer (`Path`, *optional*): the folder of the tokenizer; without it the file has none.
        about (`Mapping[str, Any]`): `name`, `license`, `base_model` and `experts`, each of them optional:
            what `general.name` and so on say. `experts` is JSON text.

    Raises:
        ImportError: if the `gguf` package is not installed.
        ValueError: if llama.cpp would not give the ids of the tokenizer.

    Example: see `export_model`.
    """
    require("GGUF files need", "gguf")
    header = _header(config, shape, tensors, kind, tokenizer, about)
    parts = [FilePart.of(header)]
    for tensor in tensors:
        padding = -tensor.length % _ALIGNMENT
        reads = partial(tensor_reads, tensor.tensor)
        parts.append(FilePart(tensor.length + padding, partial(_padded, tensor, padding), reads))
    return parts


def _padded(tensor: GGUFTensor, padding: int) -> Iterator[Piece]:
    yield from tensor.pieces()
    if padding:
        yield memoryview(bytes(padding))


def _tensors(
    config: EmoConfig, shape: RoutingShape, tensors: Mapping[str, LazyTensor]
) -> Iterator[ExportTensor]:
    yield _named(embeddings(tensors))
    for layer in range(shape.layers):
        is_gated = not shape.dense  # a Qwen2-MoE, which has a gate and biases
        yield from map(_named, attention_tensors(tensors, layer, biases=is_gated))
        if layer in shape.dense:
            yield from map(_named, dense_tensors(tensors, layer))
            continue
        yield _named(router(tensors, layer, shape.routed))
        mlp, block = f"model.layers.{layer}.mlp.experts", f"blk.{layer}"
        for part in PARTS:
            stacked = tuple(tensors[f"{mlp}.{e}.{part}_proj.weight"] for e in range(shape.routed))
            size = (shape.routed, *stacked[0].shape)
            yield ExportTensor(f"{block}.ffn_{part}_exps.weight", size, stacked)
        # llama.cpp computes a shared expert always: one of zeros where there is none.
        if is_gated:
            width = (config.hidden_size,)
            yield ExportTensor(f"{block}.ffn_gate_inp_shexp.weight", width, values=(GATE,), role="vector")
        doubled = 2.0 if is_gated else 1.0
        for part, tensor in shared_expert(tensors, layer, shape, down=doubled).items():
            yield tensor.renamed(f"{block}.ffn_{part}_shexp.weight")
    yield from map(_named, head_tensors(tensors))


def _named(tensor: ExportTensor) -> ExportTensor:
    """The tensor under llama.cpp's name."""
    name, ending = tensor.name.rsplit(".", 1)
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    theirs = _NAMES[name] if match is None else f"blk.{match[1]}.{_NAMES[match[2]]}"
    return tensor.renamed(f"{theirs}.{ending}")


def _kv_heads(config: EmoConfig) -> int:
    return config.num_key_value_heads or config.num_attention_heads


def _interleaved(matrix: LazyTensor, heads: int) -> LazyTensor:
    """The rows of queries or keys, with the two halves of each head taking turns."""
    rows = torch.arange(matrix.shape[0]).view(heads, 2, -1).transpose(1, 2).flatten()
    return matrix.take(rows.tolist())


def _header(
    config: EmoConfig,
    shape: RoutingShape,
    tensors: Sequence[GGUFTensor],
    kind: str,
    tokenizer: Path | None,
    about: Mapping[str, Any],
) -> bytes:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quants

    writer = GGUFWriter(None, architecture(shape))
    _add_settings(writer, config, shape)
    _add_description(writer, about)
    file_types = {
        "f32": LlamaFileType.ALL_F32,
        "f16": LlamaFileType.MOSTLY_F16,
        "bf16": LlamaFileType.MOSTLY_BF16,
        "q8_0": LlamaFileType.MOSTLY_Q8_0,
    }
    writer.add_file_type(file_types[kind])
    writer.add_quantization_version(2)  # of llama.cpp's quantised blocks, GGML_QNT_VERSION
    if tokenizer is not None:
        add_tokenizer(writer, tokenizer, config.vocab_size)
    _add_special_tokens(writer, config)
    for tensor in tensors:
        raw = GGMLQuantizationType[tensor.type.upper()]
        shape_written: Sequence[int] = tensor.tensor.shape
        numpy_type: Any = np.float32
        if tensor.type == "q8_0":
            numpy_type, shape_written = np.uint8, quants.quant_shape_to_byte_shape(shape_written, raw)
        writer.add_tensor_info(tensor.tensor.name, shape_written, np.dtype(numpy_type), tensor.length, raw)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "header")
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
    return header + bytes(-len(header) % _ALIGNMENT)


def _add_settings(writer: GGUFWriter, config: EmoConfig, shape: RoutingShape) -> None:
    from gguf import RopeScalingType

    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.dense_intermediate_size or config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(_kv_heads(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    content = config.to_dict()
    writer.add_rope_freq_base(content["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    scaling = content.get("rope_scaling") or {}
    if scaling.get("rope_type", "default") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    writer.add_expert_count(shape.routed)
    writer.add_expert_used_count(shape.picked)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    if shape.dense:
        writer.add_leading_dense_block_count(len(shape.dense))
        writer.add_expert_shared_count(1)
        writer.add_expert_weights_scale(1.0)
    else:
        writer.add_expert_shared_feed_forward_length(config.intermediate_size)


def _add_description(writer: GGUFWriter, about: Mapping[str, Any]) -> None:
    writer.add_type("model")
    if about.get("name"):
        writer.add_name(about["name"])
    if about.get("license"):
        writer.add_license(about["license"])
    if about.get("base_model"):
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, about["base_model"].rsplit("/", 1)[-1])
        if "/" in about["base_model"]:
            writer.add_base_model_organization(0, about["base_model"].split("/")[0])
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{about['base_model']}")
    if about.get("experts"):
        writer.add_string("emo.config", about["experts"])


def _add_special_tokens(writer: GGUFWriter, config: EmoConfig) -> None:
    eos = config.eos_token_id
    if isinstance(eos, list):
        eos = eos[0] if eos else None
    if eos is not None:
        writer.add_eos_token_id(eos)
    if config.pad_token_id is not None:
        writer.add_pad_token_id(config.pad_token_id)
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
