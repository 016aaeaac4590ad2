"""Document pools: the experts that the tokens of one document may use.

The pool of a document is chosen anew in every layer, from the router's own probabilities: paper section 3,
https://arxiv.org/abs/2605.06663. Nothing here loops over documents, waits for the device or depends on values
for its shapes, so that it compiles. What a document is stands in `segments.py`.

Shape suffixes: B batch, S sequence, T = B * S tokens, N segments, R routed experts, L layers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..configuration.configuration_emo import EmoConfig
from .segments import (
    count_segments,
    flatten_segments,
    is_eos,
    segments_from_eos,
    segments_from_lengths,
    segments_from_positions,
)


def draw_pool_sizes(
    shape: tuple[int, ...],
    smallest: int,
    largest: int,
    *,
    rank: int = 0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Draw pool sizes uniformly from `smallest` to `largest`, both included.

    Data-parallel ranks that share a seed draw different sizes: the uniform numbers of rank k are those of
    rank 0, moved round the unit circle by k times the golden ratio, which keeps each of them uniform and
    spreads the ranks evenly.

    Args:
        shape (`tuple[int, ...]`): such as (L, N).
        smallest (`int`): the smallest pool, at least 1.
        largest (`int`): the largest pool.
        rank (`int`, defaults to 0): data-parallel rank.
        generator (`torch.Generator`, *optional*): of any device (one of the CPU draws there, and the host
            waits while the sizes are copied); the device's global one by default, which checkpoints of a
            training run store and restore.
        device (`torch.device` or `str`, *optional*): where the sizes are wanted.

    Returns:
        `torch.Tensor`: int64 sizes.

    Raises:
        ValueError: if the range is empty or begins below 1.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo import draw_pool_sizes
    >>> sizes = draw_pool_sizes((2, 500), 8, 128, generator=torch.Generator().manual_seed(0))
    >>> sizes.shape, sizes.min() >= 8, sizes.max() <= 128
    (torch.Size([2, 500]), tensor(True), tensor(True))

    ```
    """
    if not 1 <= smallest <= largest:
        raise ValueError(
            f"Pool sizes from {smallest} to {largest} are impossible: expected 1 <= smallest <= largest."
        )
    golden_ratio = 0.6180339887498949
    drawn_on = device if generator is None else generator.device
    uniform = torch.rand(shape, generator=generator, device=drawn_on).to(device)
    uniform = (uniform + rank * golden_ratio % 1.0) % 1.0
    return (smallest + uniform * (largest - smallest + 1)).long().clamp_(max=largest)


def pool_mask(
    logits_TR: torch.Tensor,
    segment_T: torch.Tensor,
    pool_size_N: torch.Tensor,
    token_mask_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose the pool of every document of a batch: the experts with the largest summed router probability.

    Carries no gradient. Ties go to the smaller id. A size of at least R restricts nothing.

    Args:
        logits_TR (`torch.Tensor`): router logits of the routed experts, any float dtype (the softmax is
            float32).
        segment_T (`torch.Tensor`): the document of each token, 0 to N - 1.
        pool_size_N (`torch.Tensor`): routed experts in the pool of each document; N may be larger than the
            number of documents.
        token_mask_T (`torch.Tensor`, *optional*): false for padding, which has no say in any pool.

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
        # In fixed point (40 bits below the point), for there the order of the terms does not matter: an
        # accelerator adds them as they come, and gradient checkpointing must choose the same pool again.
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
        """(T, R) router logits, float32, to the same with minus infinity outside the pools."""
        mask_TR = pool_mask(logits_TR, self.segment_T, self.size_N, self.token_mask_T)
        return logits_TR.masked_fill(~mask_TR, float("-inf"))


class PoolRequest(NamedTuple):
    """What a forward says about documents and pools; see `EmoModel.forward`."""

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
    """The document of each token, (B, S), from the best source there is.

    That is, in this order: `document_ids`, `seq_idx` or `cu_seq_lens_q` of the request, then what
    `config.document_boundaries` says. `document_ids` are those of routing; where an EOS opens its segment
    there, it is given back to the document before it for `eos_opens=False`.

    Args:
        config (`EmoConfig`): the model's config.
        request (`PoolRequest`): what the caller said.
        input_ids (`torch.Tensor`, *optional*): (B, S), for EOS.
        position_ids (`torch.Tensor`, *optional*): (B, S).
        eos_opens (`bool`): whether an EOS belongs to the segment after it or before it, where EOS decides.

    Raises:
        ValueError: if the config asks for EOS tokens or position ids that are not there.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.modeling_emo.document_pool import PoolRequest, find_segments
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
        # Given as for routing, where an EOS opens a segment: here it belongs to the document before it.
        before = torch.cat([request.document_ids[:, :1], request.document_ids[:, :-1]], dim=1)
        return torch.where(is_eos(input_ids, config.eos_token_id), before, request.document_ids)
    if request.seq_idx is not None:
        return request.seq_idx
    if request.cu_seq_lens_q is not None:
        tokens = input_ids if input_ids is not None else position_ids
        if tokens is None:
            raise ValueError(
                "`cu_seq_lens_q` tells documents apart only beside `input_ids` or `position_ids`."
            )
        return segments_from_lengths(request.cu_seq_lens_q, tokens.numel()).view_as(tokens)
    if config.document_boundaries == "position_ids":
        if position_ids is None:
            raise ValueError("Documents begin where `position_ids` start again: give `position_ids`.")
        return segments_from_positions(position_ids)
    if input_ids is None or config.eos_token_id is None:
        raise ValueError(
            "Documents are told apart by EOS tokens, and there are no `input_ids` or no `eos_token_id`: give "
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
    rank: int = 0,
    generator: torch.Generator | None = None,
) -> list[DocumentPools] | None:
    """The documents of a batch and the sizes of their pools in every layer, or `None` for no pools.

    Pools are on in training when the config has a range of sizes, drawn here for all layers at once: a layer
    that gradient checkpointing runs a second time sees the same sizes. Otherwise they are on when asked for.

    Args:
        config (`EmoConfig`): the model's config.
        request (`PoolRequest`): what the caller said.
        training (`bool`): whether the model is in training mode.
        input_ids, position_ids, attention_mask: of the forward, (B, S) each.
        rank (`int`, defaults to 0): data-parallel rank; ranks draw different sizes.
        generator (`torch.Generator`, *optional*): for the sizes.

    Returns:
        `list[DocumentPools]`, *optional*: one for each layer.

    Raises:
        ValueError: if a pool is asked for that the config does not define or that is too small, or documents
            cannot be told apart.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.modeling_emo.document_pool import PoolRequest, document_pools
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
            f"A document pool of {size} is smaller than the {picked} routed experts a token picks."
        )

    eos_opens = config.document_boundaries == "eos"
    segment_T = flatten_segments(find_segments(config, request, input_ids, position_ids, eos_opens=eos_opens))
    token_mask_T = None
    if attention_mask is not None and attention_mask.dim() == 2:
        token_mask_T = attention_mask.bool().flatten()
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
                f"{num_segments} segments)."
            )
    elif size is True and smallest is not None and largest is not None:
        size_LN = draw_pool_sizes(
            (num_layers, num_segments),
            smallest,
            largest,
            rank=rank,
            generator=generator,
            device=segment_T.device,
        )
    else:
        size_LN = torch.full((num_layers, num_segments), size, device=segment_T.device)
    return [DocumentPools(segment_T, size_N, token_mask_T) for size_N in size_LN]


def mean_pool_size(pools: Sequence[DocumentPools], config: EmoConfig) -> torch.Tensor:
    """Routed experts in a pool, mean over the documents of a batch and the expert layers.

    Args:
        pools (`Sequence[DocumentPools]`): one for each layer, from `document_pools`.
        config (`EmoConfig`): the model's config. A pool of more than the R routed experts counts as R.

    Returns:
        `torch.Tensor`: float32 scalar; padding is no document.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.modeling_emo.document_pool import DocumentPools, mean_pool_size
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
