"""Experts that come into memory when a token takes them: what a layer has in place of `EmoExperts`.

The memory itself, which knows where experts are read from, is handed in (`ExpertSlots`): the network imports
nothing of the package that reads files.

Shape suffixes: T tokens, K experts taken per token, E experts of the layer, D hidden size.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

# What experts have in `EmoExperts`, and others look for.
_PARAMETERS = ("gate_up_proj", "down_proj")
HINT = "Load the model without `expert_memory` for that"


class ExpertSlots(Protocol):
    """A memory for experts of all layers, as `PagedExperts` uses it; `ExpertMemory` is one."""

    slots: Any  # `EmoExperts` with a row for each slot
    is_loaded: bool  # whether the rest of the model is there too

    def at_work(self) -> AbstractContextManager[Any]:
        """Keep other threads out while experts are brought in and used."""
        ...

    def groups(self, layer: int, experts: Iterable[int], tokens: int) -> Iterator[dict[int, int] | None]:
        """Bring experts into slots, as many at a time as there is room for."""
        ...

    def table(self, layer: int) -> torch.Tensor:
        """The slot (E,) of each expert of a layer."""
        ...

    def came_into_pool(self, layer: int, experts: Sequence[int]) -> None:
        """Hear of experts that came into a document pool which follows the text."""
        ...


class PagedExperts(nn.Module):
    """A layer's experts in a memory that they share with those of other layers.

    It has no parameters: the experts are in `memory`, as far as there is room.

    Args:
        memory (`ExpertSlots`): the memory.
        layer (`int`): the layer, as the memory counts them.
        num_experts (`int`): experts of the layer.

    Example:

    ```python
    >>> from transformers_emo import EmoForCausalLM
    >>> model = EmoForCausalLM.from_pretrained("model_cards/toy-emo", expert_memory="8MB")
    >>> type(model.model.layers[0].mlp.experts).__name__
    'PagedExperts'

    ```
    """

    def __init__(self, memory: ExpertSlots, layer: int, num_experts: int):
        super().__init__()
        self.memory = memory
        self.layer = layer
        self.num_experts = num_experts

    def __getattr__(self, name: str) -> Any:
        if name in _PARAMETERS:
            raise AttributeError(
                f"`{name}` is not there: with `expert_memory` a layer's experts come into memory when they "
                f"are taken. {HINT}."
            )
        return super().__getattr__(name)

    def _save_to_state_dict(self, *args, **kwargs) -> None:
        if self.memory.is_loaded:  # else Transformers asks, to know what to load
            raise ValueError(
                "A model loaded with `expert_memory` has no whole state dict: its experts are in the files "
                f"that it was loaded from. {HINT}."
            )
        super()._save_to_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """What is printed of it."""
        return f"num_experts={self.num_experts}, expert_memory"

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of each token's experts, which are read first where they are not in memory.

        The implementation that the model has for its experts computes it. If the memory has no room for all
        experts that the tokens take, they come in groups, and the groups' sums are added in float32.

        Args:
            hidden_states (`torch.Tensor`): (T, D).
            top_k_index (`torch.Tensor`): (T, K) expert ids.
            top_k_weights (`torch.Tensor`): (T, K).

        Returns:
            `torch.Tensor`: (T, D) in the dtype of `hidden_states`.

        Raises:
            CheckpointError: if an expert cannot be read, or its file has changed.
            RuntimeError: with a gradient, under autocast, or if it is exported or traced.
        """
        self._refuse(hidden_states, top_k_weights)
        slots, memory = self.memory.slots, self.memory
        few = top_k_index.numel() <= 256  # then a set is made faster than a tensor of unique ids
        flat = top_k_index.flatten() if few else top_k_index.unique()
        taken = set(flat.tolist())
        output_TD = None
        with memory.at_work():
            for group in memory.groups(self.layer, taken, len(hidden_states)):
                if group is None:  # all of them
                    slot_E = memory.table(self.layer)
                else:
                    slot_E = torch.full((self.num_experts,), slots.num_experts)
                    slot_E[list(group)] = torch.tensor(list(group.values()))
                slot_TK = slot_E.to(top_k_index.device)[top_k_index]
                if group is None:
                    return slots(hidden_states, slot_TK, top_k_weights)
                weights_TK = top_k_weights.masked_fill(slot_TK == slots.num_experts, 0)
                sum_TD = slots(hidden_states, slot_TK, weights_TK)
                output_TD = sum_TD.float() if output_TD is None else output_TD.add_(sum_TD)
        assert output_TD is not None  # a token takes at least one expert
        return output_TD.to(hidden_states.dtype)

    def _refuse(self, hidden: torch.Tensor, weights: torch.Tensor) -> None:
        what = None
        if torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad):
            what = (
                "computes no gradients: its experts may have left memory by then. Call it under "
                "`torch.no_grad()`, and train a model loaded without `expert_memory`"
            )
        elif torch.compiler.is_exporting() or torch.jit.is_tracing():
            what = f"cannot be exported or traced: which experts are read depends on the tokens. {HINT}"
        elif torch.is_autocast_enabled(hidden.device.type) and (
            torch.get_autocast_dtype(hidden.device.type) != self.memory.slots.down_proj.dtype
        ):
            dtype = str(torch.get_autocast_dtype(hidden.device.type)).removeprefix("torch.")
            what = (
                "does not run under autocast, which would convert the whole memory in every layer: load it "
                f"with `dtype={dtype!r}` instead"
            )
        if what is not None:
            raise RuntimeError(f"A model with `expert_memory` {what}.")
