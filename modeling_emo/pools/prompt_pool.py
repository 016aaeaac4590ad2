"""Document pools of generation: each prompt chooses its pools while it is read, and then they are frozen.

A pool is chosen as in training (`pool_mask`; paper section 3, https://arxiv.org/abs/2605.06663), with the
whole prompt as one document. It also holds for every token after the prompt. The frozen pools lie in the
cache, as one more layer of it. So what reorders, repeats or picks sequences of the cache does the same to the
pools, and a conversation that continues with the cache keeps its pools.

Pools that follow the text (`moving_pools`) are frozen only until they are chosen again.

Shape suffixes: B sequences, S tokens of each in this call, T = B * S tokens, R routed experts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache
from transformers.utils import logging

from ...configuration.configuration_emo import EmoConfig
from .cache_layer import FrozenPools
from .document_pool import DocumentPools, pool_mask
from .moving_pools import PoolMoves

logger = logging.get_logger(__name__)


class PromptPool(NamedTuple):
    """What a forward needs in order to choose pools from the prompt.

    Args:
        sizes (`tuple[int, ...]`): routed experts in the pool, for each layer.
        prompt_BS (`torch.Tensor`): bool, true for the tokens that choose the pools: those of the prompt
            without its padding.
        tokens_at_once (`int`, *optional*): how many tokens of a sequence go through the experts of a layer
            at a time.
        moves (`PoolMoves`, *optional*): when the pools are chosen again; by default never.

    Example: see `frozen_pools`.
    """

    sizes: tuple[int, ...]
    prompt_BS: torch.Tensor
    tokens_at_once: int | None = None
    moves: PoolMoves | None = None


class FrozenPool:
    """One layer of `FrozenPools` in one forward, for the router.

    Args:
        pools (`FrozenPools`): of all layers.
        index (`int`): the layer.
        shape (`tuple[int, int]`): (B, S) of the forward.
        prompt (`PromptPool`, *optional*): what a pool not chosen yet is chosen from.
        mask_BS (`torch.Tensor`, *optional*): false for padding among the tokens of this forward.

    Attributes:
        memory (`ExpertSlots`, *optional*): set it to be told which experts come into a pool that moves.

    Example: see `frozen_pools`.
    """

    memory: Any = None

    def __init__(
        self,
        pools: FrozenPools,
        index: int,
        shape: tuple[int, int],
        prompt: PromptPool | None,
        mask_BS: torch.Tensor | None = None,
    ):
        self.pools = pools
        self.index = index
        self.shape = shape
        self.prompt = prompt
        self.mask_BS = mask_BS

    @property
    def tokens_at_once(self) -> int | None:
        """How many tokens, of all sequences together, go through the experts at a time."""
        if self.prompt is None or self.prompt.tokens_at_once is None:
            return None
        return self.prompt.tokens_at_once * self.shape[0]

    def restrict(self, logits_TR: torch.Tensor) -> torch.Tensor:
        """Put minus infinity outside the pools: router logits (T, R) float32, before and after."""
        outside_BR = self.pools.outside[self.index]
        if outside_BR is None:
            outside_BR = self.pools.outside[self.index] = self._choose(logits_TR)
        elif self.pools.moves is not None:
            probs_BSR = logits_TR.softmax(-1).unflatten(0, self.shape)
            outside_BR = self.pools.follow(self.index, probs_BSR, self.mask_BS, self.memory)
        batch, num_routed = outside_BR.shape
        if num_routed != logits_TR.shape[1]:
            raise _other_pools(f"{num_routed} routed experts", f"{logits_TR.shape[1]}")
        if batch == len(logits_TR):
            return logits_TR.masked_fill(outside_BR, float("-inf"))
        logits_BSR = logits_TR.unflatten(0, self.shape)
        return logits_BSR.masked_fill(outside_BR[:, None], float("-inf")).flatten(0, 1)

    def _choose(self, logits_TR: torch.Tensor) -> torch.Tensor:
        assert self.prompt is not None  # `frozen_pools` gives it where no pool is chosen yet
        batch, length = self.shape
        if self.pools.moves is not None:
            counts_BS = self.prompt.prompt_BS.to(logits_TR.device).float()
            probs_BSR = logits_TR.softmax(-1).unflatten(0, self.shape)
            sums_BR = torch.einsum("bs,bsr->br", counts_BS, probs_BSR)
            self.pools.shares[self.index] = sums_BR / counts_BS.sum(1, keepdim=True).clamp(min=1)
        sequence_B = torch.arange(batch, device=logits_TR.device)
        size_B = torch.full_like(sequence_B, self.pools.sizes[self.index])
        mask_TR = pool_mask(
            logits_TR,
            sequence_B.repeat_interleave(length),
            size_B,
            self.prompt.prompt_BS.flatten().to(logits_TR.device),
        )
        return ~mask_TR.unflatten(0, self.shape)[:, 0]


# What a router accepts: documents, for which it chooses pools, or pools that a prompt has chosen.
Pools = DocumentPools | FrozenPool


def cached_pools(cache: Any) -> FrozenPools | None:
    """The frozen pools in a cache, if there are any.

    Args:
        cache (`Cache`, *optional*): keys and values of the earlier tokens.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoForCausalLM
    >>> from transformers_emo.modeling_emo.pools.prompt_pool import cached_pools
    >>> model = EmoForCausalLM.from_pretrained("model_cards/toy-emo")
    >>> out = model.generate(
    ...     torch.tensor([[5, 6, 7]]), document_pool=8, max_new_tokens=2, return_dict_in_generate=True
    ... )
    >>> (~cached_pools(out.past_key_values).outside[0]).sum()
    tensor(8)

    ```
    """
    layers: Sequence[Any] = cache.layers if isinstance(cache, Cache) else ()
    if len(layers) > 0 and isinstance(layers[-1], FrozenPools) and layers[-1].is_chosen:
        return layers[-1]
    return None


def frozen_pools(
    cache: Any,
    prompt: PromptPool | None,
    config: EmoConfig,
    shape: tuple[int, int],
    masks: list[torch.Tensor | None] | None = None,
    attention_mask: torch.Tensor | None = None,
) -> list[FrozenPool] | None:
    """The pools of a forward for each layer: those in the cache, or new ones to be chosen from the prompt.

    Args:
        cache (`Cache`, *optional*): keys and values of the earlier tokens, perhaps with pools.
        prompt (`PromptPool`, *optional*): the prompt that chooses pools if the cache has none.
        config (`EmoConfig`): the model's config.
        shape (`tuple[int, int]`): (B, S) of the forward.
        masks (`list[torch.Tensor | None]`, *optional*): for each layer the experts (E,) that may be used.
        attention_mask (`torch.Tensor`, *optional*): 0 for padding, of the tokens in the cache too.

    Returns:
        `list[FrozenPool]`, *optional*: one for each layer; `None` if there are neither pools nor a prompt.

    Raises:
        ValueError: if the pools in the cache are of other sequences, of another model or of experts that were
            swapped, or no expert of a pool may be used.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.modeling_emo.pools.prompt_pool import PromptPool, frozen_pools
    >>> prompt = PromptPool((1,), torch.tensor([[True, True, False]]))
    >>> [pool] = frozen_pools(None, prompt, EmoConfig(num_hidden_layers=1), (1, 3))
    >>> pool.restrict(torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 9.0]]))
    tensor([[2., -inf],
            [0., -inf],
            [0., -inf]])

    ```
    """
    pools = cached_pools(cache)
    if pools is None:
        if prompt is None:
            return None
        pools = FrozenPools(prompt.sizes, config.retained_experts, prompt.moves)
    elif not torch.compiler.is_compiling():  # `generate` compiles only the steps after the prompt
        if pools.experts != config.retained_experts:
            raise ValueError(
                "The document pools in the cache are of other experts than the model holds: the experts were "
                "swapped, or the cache is of another model. Begin with a new cache."
            )
        if masks is not None:
            pools.check_masks(masks)
    # This runs for every token, and `config.layer_experts` costs as much as applying the masks of several
    # layers. So `restrict` checks the number of routed experts, which it has at hand.
    batch = next((len(outside) for outside in pools.outside if outside is not None), shape[0])
    if batch != shape[0] or len(pools.sizes) != config.num_hidden_layers:
        raise _other_pools(f"{len(pools.sizes)} layers and {batch} sequences", f"{shape[0]} sequences")
    mask_BS = None
    if pools.moves is not None and attention_mask is not None and attention_mask.dim() == 2:
        mask_BS = attention_mask[:, -shape[1] :].bool()
    return [FrozenPool(pools, index, shape, prompt, mask_BS) for index in range(len(pools.sizes))]


def row_pools(
    config: EmoConfig, size: int, cache: Any, tokens_BSD: torch.Tensor, attention_mask_BS: torch.Tensor | None
) -> PromptPool | None:
    """Pools of a forward outside `generate`. Each row is one document, like a prompt of `generate`.

    Args:
        config (`EmoConfig`): the model's config.
        size (`int`): routed experts in each pool.
        cache (`Cache`, *optional*): keys and values of the earlier tokens.
        tokens_BSD (`torch.Tensor`): the embedded tokens of the forward.
        attention_mask_BS (`torch.Tensor`, *optional*): 0 for padding, which chooses nothing.

    Returns:
        `PromptPool`, *optional*: `None` if the cache has pools. Those are used then.

    Raises:
        ValueError: if the size is impossible, padding cannot be told from text, or the tokens in the cache
            were read without pools.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.modeling_emo.pools.prompt_pool import row_pools
    >>> row_pools(EmoConfig(num_hidden_layers=1), 8, None, torch.zeros(1, 3, 2), None).prompt_BS
    tensor([[True, True, True]])

    ```
    """
    if cached_pools(cache) is not None:
        return None
    if cache is not None and cache.get_seq_length() > 0:
        raise read_without_pools()
    batch, length = tokens_BSD.shape[:2]
    if attention_mask_BS is None or attention_mask_BS.dim() != 2:
        if batch > 1:
            raise ValueError(
                f"Document pools of {batch} rows without a 2-D `attention_mask`: padding must not choose "
                "experts, and cannot be told from text. Give the mask, or one row at a time (`lm_eval "
                "--batch_size 1`)."
            )
        prompt_BS = torch.ones(batch, length, dtype=torch.bool, device=tokens_BSD.device)
    else:
        prompt_BS = attention_mask_BS[:, :length].to(tokens_BSD.device, torch.bool)
    return PromptPool(pool_sizes(config, size), prompt_BS)


def read_without_pools() -> ValueError:
    """The error for a cache whose tokens had no pools.

    Example:

    ```python
    >>> from transformers_emo.modeling_emo.pools.prompt_pool import read_without_pools
    >>> str(read_without_pools())[:60]
    'The tokens in the cache were read without document pools, wh'

    ```
    """
    return ValueError(
        "The tokens in the cache were read without document pools, which need the whole prompt: begin with a "
        "new cache, or give `document_pool` from the first call on."
    )


def _other_pools(found: str, expected: str) -> ValueError:
    return ValueError(
        f"The cache has document pools of {found}, expected {expected}: it is the cache of other prompts or "
        "of another model. Give the right one, or begin with a new cache."
    )


def keep_pools(cache: Any, pools: Sequence[FrozenPool] | None) -> None:
    """Put the pools that a forward has chosen into its cache, after the layers that attention uses.

    Args:
        cache (`Cache`, *optional*): the cache, with all of its layers.
        pools (`Sequence[FrozenPool]`, *optional*): from `frozen_pools`.

    Example:

    ```python
    >>> from transformers import DynamicCache
    >>> from transformers_emo.modeling_emo.pools.prompt_pool import keep_pools
    >>> keep_pools(DynamicCache(), None)

    ```
    """
    if pools is None or not isinstance(cache, Cache):
        return
    layers: list[Any] = cache.layers
    if isinstance(layers[-1], FrozenPools):
        layers[-1] = pools[0].pools
    else:
        layers.append(pools[0].pools)


def pool_sizes(config: EmoConfig, document_pool: int | bool | Sequence[int | None]) -> tuple[int, ...]:
    """The size of the pool in every layer, from the argument `document_pool` of `generate`.

    Args:
        config (`EmoConfig`): the model's config.
        document_pool (`int`, `bool` or `Sequence[int | None]`): one size for all layers, or one for each
            layer (any value for a dense one). `True` takes `config.document_pool_eval`; if no layer has so
            many experts, pools hold all of them, with a warning.

    Raises:
        ValueError: if a size is smaller than the number of routed experts that a token picks, larger than
            that of the layer or no integer; if the config has none for `True`; or if the model has
            always-active experts, for which pools are not defined.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.modeling_emo.pools.prompt_pool import pool_sizes
    >>> pool_sizes(EmoConfig(num_hidden_layers=2), [32, 64])
    (32, 64)

    ```
    """
    layers = config.layer_experts
    most = max((layer.num_routed for layer in layers if not layer.is_dense), default=0)
    if document_pool is True:
        if config.document_pool_eval is None:
            raise ValueError(
                "`document_pool=True` needs `config.document_pool_eval`: set it, or give the size."
            )
        document_pool = config.document_pool_eval
        # A subset's config keeps the size of the full model.
        if most and document_pool > most:
            logger.warning_once(
                f"`config.document_pool_eval` is {document_pool}, and no layer has more than {most} routed "
                "experts: every pool holds all of them, as if there were no pools. For smaller pools give "
                "their size as `document_pool`, or set it in the config."
            )
            document_pool = most
    is_list = isinstance(document_pool, Sequence) and not isinstance(document_pool, str)
    sizes: list[Any] = list(document_pool) if is_list else [document_pool] * len(layers)  # type: ignore
    if len(sizes) != len(layers):
        raise ValueError(
            f"`document_pool` has {len(sizes)} sizes, expected one for each of {len(layers)} layers: give "
            "so many, or one number for all."
        )
    for index, (size, layer) in enumerate(zip(sizes, layers, strict=True)):
        if layer.is_dense:
            sizes[index] = 0
            continue
        if layer.always_active:
            raise ValueError(
                f"Document pools are not defined with always-active experts, which layer {index} has: leave "
                "`document_pool` out."
            )
        # One size for all may exceed the number of experts of some layers: it restricts only the others.
        picked, largest = layer.top_k - layer.num_shared, layer.num_routed if is_list else most
        if not isinstance(size, int) or isinstance(size, bool) or not picked <= size <= largest:
            raise ValueError(
                f"`document_pool` is {size!r} in layer {index}, expected an integer from {picked}, the "
                f"routed experts that a token picks, to {largest}, all routed experts: give such a number."
            )
    return tuple(sizes)
