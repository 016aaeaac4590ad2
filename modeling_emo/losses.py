"""The losses that EMO adds to the cross entropy.

Shape suffixes: T tokens (batch x sequence), E experts, R routed experts.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..configuration.configuration_emo import LayerExperts


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
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): N, where the batch is spread over several
            forwards; the number of counted tokens by default.

    Returns:
        `torch.Tensor`: the loss, a float32 scalar with gradient to the logits.

    Raises:
        ValueError: if there are no logits, or their number is not that of the layers.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.configuration import LayerExperts
    >>> from transformers_emo.modeling_emo import load_balancing_loss
    >>> layer = LayerExperts(num_experts=4, num_shared=0, always_active=(), top_k=1)
    >>> round(load_balancing_loss([torch.eye(4) * 20], [layer]).item(), 3)
    1.0

    ```
    """
    if len(router_logits) == 0 or len(router_logits) != len(layer_experts):
        raise ValueError(
            f"Got router logits of {len(router_logits)} layers and the experts of {len(layer_experts)}, "
            "expected the "
            "same number of each and at least one: does the model have expert layers?"
        )
    device = router_logits[0].device
    num_tokens = router_logits[0].shape[0]
    if token_mask is None:
        mask_T = torch.ones(num_tokens, device=device)
    else:
        mask_T = token_mask.reshape(-1).to(device=device, dtype=torch.float32)
    if num_items_in_batch is None:
        num_items_in_batch = mask_T.sum()
    elif isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(device)
    # The released code leaves out, in every layer, the always-active experts of the first one, unless layers
    # differ in size. Kept, so that losses agree; no released model has always-active experts that differ
    # between layers.
    same_size = len({layer.num_experts for layer in layer_experts}) == 1

    losses = []
    for logits_TE, layer in zip(router_logits, layer_experts, strict=True):
        always = (layer_experts[0] if same_size else layer).always_active
        num_routed = layer.num_routed - len(always)
        top_k = layer.top_k - layer.num_shared - len(always)
        probs_TR = F.softmax(logits_TE[:, : layer.num_routed].to(device).float(), dim=-1)
        if always:
            kept = torch.tensor([e for e in range(layer.num_routed) if e not in always], device=device)
            probs_TR = probs_TR[:, kept]
        picks_Tr = probs_TR.topk(top_k, dim=-1).indices
        count_R = torch.zeros(num_routed, device=device)
        count_R = count_R.scatter_add(0, picks_Tr.flatten(), mask_T.repeat_interleave(top_k))
        mean_prob_R = (mask_T @ probs_TR) / mask_T.sum()
        losses.append(num_routed / top_k * (count_R * mean_prob_R).sum() / num_items_in_batch)
    return torch.stack(losses).mean()
