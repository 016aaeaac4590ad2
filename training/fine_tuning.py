"""Chooses what trains: the whole model, or its routed experts with or without the shared ones and the router.

Shape suffixes: E experts of the layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import TrainerCallback

from ..modeling_emo import EmoPreTrainedModel
from ..modeling_emo.kernels.private_torch import private_torch

_WeakTensorKeyDictionary = private_torch("torch.utils.weak.WeakTensorKeyDictionary")

What = Literal["all", "routed", "routed+shared", "routed+shared+router"]


def train_only(model: EmoPreTrainedModel, what: What) -> None:
    """Choose what trains; everything else is frozen.

    Routed and shared experts stand in the same stacked parameters, `gate_up_proj` (E, 2F, D) and `down_proj`
    (E, D, F). With `"routed"` both train, and a hook zeroes the gradient of the shared experts' rows before
    it is summed or reduced over ranks. Weight decay changes rows without a gradient, and so does momentum
    that an optimiser has gathered before: with either, use `KeepFrozenRows` too.

    The choice holds with `Trainer`, accelerate, DDP and FSDP2, and after `model.to(...)` and copying.

    Args:
        model (`EmoPreTrainedModel`): the model, full or a subset. Each call undoes the one before.
        what (`str`): `"all"`; `"routed"`, the routed experts; `"routed+shared"`, all experts;
            `"routed+shared+router"`, all experts and the router. Always-active experts count as shared. Dense
            layers train with `"all"` only.

    Raises:
        ValueError: if `what` is none of these.

    Example:

    ```python
    >>> from transformers_emo import EmoForCausalLM
    >>> from transformers_emo.training import train_only
    >>> model = EmoForCausalLM.from_pretrained("model_cards/toy-emo")
    >>> train_only(model, "routed+shared+router")
    >>> sorted({name.split("mlp.")[1] for name, p in model.named_parameters() if p.requires_grad})
    ['experts.down_proj', 'experts.gate_up_proj', 'gate.weight']

    ```
    """
    if what not in get_args(What):
        raise ValueError(f"`what` is {what!r}, expected one of {list(get_args(What))}: name one of them.")
    model.requires_grad_(what == "all")
    for block, layer in zip(_blocks(model), model.config.layer_experts, strict=True):
        if layer.is_dense:
            continue
        for handle in block.experts.__dict__.pop("_frozen_row_hooks", []):
            handle.remove()
        block.experts.__dict__.pop("_frozen_rows", None)
        if what == "all":
            continue
        block.experts.requires_grad_(True)
        block.gate.requires_grad_(what == "routed+shared+router")
        rows = list(layer.always_used)
        if what == "routed" and rows:
            block.experts._frozen_rows = rows
            hooks = _FrozenRowHooks(rows)
            hooks(block.experts)
            block.experts._frozen_row_hooks = [hooks, block.experts.register_forward_pre_hook(hooks)]


def keep_frozen_rows(model: EmoPreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Have an optimiser leave the rows that `train_only` froze exactly as they are.

    The rows are copied before each step of the optimiser and put back after it. With sharded parameters
    (FSDP2) each rank does so for the rows that it holds.

    Args:
        model (`EmoPreTrainedModel`): a model on which `train_only` was called.
        optimizer (`torch.optim.Optimizer`): the optimiser that trains it.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoForCausalLM
    >>> from transformers_emo.training import keep_frozen_rows, train_only
    >>> model = EmoForCausalLM.from_pretrained("model_cards/toy-emo")
    >>> train_only(model, "routed")
    >>> keep_frozen_rows(model, torch.optim.AdamW(model.parameters(), weight_decay=0.1))

    ```
    """
    aside: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def put_aside(*_) -> None:
        here = [_on_this_rank(parameter, rows) for parameter, rows in _frozen_rows(model)]
        aside[:] = [(parameter, rows, parameter[rows]) for parameter, rows in here]

    def put_back(*_) -> None:
        for parameter, rows, values in aside:
            parameter[rows] = values
        aside.clear()

    optimizer.register_step_pre_hook(put_aside)
    optimizer.register_step_post_hook(put_back)


class KeepFrozenRows(TrainerCallback):
    """`keep_frozen_rows` for `Trainer`, which makes its optimiser itself.

    Example:

    ```python
    >>> from transformers_emo.training import KeepFrozenRows
    >>> callbacks = [KeepFrozenRows()]  # Trainer(model, ..., callbacks=callbacks)

    ```
    """

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Hook `keep_frozen_rows` into the optimiser that `Trainer` has just made."""
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper takes no hooks
        keep_frozen_rows(model, optimizer)


class _FrozenRowHooks:
    """Forward pre-hook of a layer's experts that zeroes rows of the gradients of their parameters.

    FSDP2 and copying give the module other tensors, and hooks on the old ones are lost. So at each forward
    this hook sees to it that the tensors of the moment have theirs. It is a class and no closure, so that
    models can still be pickled.
    """

    def __init__(self, rows: list[int]):
        self.rows = rows
        self.handles = _WeakTensorKeyDictionary()

    def __call__(self, experts: nn.Module, *_) -> None:
        if torch.compiler.is_compiling():  # a compiled graph keeps the hooks that it was made with
            return
        for parameter in experts.parameters():
            if parameter.requires_grad and parameter not in self.handles:
                self.handles[parameter] = parameter.register_hook(self.zero_rows)

    def zero_rows(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.index_fill(0, torch.tensor(self.rows, device=gradient.device), 0)

    def remove(self) -> None:
        for handle in self.handles.values():
            handle.remove()

    def __reduce__(self):
        return type(self), (self.rows,)


def _on_this_rank(parameter: Any, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of a parameter that this rank holds, and which of its rows are the given ones, int64."""
    is_row_E = torch.zeros(len(parameter), dtype=torch.bool, device=parameter.device)
    is_row_E[rows] = True
    if hasattr(parameter, "placements"):  # a DTensor, which not every build of PyTorch has
        from torch.distributed.tensor import Replicate, distribute_tensor  # not in every build either

        placements = [p if p.is_shard(0) else Replicate() for p in parameter.placements]
        # Without a source rank each rank cuts its own part out, and nothing is sent.
        shards = distribute_tensor(is_row_E, parameter.device_mesh, placements, src_data_rank=None)
        parameter, is_row_E = parameter.to_local(), shards.to_local()
    return parameter.detach(), is_row_E.nonzero().squeeze(1)


def _blocks(model: EmoPreTrainedModel) -> list[Any]:
    """The feed-forward block of each layer: an `EmoMLP` or an `EmoSparseMoeBlock`."""
    return [layer.mlp for layer in model.base_model.layers]  # type: ignore[union-attr]


def _frozen_rows(model: EmoPreTrainedModel) -> Iterator[tuple[nn.Parameter, list[int]]]:
    for block in _blocks(model):
        experts = getattr(block, "experts", None)
        if experts is not None and "_frozen_rows" in experts.__dict__:
            for parameter in experts.parameters():
                yield parameter, experts._frozen_rows
