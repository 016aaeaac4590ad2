"""Whether an export is what it should be, from the files that were written.

Shape suffixes: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from ...checkpoints import Checkpoint
from ...checkpoints.lazy_tensor import LazyTensor
from ...configuration import EmoConfig
from ...modeling_emo.modeling_emo import EmoDecoderLayer, EmoRMSNorm, EmoRotaryEmbedding
from .export_tensor import DTYPES, ExportTensor
from .gguf_file import GGUFTensor

_TOKENS = 48
_TOLERANCE = 2e-5  # of the largest logit, or of 1
_HEAD_ROWS = 8192

Read = Callable[[str], torch.Tensor]


def verify_tensors(
    folder: Path, tensors: Mapping[str, ExportTensor], dtype: torch.dtype, *, progress: bool = False
) -> None:
    """Compare the safetensors files of an export with what they were made from, bit for bit.

    Args:
        folder (`Path`): the export.
        tensors (`Mapping[str, ExportTensor]`): all its tensors.
        dtype (`torch.dtype`): the dtype in which they were written.
        progress (`bool`, defaults to `False`): show a progress bar.

    Raises:
        ValueError: if a tensor differs, is missing or too many.

    Example: see `export_model`.
    """
    written = Checkpoint.from_folder(folder)
    try:
        if written.tensors.keys() != tensors.keys():
            differ = sorted(written.tensors.keys() ^ tensors.keys())
            raise ValueError(f"The export has other tensors than it should, such as {differ[0]}.")
        for name, tensor in tqdm(tensors.items(), "Verifying", unit="tensor", disable=not progress, delay=1):
            lazy = written.lazy([name])
            found = ExportTensor(name, tensor.shape, (lazy,))
            same = lazy.shape == tensor.shape and lazy.dtype == dtype
            if not same or not _equal(found, tensor, dtype):
                raise _changed(name)
    finally:
        written.source.close()


def verify_gguf(path: Path, tensors: Sequence[GGUFTensor], *, progress: bool = False) -> None:
    """Compare the tensors of a GGUF, read back by the `gguf` package, with what they were made from.

    Numbers in eight bits may differ by half a step of their block, and by the rounding of its scale.

    Args:
        path (`Path`): the file.
        tensors (`Sequence[GGUFTensor]`): all its tensors.
        progress (`bool`, defaults to `False`): show a progress bar.

    Raises:
        ValueError: if a tensor differs, is missing or too many.

    Example: see `export_model`.
    """
    from gguf import GGUFReader, quants

    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    if found.keys() != {tensor.tensor.name for tensor in tensors}:
        raise ValueError(f"{path} has other tensors than it should: this is a fault of the writer.")
    for tensor in tqdm(tensors, "Verifying", unit="tensor", disable=not progress, delay=1):
        name, wanted = tensor.tensor.name, tensor.tensor
        data, kind = found[name].data, found[name].tensor_type
        if tuple(int(size) for size in reversed(found[name].shape)) != wanted.shape:
            raise _changed(name)
        # A matrix at a time: all experts of a layer can be larger than memory.
        rows = data.reshape(-1, data.shape[-1])
        width, position = wanted.shape[-1], 0
        for numbers in wanted.chunks(torch.float32):
            first, last = position // width, -(-(position + len(numbers)) // width)
            read = torch.from_numpy(quants.dequantize(rows[first:last], kind).copy()).flatten()
            read = read[position - first * width :][: len(numbers)]
            position += len(numbers)
            if tensor.type == "q8_0":
                blocks = numbers.view(-1, 32)
                limit = blocks.abs().amax(-1, keepdim=True) * (0.5 / 127 + 2**-10)
                same = bool(((read.view(-1, 32) - blocks).abs() <= limit).all())
            else:
                same = torch.equal(read, numbers.to(DTYPES[tensor.type]).float())
            if not same:
                raise _changed(name)


@torch.no_grad()
def verify_logits(
    folder: Path,
    config: EmoConfig,
    parameters: Mapping[str, LazyTensor],
    dtype: torch.dtype,
    *,
    progress: bool = False,
) -> float:
    """Compare the logits of an export to Qwen2-MoE with those of the model, both in float32.

    The export is run by Transformers' own layers. One layer at a time is in memory.

    Args:
        folder (`Path`): the export.
        config (`EmoConfig`): the config of the model.
        parameters (`Mapping[str, LazyTensor]`): the model's, from `ModelSource.parameters`.
        dtype (`torch.dtype`): the dtype of the export. The model's weights are rounded to it.
        progress (`bool`, defaults to `False`): show a progress bar.

    Returns:
        `float`: the largest difference of a token's logits, as the median over tokens. The median is taken
            because rounding alone can make a token pick another expert.

    Raises:
        ValueError: if they differ by more than 2e-5 of the largest logit.

    Example: see `export_model`.
    """
    from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2_moe

    generator = torch.Generator().manual_seed(0)
    count = min(_TOKENS, config.max_position_embeddings)
    ids_T = torch.randint(config.vocab_size, (count,), generator=generator)
    theirs = qwen2_moe.Qwen2MoeConfig.from_pretrained(folder)
    theirs._attn_implementation, theirs._experts_implementation = "sdpa", "eager"
    ours = config.__class__.from_dict(config.to_dict())
    ours._attn_implementation, ours._experts_implementation = "sdpa", "eager"
    written = Checkpoint.from_folder(folder)

    def of_model(name: str) -> torch.Tensor:
        return parameters[name][...].to(dtype).float()

    def of_export(name: str) -> torch.Tensor:
        return _stacked(written, name)

    tied = "lm_head.weight" not in parameters
    with tqdm(
        total=2 * config.num_hidden_layers, desc="Verifying", unit="layer", disable=not progress
    ) as bar:
        try:
            found_TV = _logits(
                theirs, qwen2_moe.Qwen2MoeDecoderLayer, qwen2_moe.Qwen2MoeRMSNorm,
                qwen2_moe.Qwen2MoeRotaryEmbedding, ids_T, of_export, "lm_head.weight", bar,
            )  # fmt: skip
        finally:
            written.source.close()
        head = "model.embed_tokens.weight" if tied else "lm_head.weight"
        expected_TV = _logits(
            ours, EmoDecoderLayer, EmoRMSNorm, EmoRotaryEmbedding, ids_T, of_model, head, bar
        )
    difference = (found_TV - expected_TV).abs().amax(-1).median().item()
    limit = _TOLERANCE * max(1.0, expected_TV.abs().max().item())
    if not difference <= limit:
        raise ValueError(
            f"The export's logits differ from the model's by {difference:.3g}, expected at most {limit:.3g}: "
            "nothing was kept. Please report this with the model's config."
        )
    return difference


def _logits(
    config: Any,
    layer_class: Any,
    norm_class: Any,
    rotary_class: Any,
    ids_T: torch.Tensor,
    read: Read,
    head: str,
    bar: tqdm,
) -> torch.Tensor:
    """(T, V), the logits of a model whose parameters are read when they are needed."""
    hidden_TD = read("model.embed_tokens.weight")[ids_T]
    hidden = hidden_TD[None]
    positions = torch.arange(len(ids_T))[None]
    rotary = rotary_class(config)(hidden, positions)
    for index in range(config.num_hidden_layers):
        with torch.device("meta"):
            layer = layer_class(config, index).eval()
        _fill(layer, f"model.layers.{index}.", read)
        output = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        hidden = output[0] if isinstance(output, tuple) else output
        bar.update()
    norm = norm_class(config.hidden_size, eps=config.rms_norm_eps)
    _fill(norm, "model.norm.", read)
    head_VD = read(head)
    return torch.cat([F.linear(norm(hidden)[0], rows) for rows in head_VD.split(_HEAD_ROWS)], dim=-1)


def _fill(module: nn.Module, prefix: str, read: Read) -> None:
    state = {name: read(prefix + name) for name in module.state_dict()}
    module.load_state_dict(state, assign=True)


def _stacked(written: Checkpoint, name: str) -> torch.Tensor:
    """A parameter of Transformers' Qwen2-MoE: its experts are stacked, and in files they are not."""
    if name in written.tensors:
        return written.lazy([name])[...].float()
    experts = name.removesuffix(".gate_up_proj").removesuffix(".down_proj")
    count = sum(other.startswith(f"{experts}.") for other in written.tensors) // 3

    def matrices(part: str) -> torch.Tensor:
        names = [f"{experts}.{expert}.{part}_proj.weight" for expert in range(count)]
        shape = written.tensors[names[0]].shape
        return written.lazy(names, shape=(count, *shape))[...].float()

    if name.endswith(".down_proj"):
        return matrices("down")
    return torch.cat([matrices("gate"), matrices("up")], dim=1)


def _equal(found: ExportTensor, expected: ExportTensor, dtype: torch.dtype) -> bool:
    pairs = zip(found.chunks(dtype), expected.chunks(dtype), strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def _changed(name: str) -> ValueError:
    return ValueError(f"{name} is another tensor when it is read back: nothing was kept. Check the disk.")
