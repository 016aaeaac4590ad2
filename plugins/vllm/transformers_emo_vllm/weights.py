"""Reading a model's weights: of a subset only the bytes of the experts that it keeps.

vLLM's own loader reads every tensor of a model. This one reads what the network needs, and checks that it is
all there: vLLM does not notice when an expert is missing, and computes with whatever lay in its memory.

Layouts: one matrix an expert and projection (as released), or the experts of a layer stacked; in one file, in
several, or cut by expert (`emo shard`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .architecture import layers_of
from .files import ModelFiles, TensorFile, WeightsError

LOAD_FORMAT = "emo"
"""The name of the loader, for `--load-format`. It is taken by itself where that says "auto"."""
_PARTS = ("gate", "up", "down")


@dataclass(frozen=True)
class Wanted:
    """A tensor of the network, and the rows of the tensor in the files that it is made of.

    Args:
        name (`str`): in the network, experts numbered as they are held there.
        shape (`tuple[int, ...]`): its shape.
        source (`str`): the name in the files.
        rows (`tuple[int, ...]`, *optional*): which rows of that, all by default.
        cut (`tuple[int, int]`, *optional*): for stacked experts: the part of the row that is wanted.

    Example: see `wanted_tensors`.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    rows: tuple[int, ...] | None = None
    cut: tuple[int, int] | None = None


def wanted_tensors(config: Any, names: set[str]) -> list[Wanted]:
    """The tensors of a network, and where they are in files.

    Args:
        config: the config, of the experts that are kept.
        names (`set[str]`): of the tensors in the files, to tell the layouts apart.

    Example:

    ```python
    >>> from transformers_emo_vllm.config import EmoConfig
    >>> from transformers_emo_vllm.weights import wanted_tensors
    >>> config = EmoConfig(num_hidden_layers=1, num_experts=2, num_experts_per_tok=1)
    >>> wanted_tensors(config, set())[-1].name
    'model.layers.0.mlp.experts.1.down_proj.weight'

    ```
    """
    hidden, width, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    kv_size = config.num_key_value_heads * (hidden // heads)
    wanted = []

    def add(name: str, *shape: int, **where: Any) -> None:
        wanted.append(Wanted(name, shape, where.pop("source", name), **where))

    add("model.embed_tokens.weight", config.vocab_size, hidden)
    add("model.norm.weight", hidden)
    if not config.tie_word_embeddings:
        add("lm_head.weight", config.vocab_size, hidden)
    kept = getattr(config, "emo_kept_experts", None)
    for index, layer in enumerate(layers_of(config)):
        block = f"model.layers.{index}"
        add(f"{block}.pre_attention_layernorm.weight", hidden)
        add(f"{block}.pre_feedforward_layernorm.weight", hidden)
        for part, size in (("q", hidden), ("k", kv_size), ("v", kv_size), ("o", hidden)):
            add(f"{block}.self_attn.{part}_proj.weight", size, hidden)
            if config.attention_bias:
                add(f"{block}.self_attn.{part}_proj.bias", size)
        if layer.is_dense:
            dense = config.dense_intermediate_size
            for part in _PARTS:
                shape = (hidden, dense) if part == "down" else (dense, hidden)
                add(f"{block}.mlp.{part}_proj.weight", *shape)
                if config.dense_mlp_bias:
                    add(f"{block}.mlp.{part}_proj.bias", shape[0])
            continue
        ids = tuple(range(layer.num_experts)) if kept is None else tuple(kept[index])
        add(f"{block}.mlp.gate.weight", layer.num_experts, hidden, rows=None if kept is None else ids)
        experts = f"{block}.mlp.experts"
        stacked = f"{experts}.gate_up_proj" in names
        for expert, id_ in enumerate(ids):
            for part in _PARTS:
                shape = (hidden, width) if part == "down" else (width, hidden)
                name = f"{experts}.{expert}.{part}_proj.weight"
                if not stacked:
                    add(name, *shape, source=f"{experts}.{id_}.{part}_proj.weight")
                elif part == "down":
                    add(name, *shape, source=f"{experts}.down_proj", rows=(id_,))
                else:
                    cut = (0, width) if part == "gate" else (width, 2 * width)
                    add(name, *shape, source=f"{experts}.gate_up_proj", rows=(id_,), cut=cut)
    return wanted


class WeightReader:
    """Gives the tensors of a network, one after the other.

    Args:
        config: the config, of the experts that are kept.
        files (`ModelFiles`): the model's files.

    Attributes:
        bytes_read (`int`): how many bytes of tensors and headers were read so far.
        bytes_total (`int`): how many bytes all tensors of the files that were opened have.

    Example:

    ```python
    >>> from transformers_emo_vllm.files import ModelFiles
    >>> from transformers_emo_vllm.weights import WeightReader
    >>> reader = WeightReader(emo_tiny_config, ModelFiles(emo_tiny))
    >>> len([name for name, tensor in reader])
    799

    ```
    """

    def __init__(self, config: Any, files: ModelFiles):
        self.config, self.files = config, files
        self.bytes_read = self.bytes_total = 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        places = self.files.tensor_files()
        wanted = wanted_tensors(self.config, set(places))
        self._check_names(wanted, places)
        # Grouped by file: each is open once, and all its rows are read one after the other.
        by_file: dict[str, list[Wanted]] = {}
        for tensor in wanted:
            by_file.setdefault(places[tensor.source], []).append(tensor)
        for file, tensors in by_file.items():
            path = self.files.find(file)
            if path is None:
                raise WeightsError(
                    f"{self.files.place} has no file {file}, which its index names: download it again."
                )
            opened = TensorFile(path)
            try:
                self.bytes_total += sum(end - start for _, _, start, end in opened.tensors.values())
                for tensor in tensors:
                    yield tensor.name, self._read(opened, tensor)
            finally:
                self.bytes_read += opened.bytes_read
                opened.close()

    def _check_names(self, wanted: list[Wanted], places: dict[str, str]) -> None:
        missing = [tensor.source for tensor in wanted if tensor.source not in places]
        if missing:
            raise WeightsError(
                f"{self.files.place} lacks {len(missing)} tensors that its config needs, the first is "
                f"{missing[0]}: the files are incomplete, or are not those of the config."
            )

        if getattr(self.config, "emo_kept_experts", None) is None:
            known = {tensor.source for tensor in wanted} | {"lm_head.weight"}
            unknown = sorted(name for name in set(places) - known if not name.endswith("rotary_emb.inv_freq"))
            if unknown:
                raise WeightsError(
                    f"{self.files.place} has {len(unknown)} tensors that its config does not explain, the "
                    f"first is {unknown[0]}: the files are not those of the config."
                )

    def _read(self, opened: TensorFile, tensor: Wanted) -> torch.Tensor:
        if tensor.source not in opened.tensors:
            raise WeightsError(f"{opened.path} has no tensor {tensor.source}, which the index says is there.")
        if tensor.rows is None:
            value = opened.read(tensor.source)
        elif tensor.cut is None:
            value = torch.cat([opened.read(tensor.source, *run) for run in _runs(tensor.rows)])
            if len(opened.tensors[tensor.source][1]) == 3:
                value = value.squeeze(0)
        else:
            value = self._read_cut(opened, tensor)
        if tuple(value.shape) != tensor.shape:
            raise WeightsError(
                f"{tensor.source} gives a tensor of shape {tuple(value.shape)}, the config wants "
                f"{tensor.shape}: the files are not those of the config."
            )
        return value

    def _read_cut(self, opened: TensorFile, tensor: Wanted) -> torch.Tensor:
        """Rows `cut` of one expert of a stack (E, rows, columns): read as rows of (E * rows, columns)."""
        assert tensor.rows is not None and tensor.cut is not None
        dtype, shape, start, end = opened.tensors[tensor.source]
        if len(shape) != 3:
            raise WeightsError(f"{tensor.source} has the shape {shape}, expected one matrix an expert.")
        flat = f"{tensor.source} as rows"
        opened.tensors[flat] = dtype, (shape[0] * shape[1], shape[2]), start, end
        try:
            first = tensor.rows[0] * shape[1]
            return opened.read(flat, first + tensor.cut[0], first + tensor.cut[1])
        finally:
            del opened.tensors[flat]


def _runs(rows: tuple[int, ...]) -> list[tuple[int, int]]:
    """Neighbouring rows as one range: (1, 2, 5) is (1, 3) and (5, 6)."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1] = runs[-1][0], row + 1
        else:
            runs.append((row, row + 1))
    return runs


def register_loader() -> None:
    """Make vLLM know the loader, as `--load-format emo`.

    Example:

    ```python
    >>> from transformers_emo_vllm.weights import register_loader
    >>> register_loader()

    ```
    """
    from vllm.config import ModelConfig
    from vllm.logger import init_logger
    from vllm.model_executor import model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    logger = init_logger("vllm.emo")
    if LOAD_FORMAT in getattr(model_loader, "_LOAD_FORMAT_TO_MODEL_LOADER", {}):
        return  # vLLM would warn of it

    class EmoLoader(BaseModelLoader):
        def _files(self, model_config: ModelConfig) -> ModelFiles:
            return ModelFiles(model_config.model, model_config.revision, self.load_config.download_dir)

        def download_model(self, model_config: ModelConfig) -> None:
            files = self._files(model_config)
            for file in set(files.tensor_files().values()):
                files.find(file)

        def load_weights(self, model: Any, model_config: ModelConfig) -> None:
            reader = WeightReader(model_config.hf_config, self._files(model_config))
            loaded = model.load_weights(iter(reader))
            left = {name for name, _ in model.named_parameters()} - loaded
            if left:
                raise WeightsError(f"{model_config.model}: no weights were found for {sorted(left)[:3]}.")
            logger.info("EMO: read %d of %d bytes of weights.", reader.bytes_read, reader.bytes_total)

    model_loader.register_model_loader(LOAD_FORMAT)(EmoLoader)
