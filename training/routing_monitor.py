"""What the routers do in training, for the trainer's own reporters, and an early word about a collapse.

Shape suffixes: B batch, S sequence, T = B * S tokens, N documents, E experts, R routed experts, K experts
of a token.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from ..configuration import LayerExperts
from ..modeling_emo import EmoModel, flatten_segments
from ..modeling_emo.modeling_emo import EmoTopKRouter
from ..modeling_emo.pools.document_pool import DocumentPools, PoolRequest, find_segments
from ..modeling_emo.pools.segments import count_segments

_LOOKS = 3  # a layer that is collapsed so often in a row is named
_FEW = 0.1  # the share of the routed experts below which a layer counts as collapsed
_MIN_DOCUMENTS = 4  # fewer say little: each may use a small pool


class RoutingMonitor(TrainerCallback):
    """Reports what the routers do, through `Trainer.log`: TensorBoard, W&B and the log history get it.

    It looks at single steps of the optimiser, and costs nothing in the others. Of these steps it counts every
    micro-batch on every process, each token once, also where gradient checkpointing computes layers twice.

    - `routing_experts_used`: routed experts that any token took, mean over the layers.
    - `routing_effective_experts`: 2 to the entropy of the picks: so many experts, used alike, would be as
      uneven. Mean over the layers, and `routing_effective_experts_min` of the worst one.
    - `routing_balance`: that entropy divided by the largest possible: 1 is even use.
    - `routing_largest_share`: picks of the most used expert, as a multiple of its fair share, worst layer.
    - `routing_entropy`: bits of a token's router probabilities over all routed experts, mean over tokens and
      layers. 0 is a router that is sure.
    - `routing_pool_size`: routed experts in a document's pool, where there are pools.
    - `routing_document_coherence`: how much more often two tokens of one document take the same expert than
      two of different ones, mean over the layers. 1 is a router that does not know documents. It is left out
      where every micro-batch holds one document.

    A layer has collapsed if its effective experts are under a tenth of its routed ones, or under 1.25 times
    those that a token takes, three looks in a row. A warning names it, once.

    Args:
        trainer (`Trainer`): the trainer that the callback is added to; any that trains an EMO.
        every (`int`, *optional*): look at each so many-th step, and at the first; `logging_steps` by default.
        per_layer (`bool`, defaults to `False`): report the effective experts and the balance of every layer.

    Raises:
        ValueError: if `every` is below 1, the trainer's model is no EMO or has no experts, or it is compiled
            (compiled code calls no hooks).

    Example:

    ```python
    >>> from transformers import TrainingArguments
    >>> from transformers_emo import EmoForCausalLM
    >>> from transformers_emo.training import DocumentCollator, EmoTrainer, RoutingMonitor
    >>> model = EmoForCausalLM.from_pretrained(
    ...     "model_cards/toy-emo", document_pool_min=3, document_pool_max=31
    ... )
    >>> arguments = TrainingArguments(
    ...     str(tmp_path), max_steps=1, remove_unused_columns=False, report_to=[], disable_tqdm=True,
    ...     use_cpu=True,
    ... )
    >>> windows = [{"input_ids": [5, 6, 7, 0, 8, 9]}] * 8
    >>> trainer = EmoTrainer(model, arguments, DocumentCollator(model.config), windows)
    >>> trainer.add_callback(RoutingMonitor(trainer))
    >>> _ = trainer.train()  # doctest: +ELLIPSIS
    {'routing_experts_used': ...}
    >>> 3 <= trainer.state.log_history[0]["routing_experts_used"] <= 31
    True

    ```
    """

    def __init__(self, trainer: Trainer, *, every: int | None = None, per_layer: bool = False):
        if every is not None and every < 1:
            raise ValueError(f"`every` is {every}, expected at least 1 step, or none for `logging_steps`.")
        self.trainer = trainer
        self.every = every
        self.per_layer = per_layer
        self._network = _network(trainer.model)
        self._layers = [layer for layer in self._network.config.layer_experts if not layer.is_dense]
        if not self._layers:
            raise ValueError("The model has no experts: there is nothing to monitor. Leave the monitor out.")
        if trainer.args.torch_compile:
            raise ValueError(
                "`torch_compile` is set, and compiled code calls no hooks, which the monitor needs: train "
                "without one of them."
            )
        self._handles: list[Any] = []
        self._look: _Look | None = None
        self._collapsed_looks = [0] * len(self._layers)
        self._warned = False

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Begin to look, if this is a step to look at. `Trainer` calls this."""
        self._stop()
        every = self.every or max(1, round(state.logging_steps or args.logging_steps))
        if state.global_step and (state.global_step + 1) % every:
            return
        self._look = _Look(self._layers)
        network = self._network
        gates = [module for module in network.modules() if isinstance(module, EmoTopKRouter)]
        self._handles = [
            network.register_forward_pre_hook(self._look.begin_forward, with_kwargs=True),
            network.register_forward_hook(self._look.end_forward),
            *(
                gate.register_forward_hook(partial(self._look.see, number))
                for number, gate in enumerate(gates)
            ),
        ]

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Report what was seen in this step. `Trainer` calls this."""
        look = self._look
        self._stop()
        if look is None:
            return
        # One reduction over the processes, and one wait for the device, in a step that was looked at.
        sums = self.trainer.accelerator.reduce(look.sums(self._network.device), reduction="sum")
        seen = look.read(sums.tolist())
        wanted = control.should_log  # which `log` takes for answered
        self.trainer.log(self._report(seen))
        control.should_log = wanted
        self._watch(seen, state.global_step)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Take the hooks off. `Trainer` calls this."""
        self._stop()

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._look = [], None

    def _report(self, seen: _Seen) -> dict[str, float]:
        layers = seen.layers
        effective = [layer.effective for layer in layers]
        report = {
            "routing_experts_used": _mean([layer.used for layer in layers]),
            "routing_effective_experts": _mean(effective),
            "routing_effective_experts_min": min(effective),
            "routing_balance": _mean([layer.balance for layer in layers]),
            "routing_largest_share": max(layer.largest_share for layer in layers),
            "routing_entropy": _mean([layer.entropy for layer in layers]),
        }
        if seen.pool_size is not None:
            report["routing_pool_size"] = seen.pool_size
        coherence = [layer.coherence for layer in layers if layer.coherence is not None]
        if coherence:
            report["routing_document_coherence"] = _mean(coherence)
        if self.per_layer:
            for number, layer in enumerate(layers):
                report[f"routing_layer_{number}_effective_experts"] = layer.effective
                report[f"routing_layer_{number}_balance"] = layer.balance
        return report

    def _watch(self, seen: _Seen, step: int) -> None:
        if seen.documents < _MIN_DOCUMENTS:
            return
        for number, (layer, experts) in enumerate(zip(seen.layers, self._layers, strict=True)):
            picked = experts.top_k - len(experts.always_used)
            routed = experts.num_experts - len(experts.always_used)
            few = max(_FEW * routed, 1.25 * picked)
            collapsed = layer.effective < min(few, routed)
            self._collapsed_looks[number] = self._collapsed_looks[number] + 1 if collapsed else 0
            if self._collapsed_looks[number] == _LOOKS and not self._warned:
                self._warned = True
                name = "balance_loss_coef" if seen.pool_size is not None else "router_aux_loss_coef"
                value = getattr(self._network.config, name, None)
                warnings.warn(
                    f"Expert layer {number} has collapsed: at step {step} its tokens use only as much as "
                    f"{layer.effective:.1f} of {routed} routed experts evenly used (under {few:.1f} in "
                    f"{_LOOKS} looks). Raise `{name}` (now {value}) or lower the learning rate, and go back "
                    "to a checkpoint from before.",
                    stacklevel=2,
                )


class _Layer(NamedTuple):
    """What one layer did in a step."""

    used: float
    effective: float
    balance: float
    largest_share: float
    entropy: float
    coherence: float | None


class _Seen(NamedTuple):
    """What all layers did in a step."""

    layers: list[_Layer]
    documents: float
    pool_size: float | None


class _Look:
    """Sums over the tokens of one optimiser step, on the device. Nothing here waits for it."""

    def __init__(self, layers: list[LayerExperts]):
        self._experts = layers
        self._layers: list[Any] = [0] * len(layers)  # of each: counts of experts, entropy, equal pairs
        self._totals: Any = 0  # documents, tokens, pairs of tokens in one document, pairs of tokens
        self._pools: Any = 0
        self._forwards = 0
        self._keep: list[torch.Tensor | None] = [None] * len(layers)
        self._is_open = False

    def begin_forward(self, model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        # Layers that checkpointing computes again run in the backward, when no forward of the model is open.
        self._is_open = model.training and torch.is_grad_enabled()
        self._documents: Any = None
        self._inputs = {"config": model.config, **kwargs} | ({"input_ids": args[0]} if args else {})

    def end_forward(self, model: nn.Module, args: tuple, output: Any) -> None:
        if self._is_open and self._documents is not None:
            self._forwards += 1
            if (size := getattr(output, "document_pool_size", None)) is not None:
                self._pools = self._pools + size.detach().float()
        self._is_open = False

    @torch.no_grad()
    def see(self, number: int, gate: nn.Module, args: tuple, output: tuple) -> None:
        if not self._is_open:
            return
        logits_TE, _, index_TK = output[:3]
        experts = self._experts[number]
        if self._documents is None:
            pools = args[2] if len(args) > 2 and isinstance(args[2], DocumentPools) else None
            self._documents = _documents(self._inputs, pools, len(index_TK), index_TK.device)
            segment_T, mask_T, rows = self._documents
            tokens_N = mask_T.new_zeros(rows).index_add_(0, segment_T, mask_T)
            total = tokens_N.sum()
            pairs = (tokens_N * (tokens_N - 1)).sum()
            self._totals = self._totals + torch.stack(
                [(tokens_N > 0).sum(), total, pairs, total * (total - 1)]
            )
        segment_T, mask_T, rows = self._documents
        device, num_experts = logits_TE.device, experts.num_experts
        segment_T, mask_T = segment_T.to(device), mask_T.to(device)
        # Expert parallelism marks picks of others' experts by an id that is none: they are left out.
        is_ours_TK = index_TK < num_experts
        place_TK = segment_T[:, None] * num_experts + index_TK.clamp(max=num_experts - 1)
        weight_TK = mask_T[:, None] * is_ours_TK
        counts_NE = mask_T.new_zeros(rows * num_experts).index_add_(
            0, place_TK.flatten(), weight_TK.flatten()
        )
        keep_E = self._keep[number]
        if keep_E is None:
            keep_E = mask_T.new_ones(num_experts)
            for expert in experts.always_used:
                keep_E[expert].zero_()
            self._keep[number] = keep_E
        counts_NE = counts_NE.view(rows, num_experts) * keep_E
        count_E = counts_NE.sum(0)
        same = (counts_NE * (counts_NE - 1)).sum()
        equal = (count_E * (count_E - 1)).sum()
        probs_TR = logits_TE[:, : experts.num_routed].float().softmax(-1)
        entropy = (torch.special.entr(probs_TR).sum(-1) * mask_T).sum()
        floats = torch.double if device.type != "mps" else torch.float
        sums = torch.cat(
            [count_E.to(floats), torch.stack([entropy.to(floats), same.to(floats), equal.to(floats)])]
        )
        self._layers[number] = self._layers[number] + sums

    def sums(self, device: torch.device) -> torch.Tensor:
        """All sums as one vector, for one reduction over processes."""
        if self._documents is None or any(isinstance(layer, int) for layer in self._layers):
            raise RuntimeError(
                "The routing monitor saw no token go through the routers in a step of training: the model "
                "that trains is another than the trainer's, or it is compiled. Train without the monitor."
            )
        floats = self._layers[0].dtype
        rest = [self._totals.to(floats), torch.as_tensor(self._pools).to(floats).reshape(1)]
        forwards = torch.full((1,), float(self._forwards), dtype=floats)
        return torch.cat([part.to(device) for part in (*self._layers, *rest, forwards)])

    def read(self, sums: list[float]) -> _Seen:
        """What the sums over all processes say."""
        *layers, documents, tokens, in_one, pairs, pool_sizes, forwards = sums
        found, start = [], 0
        for experts in self._experts:
            end = start + experts.num_experts
            count_R = [layers[e] for e in range(start, end) if e - start not in set(experts.always_used)]
            entropy, same, equal = layers[end : end + 3]
            start = end + 3
            total = max(sum(count_R), 1.0)
            bits = -sum(count / total * math.log2(count / total) for count in count_R if count)
            coherence = None
            if in_one and pairs > in_one and equal > same:
                coherence = (same / in_one) / ((equal - same) / (pairs - in_one))
            found.append(
                _Layer(
                    used=float(sum(count > 0 for count in count_R)),
                    effective=2.0**bits,
                    balance=bits / math.log2(len(count_R)) if len(count_R) > 1 else 1.0,
                    largest_share=max(count_R) * len(count_R) / total,
                    entropy=entropy / math.log(2) / max(tokens, 1.0),
                    coherence=coherence,
                )
            )
        return _Seen(found, documents, pool_sizes / forwards if pool_sizes else None)


def _documents(
    inputs: Mapping[str, Any],
    pools: DocumentPools | None,
    num_tokens: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The document of each token (T,), 1 or 0 for padding (T,) int64, and how many documents to count."""
    if pools is not None:
        mask_T = pools.token_mask_T
        counted = torch.ones_like(pools.segment_T) if mask_T is None else mask_T.long()
        return pools.segment_T, counted, len(pools.size_N)
    request = PoolRequest(None, None, *(inputs.get(n) for n in ("document_ids", "seq_idx", "cu_seq_lens_q")))
    config, ids = inputs["config"], inputs.get("input_ids")
    try:
        segments_BS = find_segments(config, request, ids, inputs.get("position_ids"), eos_opens=True)
        segment_T = flatten_segments(segments_BS)
    except ValueError:  # nothing tells documents apart: a row is one
        rows = (ids if ids is not None else inputs["inputs_embeds"]).shape[0]
        segment_T = torch.arange(rows, device=device).repeat_interleave(num_tokens // rows)
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2 and mask.shape[0] * mask.shape[1] == num_tokens:
        return segment_T, mask.flatten().long(), count_segments(segment_T)
    return segment_T, torch.ones_like(segment_T), count_segments(segment_T)


def _network(model: Any) -> EmoModel:
    for module in model.modules():
        if isinstance(module, EmoModel):
            return module
    raise ValueError(
        f"The trainer's model is a {type(model).__name__}, expected an EMO: leave the monitor out."
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
