"""One step of serving or training, as bytes of one rank."""

from __future__ import annotations

import math
import re
from functools import cached_property

import torch

from ..configuration import EmoConfig
from ..modeling_emo import EmoForCausalLM
from ..quantization.packed_config import PackedConfig
from .parallel_layout import ParallelLayout
from .work import Traffic, experts_touched, forward_traffic, head_size

_LAYER = re.compile(r".*layers\.(\d+)\.")
_EXPERTS = re.compile(r".*layers\.(?P<layer>\d+)\.mlp\.experts\.\w+")
# Of bytes held, in training: gradients are written and read, both moments read and written, weights written.
_UPDATE = 2 + 4 + 1


class Step:
    """What the first rank holds, reads and sends. The first has the most where a size does not divide.

    Args:
        config (`EmoConfig`): the model's config.
        layout (`ParallelLayout`): how ranks share it.
        dtype (`torch.dtype`): of weights, activations, gradients, keys and values.
        sequences (`int`): at a time, of each rank with texts of its own.
        context (`int`): tokens of each.
        packing (`PackedConfig`, *optional*): how weights are packed.

    Raises:
        ValueError: if the model cannot be shared so, or its widths do not go in groups.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.planning import ParallelLayout
    >>> from transformers_emo.planning.step import Step
    >>> step = Step(EmoConfig(), ParallelLayout(), torch.bfloat16, 1, 4096)
    >>> step.held_bytes / 1e9, step.cache_bytes / 1e9
    (27.13667584, 0.536870912)

    ```
    """

    def __init__(
        self,
        config: EmoConfig,
        layout: ParallelLayout,
        dtype: torch.dtype,
        sequences: int,
        context: int,
        packing: PackedConfig | None = None,
    ):
        self.config, self.layout, self.itemsize = config, layout, dtype.itemsize
        self.sequences, self.context, self.packing = sequences, context, packing
        with torch.device("meta"):
            model = EmoForCausalLM(config)
        self._inputs = {name: parameter.shape[-1] for name, parameter in model.named_parameters()}
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self._held = layout.held(config)
        # What it has of a weight while it uses it: FSDP has gathered the rest.
        self._used = {name: number * self._fsdp(name) for name, number in self._held.items()}

    def _fsdp(self, name: str) -> int:
        is_expert = _EXPERTS.fullmatch(name) is not None
        return self.layout.expert_fsdp_size if is_expert else self.layout.fsdp_size

    def _bytes(self, name: str, numbers: float) -> float:
        """The bytes of so many numbers of a parameter in memory."""
        if self.packing is None or not self.packing.converts(name):
            return numbers * self.itemsize
        packing = self.packing.of(name)
        groups = numbers / packing.group_of(self._inputs[name])
        return numbers * packing.bits / 8 + groups * (self.itemsize + (not packing.symmetric))

    @cached_property
    def held_bytes(self) -> int:
        """`int`: weights."""
        return round(sum(self._bytes(name, number) for name, number in self._held.items()))

    @cached_property
    def used_bytes(self) -> float:
        """`float`: weights, with those that FSDP gathers."""
        return sum(self._bytes(name, number) for name, number in self._used.items())

    def gathered_at_once(self, *, training: bool) -> int:
        """Weights that FSDP has gathered at one time, beside those held: of one group, and of the next.

        The head and the last norm stay gathered, as Transformers' plan says.

        Args:
            training (`bool`): then the gradients of a group too.
        """
        groups: dict[str, float] = {}
        kept = 0.0
        for name, number in self._used.items():
            if self._fsdp(name) == 1:
                continue
            match = _LAYER.match(name)
            if match is None and "embed_tokens" not in name:
                kept += self._bytes(name, number)
            else:
                group = match[1] if match else name
                groups[group] = groups.get(group, 0.0) + self._bytes(name, number)
        largest = sorted(groups.values(), reverse=True)[: 3 if training else 2]
        return round(sum(largest) + kept)

    @property
    def cache_bytes(self) -> int:
        """`int`: keys and values of all sequences."""
        config = self.config
        heads = config.num_key_value_heads or config.num_attention_heads
        token = 2 * config.num_hidden_layers * heads * head_size(config) * self.itemsize
        return self.sequences * self.context * token // self.layout.tp_size

    def activations(self, *, training: bool) -> int:
        """An estimate of what the activations take.

        Args:
            training (`bool`): kept inputs of all layers, and one layer with its gradients or the logits with
                theirs; otherwise one layer for the prompt of one sequence.
        """
        config, tensor = self.config, self.layout.tp_size
        tokens = self.sequences * self.context if training else self.context
        heads = config.num_attention_heads + 2 * (config.num_key_value_heads or config.num_attention_heads)
        widest = 0.0
        for layer in config.layer_experts:
            width = 4 * config.hidden_size + heads * head_size(config) / tensor
            if layer.is_dense:
                width += 3 * (config.dense_intermediate_size or 0) / tensor
            else:
                shared = tensor if self.layout.ep_size == 1 else 1
                width += layer.num_experts
                width += layer.top_k * (3 * config.intermediate_size / shared + config.hidden_size)
            widest = max(widest, width)
        layer_bytes = tokens * widest * self.itemsize
        if not training:
            return round(max(layer_bytes, 4 * self.sequences * config.vocab_size))
        kept = config.num_hidden_layers * tokens * config.hidden_size * self.itemsize
        logits = tokens * config.vocab_size * 2 * 4  # float32, and their gradients
        return round(kept + max(2 * layer_bytes, logits))

    def read_serving(self) -> float:
        """Bytes that a token of every sequence reads: weights, of experts those used, keys and values."""
        total: float = self.cache_bytes + self.sequences * self.config.hidden_size * self.itemsize
        group = self.layout.ep_size / self.layout.tp_size if self.layout.ep_size > 1 else 1
        for name, number in self._used.items():
            if match := _EXPERTS.fullmatch(name):
                layer = self.config.layer_experts[int(match["layer"])]
                share = experts_touched(layer, max(group, 1) * self.sequences) / layer.num_experts
                total += share * self._bytes(name, number)
            elif not name.endswith("embed_tokens.weight") or self.config.tie_word_embeddings:
                total += self._bytes(name, number)
        return total

    def read_training(self) -> float:
        """Bytes of weights, gradients and moments that an update reads and writes."""
        return 3 * self.used_bytes + _UPDATE * self.held_bytes

    def sent(self, *, training: bool) -> list[Traffic]:
        """What the rank sends to others.

        Args:
            training (`bool`): forward twice, for gradient checkpointing, and backward; gathering weights
                twice, scattering gradients once, and summing them over replicas.
        """
        layout, found = self.layout, []
        tokens = self.sequences * (self.context if training else 1)
        passes = 3 if training else 1
        for one in forward_traffic(self.config, layout, tokens, self.itemsize, training=training):
            found.append(Traffic(one.what, passes * one.size, one.group, one.span))
        by_group: dict[int, float] = {}
        for name, number in self._used.items():
            ranks = self._fsdp(name)
            if ranks > 1:
                by_group[ranks] = by_group.get(ranks, 0.0) + self._bytes(name, number)
        for ranks, size in by_group.items():
            sent = passes * (ranks - 1) / ranks * size
            what = "weights gathered, gradients scattered" if training else "weights gathered"
            found.append(Traffic(what, sent, ranks, layout.tp_size * layout.fsdp_size))
        if training and layout.replicas > 1:
            share = 2 * (layout.replicas - 1) / layout.replicas
            found.append(
                Traffic("gradients of replicas", share * self.held_bytes, layout.replicas, layout.ranks)
            )
        return [one for one in found if math.isfinite(one.size) and one.size > 0]
