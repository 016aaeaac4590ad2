"""The pools of the sequences in a cache, as the last layer of it.

Shape suffixes: B sequences, S tokens of each in this call, R routed experts, E experts.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .moving_pools import PoolMoves, followed_shares, moved


class FrozenPools:
    """The pools of the sequences in a cache. They are its last layer, one without keys and values.

    Args:
        sizes (`Sequence[int]`): routed experts in the pool, for each layer.
        experts (`list[list[int] | None]`, *optional*): the experts from which the pools were chosen, as in
            `config.retained_experts`.
        moves (`PoolMoves`, *optional*): when the pools are chosen again; by default never.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.pools.cache_layer import FrozenPools
    >>> pools = FrozenPools([1])
    >>> pools.outside[0] = torch.tensor([[False, True], [True, False]])
    >>> pools.reorder_cache(torch.tensor([1, 1]))
    >>> pools.outside[0].tolist()
    [[True, False], [True, False]]

    ```
    """

    supports_early_init = False
    is_compileable = True
    is_croppable = True
    is_initialized = True
    # A cache that offloads layers leaves sliding ones on the device, and no mask is made for them.
    is_sliding = True
    keys = values = None

    def __init__(
        self,
        sizes: Sequence[int],
        experts: list[list[int] | None] | None = None,
        moves: PoolMoves | None = None,
    ):
        self.sizes = tuple(sizes)
        self.experts = experts
        self.moves = moves
        # The masks of `use_experts` under which every pool is known to keep an expert.
        self.fitting_masks: list[torch.Tensor | None] | None = None
        # (B, R) for each layer, true outside the pool. `None` before it is chosen, and for dense layers.
        self.outside: list[torch.Tensor | None] = [None] * len(self.sizes)
        # For pools that move: what the router wanted of late (B, R), and the tokens since that was looked at.
        self.shares: list[torch.Tensor | None] = [None] * len(self.sizes)
        self.since = [0] * len(self.sizes)

    def follow(
        self,
        index: int,
        probs_BSR: torch.Tensor,
        mask_BS: torch.Tensor | None = None,
        memory: Any = None,
    ) -> torch.Tensor:
        """Count tokens in layer `index`, and choose its pools again if it is time.

        Args:
            index (`int`): the layer.
            probs_BSR (`torch.Tensor`): the router's probabilities of all its experts.
            mask_BS (`torch.Tensor`, *optional*): false for padding.
            memory (`ExpertSlots`, *optional*): is told which experts came into a pool.

        Returns:
            `torch.Tensor`: what is outside the pools now, (B, R).
        """
        outside_BR, shares_BR = self.outside[index], self.shares[index]
        assert self.moves is not None and outside_BR is not None  # it was chosen from the prompt
        if shares_BR is None:  # the pools of this cache have stayed so far
            shares_BR = torch.zeros_like(outside_BR, dtype=torch.float32)
        shares_BR = followed_shares(shares_BR, probs_BSR, self.moves.every, mask_BS)
        self.shares[index] = shares_BR
        self.since[index] += probs_BSR.shape[1]
        if self.since[index] < self.moves.every:
            return outside_BR
        self.since[index] = 0
        allowed_BR = probs_BSR[:, -1] > 0
        new_BR = moved(outside_BR, shares_BR, self.sizes[index], self.moves.above, allowed_BR)
        self.outside[index], self.fitting_masks = new_BR, None
        if memory is not None:
            came_R = (outside_BR & ~new_BR).any(0)
            memory.came_into_pool(index, came_R.nonzero().flatten().tolist())
        return new_BR

    @property
    def is_chosen(self) -> bool:
        """Whether pools have been chosen. (After a reset of the cache they have not.)"""
        return any(outside is not None for outside in self.outside)

    def check_masks(self, masks: list[torch.Tensor | None]) -> None:
        """Check that in every layer each sequence has an expert in its pool that the mask (E,) allows.

        Raises:
            ValueError: if a sequence has none in some layer.
        """
        if self.fitting_masks is masks:  # the check waits for the device, so it runs once for each mask
            return
        fits: dict[int, torch.Tensor] = {}
        for index, (outside_BR, mask_E) in enumerate(zip(self.outside, masks, strict=True)):
            if outside_BR is not None and mask_E is not None:
                inside_BR = mask_E[: outside_BR.shape[1]].to(outside_BR.device) & ~outside_BR
                fits[index] = inside_BR.any(-1).all()
        if fits:
            device = next(iter(fits.values())).device  # layers may lie on different ones
            fitting = torch.stack([fit.to(device) for fit in fits.values()]).tolist()
            for index, is_fitting in zip(fits, fitting, strict=True):
                if not is_fitting:
                    raise ValueError(
                        "No expert of the document pools in the cache may be used in layer "
                        f"{index}: use the subset with which the pools were chosen, switch pools off with "
                        "`document_pool=False`, or begin with a new cache."
                    )
        self.fitting_masks = masks

    def get_max_length(self) -> int:
        """No limit: -1."""
        return -1

    def offload(self) -> None:
        """Stay on the device."""

    def prefetch(self) -> None:
        """Stay on the device."""

    def crop(self, tokens_to_remove: int) -> None:
        """Keep the pools: the tokens that are removed did not choose them."""

    def reset(self) -> None:
        """Forget the pools: the cache is empty, and another prompt begins."""
        self.outside = [None] * len(self.sizes)
        self.shares = list(self.outside)
        self.since = [0] * len(self.sizes)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Take the sequences `beam_idx` (B,)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Take the sequences `indices`."""
        for each in (self.outside, self.shares):
            each[:] = [None if o is None else o[indices.to(o.device)] for o in each]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Take every sequence `repeats` times."""
        for each in (self.outside, self.shares):
            each[:] = [None if o is None else o.repeat_interleave(repeats, dim=0) for o in each]
