"""What a forward works out before its first layer: positions, pools, and inputs of the attention.

Shape suffixes: B batch, S sequence, D hidden size.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from ..imports.transformers_versions import private_names

with private_names("network"):
    from transformers.cache_utils import Cache
    from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function
    from transformers.utils.generic import is_flash_attention_requested

from ..configuration.configuration_emo import EmoConfig
from .parallel import refuse_split_sequences
from .pools.document_pool import PoolRequest, document_pools, find_segments
from .pools.prompt_pool import FrozenPool, Pools, PromptPool, frozen_pools, row_pools
from .pools.segments import flatten_segments, lengths_from_segments, segments_from_positions
from .transformers_differences import CACHE

logger = logging.get_logger(__name__)

_FLASH_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class ForwardInputs(NamedTuple):
    """The inputs of a forward, completed.

    Args:
        config (`EmoConfig`): the model's config.
        input_ids (`torch.Tensor`, *optional*): (B, S).
        inputs_embeds (`torch.Tensor`): (B, S, D).
        attention_mask (`torch.Tensor`, *optional*): (B, S), or a ready 4-D mask.
        position_ids (`torch.Tensor`): (B, S) or (1, S).
        cache (`Cache`, *optional*): keys and values of the tokens before.
        training_step (`bool`): whether pools of the config hold, if nothing else is asked for.

    Example: see `with_default_pool`.
    """

    config: EmoConfig
    input_ids: torch.Tensor | None
    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor
    cache: Cache | None
    training_step: bool


def positions_after(cache: Cache | None, inputs_embeds: torch.Tensor) -> torch.Tensor:
    """Positions (1, S) of the tokens of a forward, after those in the cache.

    Args:
        cache (`Cache`, *optional*): keys and values of the tokens before.
        inputs_embeds (`torch.Tensor`): (B, S, D).

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.forward_inputs import positions_after
    >>> positions_after(None, torch.zeros(1, 3, 8))
    tensor([[0, 1, 2]])

    ```
    """
    seen = cache.get_seq_length() if cache is not None else 0
    return (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)


def trains_without_labels(
    config: EmoConfig, document_pool: int | bool | None, sizes: torch.Tensor | None
) -> bool:
    """Whether a forward in training mode, that nobody called a step of training, is one.

    Pools belong to the model's own losses. Without them a step must compute what evaluation does: trainers
    such as DPO's compare the two.

    Args:
        config (`EmoConfig`): the model's config.
        document_pool (`int` or `bool`, *optional*): what the caller said of pools.
        sizes (`torch.Tensor`, *optional*): the sizes of pools that the caller gave.

    Returns:
        `bool`: `True` if the caller asks for pools of the sizes of training, by `document_pool=True`. If the
        config has pools and the caller said nothing of them, a warning says that there are none, once.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.modeling_emo.forward_inputs import trains_without_labels
    >>> trains_without_labels(EmoConfig(document_pool_min=8, document_pool_max=128), None, None)
    False

    ```
    """
    if document_pool is None and sizes is None and config.document_pool_min is not None:
        _say_no_pools()
    return document_pool is True


def _say_no_pools() -> None:
    if not torch.compiler.is_compiling():
        logger.warning_once(
            "A forward in training mode without `labels` draws no document pools, although the config has "
            "them: they belong to the model's own loss. For a trainer with another loss (DPO, GRPO) that is "
            "right, and `document_pool=False` or a config without `document_pool_min` and "
            "`document_pool_max` says so. To train with pools, pass `labels`, or `training_step=True`."
        )


def behind_virtual_tokens(
    inputs_embeds: torch.Tensor, document_ids: torch.Tensor | None, prompt_pool: PromptPool | None
) -> tuple[torch.Tensor | None, PromptPool | None]:
    """Documents and prompts where an adapter has put virtual tokens in front of the row (prompt tuning).

    Virtual tokens belong to the first document of the row, and to the prompt.

    Args:
        inputs_embeds (`torch.Tensor`): (B, S, D), with the virtual tokens.
        document_ids (`torch.Tensor`, *optional*): (B, S) or without them (B, S - V).
        prompt_pool (`PromptPool`, *optional*): its `prompt_BS` with or without them.

    Returns:
        `tuple[torch.Tensor | None, PromptPool | None]`: both with the virtual tokens.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.forward_inputs import behind_virtual_tokens
    >>> behind_virtual_tokens(torch.zeros(1, 5, 8), torch.tensor([[3, 3, 4]]), None)[0]
    tensor([[3, 3, 3, 3, 4]])

    ```
    """
    batch, length = inputs_embeds.shape[:2]
    if document_ids is not None and document_ids.shape[1] < length:
        first = document_ids[:, :1].expand(batch, length - document_ids.shape[1])
        document_ids = torch.cat([first, document_ids], dim=1)
    if prompt_pool is not None and prompt_pool.prompt_BS.shape[1] < length:
        virtual = prompt_pool.prompt_BS.new_ones(batch, length - prompt_pool.prompt_BS.shape[1])
        prompt_pool = prompt_pool._replace(prompt_BS=torch.cat([virtual, prompt_pool.prompt_BS], dim=1))
    return document_ids, prompt_pool


def with_default_pool(
    inputs: ForwardInputs, request: PoolRequest, prompt_pool: PromptPool | None, default: int | None
) -> tuple[PoolRequest, PromptPool | None]:
    """The pools that were asked for, or where nothing was said of pools, those of the model's default.

    Args:
        inputs (`ForwardInputs`): the inputs of the forward.
        request (`PoolRequest`): what the caller said of documents and pools.
        prompt_pool (`PromptPool`, *optional*): what the caller said of pools of prompts.
        default (`int`, *optional*): `model.default_document_pool`, the size of the pools.

    Returns:
        `tuple[PoolRequest, PromptPool | None]`: the same, completed. In training, and where the caller tells
        documents apart, each document has its pool; otherwise each row has.

    Raises:
        ValueError: as `row_pools`.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.modeling_emo.pools.document_pool import PoolRequest
    >>> from transformers_emo.modeling_emo.forward_inputs import ForwardInputs, with_default_pool
    >>> embeds, positions = torch.zeros(1, 3, 8), torch.arange(3)[None]
    >>> inputs = ForwardInputs(EmoConfig(), None, embeds, None, positions, None, True)
    >>> with_default_pool(inputs, PoolRequest(), None, 16)[0].document_pool
    16

    ```
    """
    said = (request.document_pool, request.document_pool_sizes, prompt_pool)
    if default is None or any(pools is not None for pools in said):
        return request, prompt_pool
    documents = (request.document_ids, request.seq_idx, request.cu_seq_lens_q)
    if inputs.training_step or any(given is not None for given in documents):
        return request._replace(document_pool=default), None
    return request, row_pools(
        inputs.config, default, inputs.cache, inputs.inputs_embeds, inputs.attention_mask
    )


def pools_that_hold(
    inputs: ForwardInputs,
    request: PoolRequest,
    prompt_pool: PromptPool | None,
    masks: list[torch.Tensor | None],
    *,
    seed: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[list[FrozenPool] | None, Sequence[Pools] | None]:
    """The pools of each layer: those of prompts or of the cache, or else those of documents.

    Args:
        inputs (`ForwardInputs`): the inputs of the forward.
        request (`PoolRequest`): what the caller said of documents and pools.
        prompt_pool (`PromptPool`, *optional*): what pools of prompts are chosen from.
        masks (`list[torch.Tensor | None]`): for each layer the experts (E,) that may be used.
        seed (`torch.Tensor`, *optional*): what sizes are drawn from.
        generator (`torch.Generator`, *optional*): draws the seed, where there is none.

    Returns:
        `tuple`: pools that are kept in the cache, `None` if there are none; and the pools of each layer,
        `None` if every expert may be used.

    Raises:
        ValueError: as `frozen_pools` and `document_pools`.

    Example: see `EmoModel.forward`.
    """
    batch, length, _ = inputs.inputs_embeds.shape
    frozen = None
    if request.document_pool is None:
        given = (inputs.cache, prompt_pool, inputs.config, (batch, length), masks, inputs.attention_mask)
        frozen = frozen_pools(*given)
    if frozen:
        return frozen, frozen
    pools = document_pools(
        inputs.config,
        request,
        training=inputs.training_step,
        input_ids=inputs.input_ids,
        position_ids=inputs.position_ids.expand(batch, length),
        attention_mask=inputs.attention_mask,
        inputs_embeds=inputs.inputs_embeds,
        seed=seed,
        generator=generator,
    )
    return frozen, pools


def attention_inputs(
    inputs: ForwardInputs, request: PoolRequest, within_documents: bool | None, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The mask of the attention, and what flash attention is told instead of one.

    Args:
        inputs (`ForwardInputs`): the inputs of the forward.
        request (`PoolRequest`): what the caller said of documents and pools.
        within_documents (`bool`, *optional*): tokens attend to their own document only; by default as the
            config says, in training.
        kwargs (`dict[str, Any]`): further keyword arguments of the forward, for lengths of the caller's own.

    Returns:
        `tuple`: the mask, in the form that the attention implementation takes, `None` where it takes none;
        and keyword arguments for the layers: the lengths of documents, or nothing.

    Raises:
        ValueError: if documents are told apart behind tokens in a cache, or the attention implementation
            cannot keep them apart.

    Example: see `EmoModel.forward`.
    """
    config, cache = inputs.config, inputs.cache
    if within_documents is None:
        within_documents = inputs.training_step and config.attention_within_documents
    asked = within_documents or request.document_pool or request.document_pool_sizes is not None
    before = cache.get_seq_length() if asked and cache is not None else 0
    if asked and before > 0 and not inputs.training_step:
        raise ValueError(
            "Documents are told apart as a whole: they cannot begin behind tokens in a cache. Give the whole "
            "documents at once, without a cache, or leave out what asks for documents."
        )
    same_document = None
    if within_documents:
        refuse_split_sequences()
        # Here an EOS closes its own document: the token after it starts the next one.
        segments_BS = find_segments(config, request, inputs.input_ids, inputs.position_ids, eos_opens=False)
        segments_BS = segments_BS.expand(inputs.inputs_embeds.shape[:2])
        if before > 0:
            same_document = _same_document_behind(segments_BS, before)
        elif is_flash_attention_requested(config):  # given a mask, it does not look at lengths
            return None, _flash_lengths(inputs, request, segments_BS, kwargs)
        else:
            same_document = packed_sequence_mask_function(segments_BS)
    causal_mask = create_causal_mask(
        config=config,
        inputs_embeds=inputs.inputs_embeds,
        attention_mask=inputs.attention_mask,
        position_ids=inputs.position_ids,
        and_mask_function=same_document,
        **{CACHE: cache},
    )
    if same_document is not None and (causal_mask is None or len(causal_mask.shape) != 4):
        raise ValueError(
            f"The attention implementation {config._attn_implementation!r} takes no mask that keeps "
            "documents apart: use eager, sdpa, flex or flash attention for `attention_within_documents`."
        )
    return causal_mask, {}


def _same_document_behind(segments_BS: torch.Tensor, before: int) -> Callable:
    """Whether a token may attend to another: to the tokens before all documents, and to its own document."""

    def same_document(batch: Any, head: Any, query: Any, key: Any) -> Any:
        own = segments_BS[batch, query - before] == segments_BS[batch, (key - before).clamp(min=0)]
        return own | (key < before)

    return same_document


def _flash_lengths(
    inputs: ForwardInputs, request: PoolRequest, segments_BS: torch.Tensor, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """What keeps documents apart in flash attention: the caller's own lengths, or those of the segments."""
    cache, mask = inputs.cache, inputs.attention_mask
    if cache is not None and cache.is_compileable:
        raise ValueError(
            "A static cache has room behind the documents, which flash attention would take for theirs: use "
            "a dynamic cache or none, or eager, sdpa or flex attention for `attention_within_documents`."
        )
    given = {name: kwargs.get(name) for name in _FLASH_LENGTHS}
    if mask is None and request.document_ids is None and all(value is not None for value in given.values()):
        return given
    if mask is None and cache is None:
        # As `create_causal_mask` does: positions that start again part documents too.
        again = segments_from_positions(inputs.position_ids)
        segments_BS = flatten_segments(segments_BS).view_as(segments_BS) + again
    cumulative, longest = lengths_from_segments(segments_BS, mask)
    return dict(zip(_FLASH_LENGTHS, (cumulative, cumulative, longest, longest), strict=True))
