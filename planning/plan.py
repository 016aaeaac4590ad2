"""What serving or training a model takes of each rank of a cluster, or of a laptop."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..checkpoints.writing.safetensors_writing import floating_dtype
from ..configuration import EmoConfig
from ..quantization.packed_config import PackedConfig, packing_of
from ..subsets.loading.model_source import check_hub_kwargs
from ..subsets.reduced_config import subset_config
from .hardware import HARDWARE, Hardware
from .model_sizes import subset_of
from .parallel_layout import ParallelLayout
from .step import Step
from .work import Traffic, rank_flops, token_parameters

TASKS = ("serve", "train")
_MOMENTS = 2  # of AdamW


@dataclass(frozen=True)
class Plan:
    """What one step takes of a rank: a token of each sequence when serving, one update when training.

    Args:
        task (`str`): `"serve"` or `"train"`.
        ranks (`int`): how many there are.
        layout (`ParallelLayout`): how they share the model.
        hardware (`Hardware`): what each of them is.
        parameters (`int`): weights of the model.
        token_parameters (`int`): weights that one token is multiplied by.
        token_flops (`float`): operations that a token takes; in training with the backward pass.
        step_tokens (`int`): tokens of all ranks in a step.
        weight_bytes (`int`): weights that the first rank holds.
        gradient_bytes (`int`): their gradients; 0 when serving.
        optimiser_bytes (`int`): the two moments of AdamW; 0 when serving.
        gathered_bytes (`int`): weights of the largest layer that FSDP gathers while it is used.
        cache_bytes (`int`): keys and values; 0 when training.
        activation_bytes (`int`): an estimate: kept inputs of all layers with gradient checkpointing, and the
            largest single layer or the logits.
        read_bytes (`float`): weights, keys and values that a step reads from memory.
        sent (`list[Traffic]`): what a step sends to other ranks.
        rank_flops (`float`): operations of the rank in a step.
        compute_seconds (`float`): at the hardware's peak.
        memory_seconds (`float`): at its bandwidth.
        link_seconds (`float`): at that of its links.

    Example: see `plan_run`.
    """

    task: str
    ranks: int
    layout: ParallelLayout
    hardware: Hardware
    parameters: int
    token_parameters: int
    token_flops: float
    step_tokens: int
    weight_bytes: int
    gradient_bytes: int
    optimiser_bytes: int
    gathered_bytes: int
    cache_bytes: int
    activation_bytes: int
    read_bytes: float
    sent: list[Traffic]
    rank_flops: float
    compute_seconds: float
    memory_seconds: float
    link_seconds: float

    @property
    def memory_bytes(self) -> int:
        """`int`: all memory of the rank, without PyTorch itself."""
        parts = (self.weight_bytes, self.gradient_bytes, self.optimiser_bytes)
        return sum(parts) + self.gathered_bytes + self.cache_bytes + self.activation_bytes

    @property
    def fits(self) -> bool:
        """`bool`: whether the rank has that memory."""
        return self.memory_bytes <= self.hardware.memory

    @property
    def sent_bytes(self) -> float:
        """`float`: bytes that a step sends to other ranks."""
        return sum(traffic.size for traffic in self.sent)

    @property
    def step_seconds(self) -> tuple[float, float]:
        """`tuple[float, float]`: least time of a step, if sending overlaps computing, and if not."""
        work = max(self.compute_seconds, self.memory_seconds)
        return max(work, self.link_seconds), work + self.link_seconds

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """`tuple[float, float]`: of all ranks: without overlap, and with."""
        with_overlap, without = self.step_seconds
        return self.step_tokens / without, self.step_tokens / with_overlap

    def to_dict(self) -> dict[str, Any]:
        """`dict[str, Any]`: all of it as JSON data."""
        return asdict(self) | {
            "memory_bytes": self.memory_bytes,
            "fits": self.fits,
            "sent_bytes": self.sent_bytes,
            "step_seconds": list(self.step_seconds),
            "tokens_per_second": list(self.tokens_per_second),
        }


def plan_run(
    model: str | os.PathLike | EmoConfig,
    *,
    task: str = "serve",
    layout: ParallelLayout | None = None,
    hardware: Hardware | None = None,
    experts: int | None = None,
    bits: int | None = None,
    dtype: str | torch.dtype | None = None,
    sequences: int = 1,
    context: int | None = None,
    **hub_kwargs: Any,
) -> Plan:
    """What a step of serving or training takes of each rank, by the model's sizes and the hardware's figures.

    Times are what the hardware cannot beat. Memory of weights is exact; that of activations is an estimate.

    Args:
        model (`str`, `os.PathLike` or `EmoConfig`): folder or Hub repository, of which `config.json` is read,
            or a config.
        task (`str`, defaults to `"serve"`): `"serve"`: every sequence gets one token a step. `"train"`:
            AdamW, all weights, gradient checkpointing.
        layout (`ParallelLayout`, *optional*): how ranks share the model; one rank by default.
        hardware (`Hardware`, *optional*): what a rank is; `HARDWARE["h200"]` by default.
        experts (`int`, *optional*): keep so many experts a layer; all by default.
        bits (`int`, *optional*): 8 or 4, for serving by whole models (no sharing among ranks).
        dtype (`str` or `torch.dtype`, *optional*): of weights, gradients and moments; the model's by default.
        sequences (`int`, defaults to 1): sequences at a time, of each rank with texts of its own.
        context (`int`, *optional*): tokens of a sequence; the model's context by default.
        hub_kwargs: `revision`, `token`, `cache_dir` and so on, as for `from_pretrained`.

    Raises:
        ValueError: if a number is out of range, the layout does not fit the model, or the task or the bits
            are unknown.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.planning import HARDWARE, ParallelLayout, plan_run
    >>> config = EmoConfig(dtype="bfloat16")
    >>> whole = plan_run(config, hardware=HARDWARE["h200"])
    >>> shared = plan_run(config, layout=ParallelLayout(fsdp_size=8, ep_size=8), task="train")
    >>> round(whole.weight_bytes / 1e9, 1), round(shared.weight_bytes / 1e9, 1), shared.fits
    (27.1, 3.4, True)

    ```
    """
    check_hub_kwargs("plan_run", hub_kwargs)
    if task not in TASKS:
        raise ValueError(f"Unknown task {task!r}, expected one of {', '.join(TASKS)}.")
    layout, hardware, training = layout or ParallelLayout(), hardware or HARDWARE["h200"], task == "train"
    config = model if isinstance(model, EmoConfig) else EmoConfig.from_pretrained(model, **hub_kwargs)
    label = "The model" if isinstance(model, EmoConfig) else os.fspath(model)
    if experts is not None:
        config = subset_config(config, subset_of(config, experts))
    context = config.max_position_embeddings if context is None else context
    for name, number in (("sequences", sequences), ("context", context)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"`{name}` is {number!r}, expected a whole number from 1.")
    packing = _packing(config, label, bits, training, layout)
    step = Step(config, layout, _dtype(config, dtype), sequences, context, packing)
    held = step.held_bytes
    tokens = sequences * (context if training else 1)
    attended = context / 2 if training else context
    flops = rank_flops(config, layout, tokens, attended, training=training)
    sent = step.sent(training=training)
    read = step.read_training() if training else step.read_serving()
    rates = {True: hardware.link, False: hardware.node_link}
    return Plan(
        task=task,
        ranks=layout.ranks,
        layout=layout,
        hardware=hardware,
        parameters=step.parameters,
        token_parameters=token_parameters(config),
        token_flops=rank_flops(config, ParallelLayout(), 1, attended, training=training),
        step_tokens=tokens * layout.ranks_with_texts,
        weight_bytes=held,
        gradient_bytes=held if training else 0,
        optimiser_bytes=_MOMENTS * held if training else 0,
        gathered_bytes=step.gathered_at_once(training=training),
        cache_bytes=0 if training else step.cache_bytes,
        activation_bytes=step.activations(training=training),
        read_bytes=read,
        sent=sent,
        rank_flops=flops,
        compute_seconds=flops / hardware.flops,
        memory_seconds=read / hardware.bandwidth,
        link_seconds=sum(each.size / rates[each.span <= hardware.per_node] for each in sent),
    )


def _dtype(config: EmoConfig, dtype: str | torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return floating_dtype(dtype)
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    raise ValueError("config.json names no dtype: give `dtype`, such as 'bfloat16'.")


def _packing(
    config: EmoConfig, label: str, bits: int | None, training: bool, layout: ParallelLayout
) -> PackedConfig | None:
    packing = packing_of(config, label)
    if packing is not None and bits not in (None, packing.bits):
        raise ValueError(
            f"{label} is in {packing.bits} bits: leave `bits` out, or give the unquantised model."
        )
    if packing is None and bits is None:
        return None
    packing = packing or PackedConfig(bits or 4).for_model(config)
    if training:
        raise ValueError(f"In {packing.bits} bits only adapters train: plan to train the unquantised model.")
    if layout.ranks != layout.replicas:
        raise ValueError(
            f"A model in {packing.bits} bits is whole in every rank: leave out `tp_size`, `fsdp_size` and "
            "`ep_size`, and give `replicas`."
        )
    return packing
