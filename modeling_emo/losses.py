"""The losses that EMO adds to the cross entropy.

Shape suffixes: T tokens (batch x sequence), E experts, R routed experts, L layers.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..configuration.configuration_emo import EmoConfig
from ..configuration.layer_experts import LayerExperts
from .pools.segments import ids_on


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """Without this, autocast would compute sums over tokens, as matrix products, in half precision."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):  # meta has no autocast
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def load_balancing_loss(
    router_logits: Sequence[torch.Tensor],
    layer_experts: Sequence[LayerExperts],
    *,
    token_mask: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    r"""Load-balancing loss of the released EMO code, averaged over the expert layers.

    For one layer it is `(R / r) * sum_e C_e * P_e / N`, with `C_e` the number of counted tokens that pick
    expert e, `P_e` the mean softmax probability of e over the counted tokens, r the routed picks per token
    and N the number of counted tokens in the whole batch: 1.0 at perfect balance. Shared and always-active
    experts are left out. Source: `load_balancing_loss_func_olmoe` in https://github.com/allenai/EMO.

    Args:
        router_logits (`Sequence[torch.Tensor]`): raw router logits (not probabilities) of the expert layers,
            (T, E).
        layer_experts (`Sequence[LayerExperts]`): the experts of those layers, dense layers left out.
        token_mask (`torch.Tensor`, *optional*): (batch, sequence) or (T,), true or 1 for the tokens that
            count; all of them by default.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): N, if the batch is spread over several
            forwards. By default the number of counted tokens.

    Returns:
        `torch.Tensor`: the loss, a float32 scalar with gradient to the logits; 0 if no token counts.

    Raises:
        ValueError: if there are no logits, or their number is not that of the layers.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.configuration import EmoConfig, LayerExperts
    >>> from transformers_emo.modeling_emo import load_balancing_loss
    >>> layer = LayerExperts(num_experts=4, num_shared=0, always_active=(), top_k=1)
    >>> round(load_balancing_loss([torch.eye(4) * 20], [layer]).item(), 3)
    1.0

    ```
    """
    if len(router_logits) == 0 or len(router_logits) != len(layer_experts):
        raise ValueError(
            f"Got router logits of {len(router_logits)} layers and the experts of {len(layer_experts)}, "
            "expected the same number of each and at least one: give both for every layer that has experts."
        )
    device = router_logits[0].device
    num_tokens = router_logits[0].shape[0]
    if token_mask is None:
        mask_T = torch.ones(num_tokens, device=device)
    else:
        mask_T = token_mask.reshape(-1).to(device=device, dtype=torch.float32)
    num_counted = mask_T.sum().clamp(min=1)  # without a counted token the loss is 0, not NaN
    if num_items_in_batch is None:
        num_items_in_batch = num_counted
    elif isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(device)
    # If all layers have the same size, the released code leaves out the first layer's always-active experts
    # in every layer. This does the same, so that losses agree. In no released model do layers differ in them.
    same_size = len({layer.num_experts for layer in layer_experts}) == 1

    losses = []
    for logits_TE, layer in zip(router_logits, layer_experts, strict=True):
        always = (layer_experts[0] if same_size else layer).always_active
        always = tuple(e for e in always if e < layer.num_routed)
        num_routed = layer.num_routed - len(always)
        top_k = min(layer.top_k - layer.num_shared - len(always), num_routed)
        if top_k <= 0:  # every token takes the same experts: nothing to balance
            losses.append(torch.zeros((), device=device))
            continue
        probs_TR = F.softmax(logits_TE[:, : layer.num_routed].to(device).float(), dim=-1)
        # -1 is below every probability, so that always-active experts are never picked and add nothing.
        others_TR = probs_TR.index_fill(-1, ids_on(always, device), -1.0) if always else probs_TR
        picks_Tr = others_TR.topk(top_k, dim=-1).indices
        count_R = torch.zeros(layer.num_routed, device=device)
        count_R = count_R.scatter_add(0, picks_Tr.flatten(), mask_T.repeat_interleave(top_k))
        with _without_autocast(device):
            mean_prob_R = (mask_T @ probs_TR) / num_counted
        losses.append(num_routed / top_k * (count_R * mean_prob_R).sum() / num_items_in_batch)
    return torch.stack(losses).mean()


class RouterStatistics(NamedTuple):
    """Sums over the tokens of one layer's router, for the losses of training with document pools.

    Args:
        count_R (`torch.Tensor`): picks of each routed expert, int64. A float32 cannot count the tens of
            millions of picks of a large batch, and code that shards a model may cast floats to fewer bits.
        prob_sum_R (`torch.Tensor`): summed probabilities within the pools, float32, with gradient.
        z_sum (`torch.Tensor`): summed squares of the logsumexp over the pool's logits, with gradient.
        num_tokens (`torch.Tensor`): tokens summed over, int64.

    Example: see `document_pool_losses`.
    """

    count_R: torch.Tensor
    prob_sum_R: torch.Tensor
    z_sum: torch.Tensor
    num_tokens: torch.Tensor

    @classmethod
    def of(
        cls,
        logits_TR: torch.Tensor,
        probs_TR: torch.Tensor,
        picks_Tr: torch.Tensor,
        token_mask_T: torch.Tensor | None,
    ) -> "RouterStatistics":
        """Sum up.

        Args:
            logits_TR (`torch.Tensor`): logits, -inf outside the pool.
            probs_TR (`torch.Tensor`): their softmax.
            picks_Tr (`torch.Tensor`): picked ids, r a token.
            token_mask_T (`torch.Tensor`, *optional*): false for padding.
        """
        counts_T = picks_Tr.new_ones(len(picks_Tr)) if token_mask_T is None else token_mask_T.long()
        count_R = picks_Tr.new_zeros(probs_TR.shape[-1])
        count_R = count_R.scatter_add(0, picks_Tr.flatten(), counts_T.repeat_interleave(picks_Tr.shape[-1]))
        z_T = logits_TR.logsumexp(dim=-1).square()
        weight_T = counts_T.to(logits_TR.dtype)
        with _without_autocast(logits_TR.device):
            return cls(count_R, weight_T @ probs_TR, weight_T @ z_T, counts_T.sum())


def sum_counts(statistics: Sequence[RouterStatistics]) -> torch.Tensor:
    """Sum the picks of every routed expert over all data-parallel ranks: one all-reduce for all layers.

    Args:
        statistics (`Sequence[RouterStatistics]`): of the expert layers.

    Returns:
        `torch.Tensor`: int64, the counts of all layers in their order, then the number of tokens.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.losses import RouterStatistics, sum_counts
    >>> logits = torch.eye(2)
    >>> sum_counts([RouterStatistics.of(logits, logits.softmax(-1), logits.topk(1).indices, None)])
    tensor([1, 1, 2])

    ```
    """
    num_tokens = statistics[0].num_tokens[None]
    # Layers may lie on different devices.
    summed = torch.cat([*(layer.count_R.to(num_tokens.device) for layer in statistics), num_tokens])
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(summed)
    return summed


class BalanceCounts:
    """Picks of the routed experts over the micro-batches of one optimiser step, for the balance loss.

    Gradients are computed after every micro-batch, before the picks of later ones are known. So each
    micro-batch is balanced against its own picks and those of the micro-batches before it, as in
    https://arxiv.org/abs/2501.11873 (section 3). If the picks of the whole step were counted before, all
    micro-batches are balanced against those. `transformers_emo.training.accumulate_balance` can do both.

    Args:
        of_step (`torch.Tensor`, *optional*): from `sum_counts`, over the whole step.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.losses import BalanceCounts, RouterStatistics
    >>> counts = BalanceCounts()
    >>> for pick in (0, 1):
    ...     logits = torch.zeros(1, 2)
    ...     micro_batch = RouterStatistics.of(logits, logits.softmax(-1), torch.tensor([[pick]]), None)
    ...     print(counts.join([micro_batch]))
    tensor([1, 0, 1])
    tensor([1, 1, 2])

    ```
    """

    def __init__(self, of_step: torch.Tensor | None = None):
        self.of_step = of_step
        self.so_far: torch.Tensor | None = None

    def join(self, statistics: Sequence[RouterStatistics]) -> torch.Tensor:
        """Add the picks of a micro-batch, and return those to balance it against, in `sum_counts`' form."""
        if self.of_step is not None:
            return self.of_step
        summed = sum_counts(statistics)
        self.so_far = summed if self.so_far is None else self.so_far + summed
        return self.so_far


def document_pool_losses(
    statistics: Sequence[RouterStatistics],
    layer_experts: Sequence[LayerExperts],
    *,
    num_items_in_batch: torch.Tensor | int | None = None,
    balance_counts: BalanceCounts | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Balance loss and router z-loss of training with document pools, averaged over the expert layers.

    For one layer the balance loss is `(R / r) * sum_e C_e * P_e / N`: `C_e` the picks of e summed over all
    data-parallel ranks, `P_e` the mean of the probability within the pools, N the number of tokens. The
    z-loss is the mean square of the logsumexp over the pool's logits. Paper section 3,
    https://arxiv.org/abs/2605.06663.

    One all-reduce sums the counts of all layers over the ranks. Without `num_items_in_batch`, `P_e` and the
    z-loss are means over this rank's tokens. Averaged over ranks, as DistributedDataParallel does, gradients
    are then those of the joined batch. With `num_items_in_batch` they are this rank's share of the sum over
    ranks, like the cross entropy.

    Args:
        statistics (`Sequence[RouterStatistics]`): of the expert layers.
        layer_experts (`Sequence[LayerExperts]`): the experts of those layers, dense layers left out.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): N, over ranks and accumulation steps.
        balance_counts (`BalanceCounts`, *optional*): holds the counts of the other micro-batches of an
            optimiser step. Without it a forward is balanced by itself.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: balance loss and z-loss, float32 scalars with gradient, without
        coefficients.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.configuration import EmoConfig, LayerExperts
    >>> from transformers_emo.modeling_emo.losses import RouterStatistics, document_pool_losses
    >>> logits = torch.eye(4) * 20
    >>> statistics = RouterStatistics.of(logits, logits.softmax(-1), logits.topk(1).indices, None)
    >>> balance, z = document_pool_losses([statistics], [LayerExperts(4, 0, (), 1)])
    >>> round(balance.item(), 3), round(z.item())
    (1.0, 400)

    ```
    """
    summed = sum_counts(statistics) if balance_counts is None else balance_counts.join(statistics)
    *counts, counted_tokens = summed.split([*(len(layer.count_R) for layer in statistics), 1])
    counted_tokens = counted_tokens.squeeze(0).clamp(min=1)
    num_items: torch.Tensor | int
    if num_items_in_batch is None:
        num_items = statistics[0].num_tokens.clamp(min=1)
    elif isinstance(num_items_in_batch, torch.Tensor):
        num_items = num_items_in_batch.to(summed.device)
    else:
        num_items = num_items_in_batch
    balance, z = [], []
    for layer, count_R, experts in zip(statistics, counts, layer_experts, strict=True):
        scale = experts.num_routed / (experts.top_k - experts.num_shared)
        prob_sum_R = layer.prob_sum_R.to(summed.device)
        balance.append(scale * (count_R * prob_sum_R).sum() / counted_tokens / num_items)
        z.append(layer.z_sum.to(summed.device) / num_items)
    return torch.stack(balance).mean(), torch.stack(z).mean()


def lm_z_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Mean square of the logsumexp of the next-token logits, over the positions that have a label.

    Args:
        logits (`torch.Tensor`): (B, S, vocabulary).
        labels (`torch.Tensor`): (B, S), shifted inside, -100 where a token does not count.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): divide the sum by this number instead.

    Returns:
        `torch.Tensor`: a float32 scalar with gradient, without coefficient.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.losses import lm_z_loss
    >>> round(lm_z_loss(torch.zeros(1, 3, 8), torch.tensor([[1, 2, 3]])).item(), 3)  # log(8) squared
    4.324

    ```
    """
    counted = labels.to(logits.device)[:, 1:] != -100
    squares = (
        logits.float().logsumexp(dim=-1)[:, :-1].square()
    )  # sliced last: a slice of the logits is a copy
    total = (squares * counted).sum()
    return total / (counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


def cross_entropy_and_z_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of the next token and `lm_z_loss`, with one pass over the logits each way.

    Computed one after the other, the two need twice as many passes. In a small model with a large vocabulary
    these take much of a training step.

    Args:
        logits (`torch.Tensor`): (B, S, vocabulary).
        labels (`torch.Tensor`): (B, S), shifted inside, -100 where a token does not count.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): divide the sums by this number. By default
            by the number of labels that count.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: float32 scalars with gradient, the z-loss without coefficient.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.losses import cross_entropy_and_z_loss
    >>> cross_entropy, z = cross_entropy_and_z_loss(torch.zeros(1, 3, 8), torch.tensor([[1, 2, 3]]))
    >>> round(cross_entropy.item(), 3), round(z.item(), 3)  # log(8) and its square
    (2.079, 4.324)

    ```
    """
    labels_T = F.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1).to(logits.device)
    cross_entropy, z = _NextTokenSums.apply(logits.reshape(-1, logits.shape[-1]), labels_T)
    if num_items_in_batch is None:
        num_items_in_batch = (labels_T != -100).sum()  # NaN without a label, like any mean over nothing
    elif isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(logits.device)
    return cross_entropy / num_items_in_batch, z / num_items_in_batch


class _NextTokenSums(torch.autograd.Function):
    """Cross entropy and squared logsumexp, summed over the tokens with a label; V: vocabulary."""

    @staticmethod
    def forward(ctx, logits_TV, labels_T):
        counted_T = labels_T != -100
        labels_T1 = labels_T.clamp(min=0).unsqueeze(1)
        log_prob_TV = F.log_softmax(logits_TV, dim=-1, dtype=torch.float32)
        log_prob_T = log_prob_TV.gather(1, labels_T1).squeeze(1)
        lse_T = logits_TV.gather(1, labels_T1).squeeze(1).float() - log_prob_T
        ctx.save_for_backward(log_prob_TV, lse_T, labels_T1, counted_T)
        ctx.dtype = logits_TV.dtype
        zero = lse_T.new_zeros(())
        return -torch.where(counted_T, log_prob_T, zero).sum(), torch.where(
            counted_T, lse_T.square(), zero
        ).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_cross_entropy, grad_z):
        log_prob_TV, lse_T, labels_T1, counted_T = ctx.saved_tensors
        # d lse / d logits is the softmax; the logit of the label itself enters the cross entropy once more.
        grad_lse_T = (grad_cross_entropy + 2 * grad_z * lse_T) * counted_T
        grad_TV = log_prob_TV.exp().mul_(grad_lse_T.unsqueeze(1))
        grad_TV.scatter_add_(1, labels_T1, -(grad_cross_entropy * counted_T).unsqueeze(1))
        return grad_TV.to(ctx.dtype), None


class Losses(NamedTuple):
    """The loss of a forward and its parts; see `EmoCausalLMOutputWithPast`.

    Only `loss` and `aux_loss` have gradients.
    """

    loss: torch.Tensor | None = None
    ce_loss: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    router_z_loss: torch.Tensor | None = None
    lm_z_loss: torch.Tensor | None = None


def total_loss(
    config: EmoConfig,
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    *,
    router_statistics: Sequence[RouterStatistics] | None = None,
    router_logits: Sequence[torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    balance_counts: BalanceCounts | None = None,
    own_loss: Callable[..., torch.Tensor] | None = None,
) -> Losses:
    """The loss of a language model, and its parts.

    It is the cross entropy of the next tokens. With document pools, the balance loss, the router's z loss and
    the z loss of the logits are added with their coefficients (https://arxiv.org/abs/2605.06663). With router
    logits, the balance loss of the released code is added.

    Args:
        config (`EmoConfig`): the model's config, for the coefficients and layers.
        logits (`torch.Tensor`): (B, S, vocabulary).
        labels (`torch.Tensor`, *optional*): (B, S), not shifted, -100 where a token does not count; without
            them only the losses of the routers are computed.
        router_statistics (`Sequence[RouterStatistics]`, *optional*): of each expert layer, with pools in
            training.
        router_logits (`Sequence[torch.Tensor]`, *optional*): raw logits (T, E) of each expert layer, where
            the balance loss is wanted without pools.
        attention_mask (`torch.Tensor`, *optional*): (B, S), for the balance loss without labels; padding does
            not count.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): the tokens that the mean is over.
        balance_counts (`BalanceCounts`, *optional*): counts of earlier parts of the optimiser step.
        own_loss (`Callable`, *optional*): another loss of `logits` and `labels` in place of the cross
            entropy.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.modeling_emo.losses import total_loss
    >>> total_loss(EmoConfig(), torch.zeros(1, 3, 7), torch.tensor([[1, 2, 3]])).loss
    tensor(1.9459)

    ```
    """
    loss = ce_loss = aux_loss = router_z_loss = lm_z = None
    if labels is not None:
        if own_loss is not None:
            loss = own_loss(logits, labels)
        else:
            loss, lm_z = cross_entropy_and_z_loss(logits, labels, num_items_in_batch)
        ce_loss = loss.detach().clone()  # the Trainer scales the loss in place
    layers = [layer for layer in config.layer_experts if not layer.is_dense]
    if router_statistics is not None:
        aux_loss, router_z_loss = document_pool_losses(
            router_statistics, layers, num_items_in_batch=num_items_in_batch, balance_counts=balance_counts
        )
        if loss is not None and labels is not None:
            if lm_z is None:
                lm_z = lm_z_loss(logits, labels, num_items_in_batch)
            loss = (
                loss
                + config.balance_loss_coef * aux_loss.to(loss.device)
                + config.router_z_loss_coef * router_z_loss.to(loss.device)
                + config.lm_z_loss_coef * lm_z.to(loss.device)
            )
    elif router_logits is not None and layers:
        token_mask = None if labels is None else labels != -100
        if labels is None and attention_mask is not None and attention_mask.dim() == 2:
            length = router_logits[0].shape[0] // attention_mask.shape[0]
            token_mask = attention_mask[:, -length:]  # without the tokens in the cache
        aux_loss = load_balancing_loss(
            router_logits, layers, token_mask=token_mask, num_items_in_batch=num_items_in_batch
        )
        if loss is not None:
            loss = loss + config.router_aux_loss_coef * aux_loss.to(loss.device)
    return Losses(
        loss,
        ce_loss,
        aux_loss,
        None if router_z_loss is None else router_z_loss.detach(),
        None if lm_z is None or router_statistics is None else lm_z.detach(),
    )
