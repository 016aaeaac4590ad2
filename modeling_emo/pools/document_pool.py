"""Document pools: the experts that the tokens of one document may use.

Every layer chooses its own pool for a document, from the probabilities of its router: paper section 3,
https://arxiv.org/abs/2605.06663. Nothing here loops over documents or waits for the device, and no shape
depends on values, so that all of it compiles. `segments.py` finds where documents begin.

Shape suffixes: B batch, S sequence, T = B * S tokens, N segments, R routed experts, L layers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ...configuration.configuration_emo import EmoConfig
from .pool_sizes import document_numbers, draw_pool_sizes
from .segments import (
    count_segments,
    flatten_segments,
    is_eos,
    segments_from_eos,
    segments_from_lengths,
    segments_from_positions,
)


def pool_mask(
    logits_TR: torch.Tensor,
    segment_T: torch.Tensor,
    pool_size_N: torch.Tensor,
    token_mask_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose the pool of every document of a batch: the experts with the largest summed router probability.

    The result carries no gradient. Of experts with equal sums the smaller id comes first. A size of at least
    R restricts nothing.

    Args:
        logits_TR (`torch.Tensor`): router logits of the routed experts, any float dtype (the softmax is
            float32).
        segment_T (`torch.Tensor`): the document of each token, 0 to N - 1.
        pool_size_N (`torch.Tensor`): routed experts in the pool of each document; N may be larger than the
            number of documents.
        token_mask_T (`torch.Tensor`, *optional*): false for padding, which does not count in any pool.

    Returns:
        `torch.Tensor`: bool (T, R), true for the experts in the pool of the token's document.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo import pool_mask
    >>> logits = torch.tensor([[3.0, 2.0, 0.0], [3.0, 2.5, 0.0], [0.0, 0.0, 4.0]])
    >>> pool_mask(logits, torch.tensor([0, 0, 1]), torch.tensor([2, 1])).tolist()
    [[True, True, False], [True, True, False], [False, False, True]]

    ```
    """
    with torch.no_grad():
        probs_TR = F.softmax(logits_TR, dim=-1, dtype=torch.float32)
        if token_mask_T is not None:
            probs_TR = probs_TR * token_mask_T[:, None]
        num_routed = logits_TR.shape[-1]
        # An accelerator adds in no fixed order, and gradient checkpointing must choose the same pool again.
        # Sums of integers do not depend on the order: so in fixed point, 40 bits after the point.
        fixed_TR = (probs_TR * 2.0**40).long()
        sums_NR = fixed_TR.new_zeros(len(pool_size_N), num_routed).index_add_(0, segment_T, fixed_TR)
        order_NR = sums_NR.argsort(dim=-1, descending=True, stable=True)
        within_NR = torch.arange(num_routed, device=logits_TR.device) < pool_size_N[:, None]
        pool_NR = torch.zeros_like(within_NR).scatter_(-1, order_NR, within_NR)
        return pool_NR[segment_T]


class DocumentPools(NamedTuple):
    """The documents of a batch and the sizes of their pools in one layer.

    Args:
        segment_T (`torch.Tensor`): the document of each token, as `flatten_segments` numbers them.
        size_N (`torch.Tensor`): routed experts in the pool of each document.
        token_mask_T (`torch.Tensor`, *optional*): false for padding.

    Example: see `document_pools`.
    """

    segment_T: torch.Tensor
    size_N: torch.Tensor
    token_mask_T: torch.Tensor | None

    def restrict(self, logits_TR: torch.Tensor) -> torch.Tensor:
        """Put minus infinity outside the pools: router logits (T, R) float32, before and after."""
        mask_TR = pool_mask(logits_TR, self.segment_T, self.size_N, self.token_mask_T)
        return logits_TR.masked_fill(~mask_TR, float("-inf"))


class PoolRequest(NamedTuple):
    """The arguments of a forward about documents and pools; see `EmoModel.forward`."""

    document_pool: int | bool | None = None
    document_pool_sizes: torch.Tensor | None = None
    document_ids: torch.Tensor | None = None
    seq_idx: torch.Tensor | None = None
    cu_seq_lens_q: torch.Tensor | None = None


def find_segments(
    config: EmoConfig,
    request: PoolRequest,
    input_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    *,
    eos_opens: bool,
) -> torch.Tensor:
    """The document of each token, (B, S), from the first source that is there.

    The order is: `document_ids`, `seq_idx`, `cu_seq_lens_q` of the request, and what
    `config.document_boundaries` says. `document_ids` are meant for routing, where an EOS may open a segment.
    With `eos_opens=False` such an EOS goes to the document before it.

    Args:
        config (`EmoConfig`): the model's config.
        request (`PoolRequest`): what the caller said.
        input_ids (`torch.Tensor`, *optional*): (B, S), to find EOS tokens.
        position_ids (`torch.Tensor`, *optional*): (B, S).
        eos_opens (`bool`): whether an EOS belongs to the segment after it or before it, where EOS decides.

    Raises:
        ValueError: if the config needs EOS tokens or position ids, and there are none.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.modeling_emo.pools.document_pool import PoolRequest, find_segments
    >>> ids = torch.tensor([[5, 6, 1, 7]])
    >>> find_segments(EmoConfig(eos_token_id=1), PoolRequest(), ids, None, eos_opens=True).tolist()
    [[0, 0, 1, 1]]

    ```
    """
    if request.document_ids is not None:
        if (
            eos_opens
            or config.document_boundaries != "eos"
            or input_ids is None
            or config.eos_token_id is None
        ):
            return request.document_ids
        # In these ids an EOS opens a segment. Here it belongs to the document before it.
        before = torch.cat([request.document_ids[:, :1], request.document_ids[:, :-1]], dim=1)
        return torch.where(is_eos(input_ids, config.eos_token_id), before, request.document_ids)
    if request.seq_idx is not None:
        return request.seq_idx
    if request.cu_seq_lens_q is not None:
        tokens = input_ids if input_ids is not None else position_ids
        if tokens is None:
            raise ValueError(
                "`cu_seq_lens_q` needs the number of tokens: give `input_ids` or `position_ids` with it."
            )
        return segments_from_lengths(request.cu_seq_lens_q, tokens.numel()).view_as(tokens)
    if config.document_boundaries == "position_ids":
        if position_ids is None:
            raise ValueError("Documents begin where `position_ids` start again: give `position_ids`.")
        return segments_from_positions(position_ids)
    if input_ids is None or config.eos_token_id is None:
        raise ValueError(
            "Documents end at EOS tokens, and there are no `input_ids` or no `config.eos_token_id`: give "
            "`document_ids`."
        )
    return segments_from_eos(input_ids, config.eos_token_id, eos_opens=eos_opens)


def document_pools(
    config: EmoConfig,
    request: PoolRequest,
    *,
    training: bool,
    input_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> list[DocumentPools] | None:
    """The documents of a batch and the sizes of their pools in every layer, or `None` for no pools.

    In training there are pools if the config has a range of sizes. Sizes are drawn here for all layers at
    once, so that a layer that gradient checkpointing runs twice sees the same ones. Otherwise there are pools
    if the caller asks for them.

    Args:
        config (`EmoConfig`): the model's config.
        request (`PoolRequest`): what the caller said.
        training (`bool`): whether the model is in training mode.
        input_ids, position_ids, attention_mask: of the forward, (B, S) each.
        inputs_embeds (`torch.Tensor`, *optional*): (B, S, D); they tell documents where there are no ids.
        seed (`torch.Tensor`, *optional*): an int64 scalar that sizes are drawn from, as `step_seed` gives.
        generator (`torch.Generator`, *optional*): draws the seed, where there is none. It may be of any
            device; by default it is the global one of the documents' device.

    Returns:
        `list[DocumentPools]`, *optional*: one for each layer.

    Raises:
        ValueError: if a pool is asked for that the config does not define or that is too small, or documents
            cannot be told apart.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.modeling_emo.pools.document_pool import PoolRequest, document_pools
    >>> config, ids = EmoConfig(num_hidden_layers=2), torch.tensor([[5, 6, 7]])
    >>> pools = document_pools(config, PoolRequest(document_pool=32), training=False, input_ids=ids,
    ...                        position_ids=None, attention_mask=None)
    >>> [pool.size_N.tolist() for pool in pools]
    [[32], [32]]

    ```
    """
    size, sizes = request.document_pool, request.document_pool_sizes
    smallest, largest = config.document_pool_min, config.document_pool_max
    if size is None:
        size = (training and smallest is not None) or sizes is not None
    if size is False:
        return None
    if size is True and not training and sizes is None:
        size = config.document_pool_eval
    if size is None or (size is True and sizes is None and (smallest is None or largest is None)):
        name = "document_pool_min` and `document_pool_max" if training else "document_pool_eval"
        raise ValueError(f"`document_pool=True` needs `config.{name}`: set it, or give the size.")
    picked = max(layer.top_k - layer.num_shared for layer in config.layer_experts)
    if size is not True and size < picked:
        raise ValueError(
            f"A document pool of {size} is smaller than the {picked} routed experts that a token picks: give "
            f"at least {picked}."
        )

    eos_opens = config.document_boundaries == "eos"
    segments_BS = find_segments(config, request, input_ids, position_ids, eos_opens=eos_opens)
    segment_T = flatten_segments(segments_BS)
    token_mask_BS = None
    if attention_mask is not None and attention_mask.dim() == 2:
        length = segment_T.shape[0] // attention_mask.shape[0]
        token_mask_BS = attention_mask[:, -length:].bool()  # without what is in a cache
    token_mask_T = None if token_mask_BS is None else token_mask_BS.flatten()
    num_layers, num_segments = config.num_hidden_layers, count_segments(segment_T)
    if sizes is not None:
        size_LN = sizes.to(segment_T.device)
        if (
            size_LN.shape[0] != num_layers
            or size_LN.shape[1] < num_segments
            and not torch.compiler.is_compiling()
        ):
            raise ValueError(
                f"`document_pool_sizes` has shape {tuple(size_LN.shape)}, expected ({num_layers} layers, "
                f"{num_segments} segments): give one size for each document in each layer."
            )
    elif size is True and smallest is not None and largest is not None:
        if seed is None:
            place = segment_T.device if generator is None else generator.device
            seed = torch.randint(1 << 32, (), generator=generator, device=place)
        tokens = inputs_embeds if input_ids is None else input_ids
        shape = segments_BS.shape if tokens is None else tokens.shape[:2]
        documents_N = document_numbers(segment_T, num_segments, tokens, token_mask_BS, (shape[0], shape[1]))
        size_LN = draw_pool_sizes(documents_N, num_layers, smallest, largest, seed=seed)
    else:
        size_LN = torch.full((num_layers, num_segments), size, device=segment_T.device)
    return [DocumentPools(segment_T, size_N, token_mask_T) for size_N in size_LN]


def mean_pool_size(pools: Sequence[DocumentPools], config: EmoConfig) -> torch.Tensor:
    """The number of routed experts in a pool: its mean over the documents of a batch and the expert layers.

    Args:
        pools (`Sequence[DocumentPools]`): one for each layer, from `document_pools`.
        config (`EmoConfig`): the model's config. A pool of more than the R routed experts counts as R.

    Returns:
        `torch.Tensor`: a float32 scalar. Padding does not count as a document.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.modeling_emo.pools.document_pool import DocumentPools, mean_pool_size
    >>> pools = [DocumentPools(torch.tensor([0, 0, 1]), torch.tensor([8, 32]), None)]
    >>> mean_pool_size(pools, EmoConfig(num_hidden_layers=1))
    tensor(20.)

    ```
    """
    segment_T, size_N, token_mask_T = pools[0]
    tokens_T = segment_T.new_ones(len(segment_T)) if token_mask_T is None else token_mask_T.long()
    is_document_N = size_N.new_zeros(len(size_N)).index_add_(0, segment_T, tokens_T) > 0
    mean_L = [
        (pool.size_N.clamp(max=layer.num_routed) * is_document_N).sum() / is_document_N.sum().clamp(min=1)
        for pool, layer in zip(pools, config.layer_experts, strict=True)
        if not layer.is_dense
    ]
    return torch.stack(mean_L).mean()
