"""Document pools that follow the text: chosen again from what the router has wanted of late.

Every layer keeps, for each sequence, a mean of its router's probabilities in which the weight of a token is
halved every so many tokens. The experts outside the pool have their probabilities too: a router computes the
logits of all its experts, whatever the pool.

Shape suffixes: B sequences, S tokens of each in this call, R routed experts.
"""

from typing import Any, NamedTuple

import torch


class PoolMoves(NamedTuple):
    """When pools are chosen again.

    Args:
        every (`int`): after so many tokens. It is also the number of tokens after which one counts half.
        above (`float`, defaults to 0.0): only the pools of sequences whose router puts more than this share
            of its probability outside the pool, in the layer at hand.

    Example:

    ```python
    >>> from transformers_emo.modeling_emo.pools.moving_pools import PoolMoves
    >>> PoolMoves(64, above=0.4)
    PoolMoves(every=64, above=0.4)

    ```
    """

    every: int
    above: float = 0.0


def pool_moves(every: Any, above: Any) -> PoolMoves | None:
    """The arguments `move_pool_every` and `move_pool_above` of `generate`, checked.

    Args:
        every (`int`, *optional*): 0 or `None` for pools that stay.
        above (`float`, *optional*): a share of probability.

    Raises:
        ValueError: if one is not what it should be, or `above` is given alone.

    Example:

    ```python
    >>> from transformers_emo.modeling_emo.pools.moving_pools import pool_moves
    >>> pool_moves(64, None)
    PoolMoves(every=64, above=0.0)

    ```
    """
    if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 0):
        raise ValueError(
            f"`move_pool_every` is {every!r}, expected a number of tokens, such as 64, or 0 for pools that "
            "stay."
        )
    is_share = isinstance(above, int | float) and not isinstance(above, bool) and 0 <= above < 1
    if above is not None and not is_share:
        raise ValueError(
            f"`move_pool_above` is {above!r}, expected a share of the router's probability, from 0 to less "
            "than 1, such as 0.4."
        )
    if above is not None and not every:
        raise ValueError(
            "`move_pool_above` says which pools move, and `move_pool_every` after how many tokens that is "
            f"looked at, which is {every!r}: give both, such as `move_pool_every=64`."
        )
    return PoolMoves(every, float(above or 0.0)) if every else None


def followed_shares(
    shares_BR: torch.Tensor, probs_BSR: torch.Tensor, every: int, mask_BS: torch.Tensor | None = None
) -> torch.Tensor:
    """The mean (B, R) of router probabilities after further tokens. Each halves the weights of those before.

    Args:
        shares_BR (`torch.Tensor`): the mean before them, float32.
        probs_BSR (`torch.Tensor`): their probabilities, float32.
        every (`int`): after so many tokens a weight is half of what it was.
        mask_BS (`torch.Tensor`, *optional*): false for padding, which does not count.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.pools.moving_pools import followed_shares
    >>> followed_shares(torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.0, 1.0], [0.0, 1.0]]]), every=2)
    tensor([[0.5000, 0.5000]])

    ```
    """
    batch, length = probs_BSR.shape[:2]
    if mask_BS is None:
        mask_BS = torch.ones(batch, length, dtype=torch.bool, device=probs_BSR.device)
    keep = 0.5 ** (1 / every)
    # How many tokens of the text come after each one.
    later_BS = mask_BS.flip(1).cumsum(1).flip(1) - mask_BS.long()
    weights_BS = (1 - keep) * keep ** later_BS.float() * mask_BS
    new_BR = torch.einsum("bs,bsr->br", weights_BS, probs_BSR)
    return shares_BR * keep ** mask_BS.sum(1, keepdim=True).float() + new_BR


def moved(
    outside_BR: torch.Tensor,
    shares_BR: torch.Tensor,
    size: int,
    above: float,
    allowed_BR: torch.Tensor,
) -> torch.Tensor:
    """What is outside the pools (B, R) once those that have to move are chosen again.

    Args:
        outside_BR (`torch.Tensor`): what is outside them now.
        shares_BR (`torch.Tensor`): what the router wanted of late.
        size (`int`): experts in a pool.
        above (`float`): as in `PoolMoves`.
        allowed_BR (`torch.Tensor`): false for experts that must not be taken.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.pools.moving_pools import moved
    >>> outside, shares = torch.tensor([[False, True]]), torch.tensor([[0.3, 0.7]])
    >>> moved(outside, shares, 1, 0.5, torch.ones_like(outside)).tolist()
    [[True, False]]

    ```
    """
    shares_BR = shares_BR.masked_fill(~allowed_BR, 0)
    order_BR = shares_BR.masked_fill(~allowed_BR, -1).argsort(dim=-1, descending=True, stable=True)
    within_R = torch.arange(shares_BR.shape[1], device=shares_BR.device) < size
    chosen_BR = torch.zeros_like(outside_BR).scatter_(1, order_BR, within_R.expand_as(order_BR))
    is_outside_B = (shares_BR * outside_BR).sum(1) > above * shares_BR.sum(1)
    # A pool of which nothing is allowed any more has to move, however little the router puts outside.
    is_outside_B = is_outside_B | ~(allowed_BR & ~outside_BR).any(1)
    return torch.where(is_outside_B[:, None], ~chosen_BR, outside_BR)
