"""Generation with some of the experts: a subset, all but some, or pools chosen from each prompt.

Shape suffixes: B sequences, S tokens of each in this call.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from transformers.generation import GenerationMixin
from transformers.utils import logging

from .in_use.routed_experts import ExpertRecord, GenerateWithExpertsOutput
from .pools.moving_pools import PoolMoves, pool_moves
from .pools.prompt_pool import PromptPool, cached_pools, pool_sizes, read_without_pools
from .transformers_differences import CACHE, CUTS_BEHIND_CACHE, name_cache_twice, one_cache_name

logger = logging.get_logger(__name__)


@dataclass
class _PoolRequest:
    """What the running `generate` asks of pools. `sizes` is `None` for no pools at all."""

    sizes: tuple[int, ...] | None
    prompt_length: int
    tokens_at_once: int | None = None
    moves: PoolMoves | None = None
    sets_moves: bool = False

    def model_inputs(self, inputs: dict[str, Any], attention_mask_BS: torch.Tensor | None) -> dict[str, Any]:
        """The arguments to add to the inputs of a forward."""
        if self.sizes is None:
            return {"document_pool": False}
        cache = inputs.get(CACHE)
        frozen = cached_pools(cache)
        if frozen is not None:
            if frozen.sizes != self.sizes:
                raise ValueError(
                    f"The cache has document pools of {list(frozen.sizes)} experts in its layers, and "
                    f"`document_pool` asks for {list(self.sizes)}: pools are chosen only once. Leave it out "
                    "to keep them, or begin with a new cache."
                )
            if self.sets_moves:
                frozen.moves = self.moves
            return {}
        if cache is not None and cache.get_seq_length() > 0:
            raise read_without_pools()
        tokens = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        batch, length = tokens.shape[:2]
        prompt_BS = torch.arange(length, device=tokens.device).expand(batch, -1) < self.prompt_length
        if attention_mask_BS is not None:
            prompt_BS = prompt_BS & attention_mask_BS[:, :length].to(tokens.device, torch.bool)
        pool = PromptPool(self.sizes, prompt_BS, self.tokens_at_once, self.moves)
        return {"prompt_pool": pool}


_PAGED = "Continuous batching gives sequences no cache of their own, which could keep their document pools"
# The request of the running `generate`. Each thread has its own, and so has a nested call (an assistant's).
_request: ContextVar[_PoolRequest | None] = ContextVar("pool_request", default=None)
# What notes the experts of the running `generate`.
_record: ContextVar[ExpertRecord | None] = ContextVar("expert_record", default=None)


class EmoGenerationMixin(GenerationMixin):
    """Transformers' generation, with a choice of the experts that a call may use.

    Example: see `EmoForCausalLM.generate`.
    """

    @contextmanager
    def _optimize_model_for_decode(self):
        # On a GPU the package's implementation runs Transformers' `grouped_mm`. Transformers replaces that
        # one while it decodes, so it must see it under its own name.
        model: Any = self
        ours = model.device.type != "cpu" and model.config._experts_implementation == model._cpu_experts
        if ours:
            model.set_experts_implementation("grouped_mm")
        try:
            with super()._optimize_model_for_decode():  # type: ignore[misc]
                yield
        finally:
            if ours:
                model.set_experts_implementation(model._cpu_experts)

    def generate(
        self,
        *args,
        expert_subset=None,
        exclude_experts=None,
        document_pool: int | bool | Sequence[int | None] | None = None,
        return_experts: bool = False,
        move_pool_every: int | None = None,
        move_pool_above: float | None = None,
        **kwargs,
    ):
        """Generate text, with all experts or some of them; see `GenerationMixin.generate`.

        With `document_pool=d` the domain need not be known: in every layer the prompt chooses the d routed
        experts with the largest router probability, summed over its tokens without padding. The prompt and
        the text after it use only those. Every sequence of a batch has its own pools. They are those that
        training would choose for the prompt as one document, even if there are EOS tokens in it.

        A cache of any kind (`past_key_values`, or `cache`) keeps its pools through beams, reordering and
        cropping. To continue a conversation, pass its cache with the same `document_pool` or none. A plain
        `model(ids, past_key_values=cache)` uses the pools too. The pools of a layer need the whole prompt in
        the layer before, so `prefill_chunk_size` does not cut the prompt then. It is the number of tokens
        that go through the experts of a layer at once, and the results stay the same.

        With `move_pool_every=n` the pools follow the text: every n tokens they are chosen again from what
        the router wanted of late, where a token counts half after n more. Tokens already read stay as they
        were. With `move_pool_above=s` too, only pools move outside of which the router puts more than the
        share s of its probability.

        Args:
            expert_subset (`ExpertSubset`, path, `dict` or list of lists, *optional*): route to these experts
                only, as `use_experts` does, for this call.
            exclude_experts (*optional*): never route to these experts, as in `use_experts`.
            document_pool (`int`, `bool` or `Sequence[int | None]`, *optional*): the number of routed experts
                in the pools, for all layers or for each: at least as many as a token picks, at most as many
                as there are. `True` takes `config.document_pool_eval`, or all routed experts if there are
                fewer. `False` switches pools off, even if the cache has some. With `expert_subset`, pools
                are chosen among its experts. By default `generation_config.document_pool` decides, if it is
                set, or else `emo run --document-pool`.
            return_experts (`bool`, defaults to `False`): say which experts each token took. The output then
                is that of `return_dict_in_generate=True`, and its `experts` are `RoutedExperts`. The prompt
                passes all experts of the last layer too, of which it otherwise needs only its last token. A
                `streamer` that has a method `put_experts` gets the experts of each forward: root ids (B, L,
                S, K) and weights, as tensors on the device.
            move_pool_every (`int`, *optional*): choose pools again after so many tokens; 0 for pools that
                stay. By default as in the cache, or never.
            move_pool_above (`float`, *optional*): move only pools outside of which the router puts more than
                this share of its probability; by default all.
            args, kwargs: as for every Transformers model.

        Returns:
            As `GenerationMixin.generate`; with `return_experts` a `GenerateWithExpertsOutput`.

        Raises:
            SubsetError: if the subset or the exclusion does not fit the model.
            ValueError: if a pool size is impossible; if the cache holds tokens read without pools, or pools
                of other sizes; or with continuous batching, `guidance_scale` or `token_healing`, which read
                other prompts than the given one or keep no pools; or if pools are to move and there are none.

        Example:

        ```python
        >>> import torch
        >>> from transformers_emo import EmoForCausalLM
        >>> model = EmoForCausalLM.from_pretrained("model_cards/toy-emo")
        >>> prompt = torch.tensor([[5, 6, 7]])
        >>> model.generate(prompt, expert_subset=[[0, 1, 2, 31]] * 4, max_new_tokens=4, do_sample=False).shape
        torch.Size([1, 7])
        >>> model.generate(prompt, exclude_experts={0: [3, 4]}, max_new_tokens=4, do_sample=False).shape
        torch.Size([1, 7])
        >>> out = model.generate(
        ...     prompt, document_pool=8, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
        ... )
        >>> more = torch.cat([out.sequences, torch.tensor([[8, 9]])], dim=1)  # with the same pools:
        >>> model.generate(more, past_key_values=out.past_key_values, max_new_tokens=4).shape
        torch.Size([1, 13])

        ```
        """
        model: Any = self
        kwargs = one_cache_name(kwargs)
        if return_experts:
            return self._generate_with_experts(
                args,
                kwargs,
                expert_subset=expert_subset,
                exclude_experts=exclude_experts,
                document_pool=document_pool,
                move_pool_every=move_pool_every,
                move_pool_above=move_pool_above,
            )
        request = None
        settings = kwargs.get("generation_config") or model.generation_config
        if document_pool is None:
            document_pool = getattr(settings, "document_pool", None)
        if document_pool is None:
            document_pool = model.base_model.default_document_pool
        moves = pool_moves(move_pool_every, move_pool_above)
        if move_pool_every is not None and not document_pool:
            document_pool = _sizes_in_cache(kwargs, document_pool, moves)
        if document_pool is not None:
            sizes = None if document_pool is False else pool_sizes(model.config, document_pool)
            if sizes is not None:
                _refuse_other_prompts(kwargs, model.generation_config)
            request = _PoolRequest(sizes, _prompt_length(args, kwargs), moves=moves)
            request.sets_moves = move_pool_every is not None
        if moves is not None:  # they count tokens, and a compiled step would be compiled anew for each number
            kwargs["disable_compile"] = True
        masked: Any = nullcontext()
        if expert_subset is not None or exclude_experts is not None:
            masked = model.use_experts(expert_subset, exclude_experts=exclude_experts)
        token = _request.set(request)
        try:
            with masked:
                return name_cache_twice(super().generate(*args, **kwargs))  # type: ignore[misc]
        finally:
            _request.reset(token)
            if model.expert_memory is not None:
                logger.info(str(model.expert_memory.report()))

    def _generate_with_experts(self, args: tuple, kwargs: dict[str, Any], **choice) -> Any:
        model: Any = self
        settings = next(filter(None, (*args[1:2], kwargs.get("generation_config"))), model.generation_config)

        def said(name: str) -> Any:  # what is not set in one place is taken from the next
            value = _said(kwargs, settings, name)
            return getattr(model.generation_config, name, None) if value is None else value

        _refuse_other_orders(said)
        if all(layer.is_dense for layer in model.config.layer_experts):
            raise ValueError("`return_experts` is set, and every layer of this model is dense: leave it out.")
        cache = kwargs.get(CACHE)
        num_cached = 0 if cache is None else int(cache.get_seq_length())
        record = ExpertRecord(model.config, getattr(kwargs.get("streamer"), "put_experts", None))
        token = _record.set(record)
        try:
            output = self.generate(*args, **kwargs | choice | {"return_dict_in_generate": True})
        finally:
            _record.reset(token)
        record.end_forward()
        ends, pad = said("eos_token_id"), said("pad_token_id")
        ends = [] if ends is None else torch.as_tensor(ends).flatten().tolist()
        experts = record.experts(
            output.sequences[:, _ids_length(args, kwargs) :],
            _prompt_length(args, kwargs),
            num_cached=num_cached,
            ends=ends,
            pad=ends[0] if pad is None and ends else pad,
        )
        return name_cache_twice(GenerateWithExpertsOutput(**output, experts=experts))

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):  # type: ignore[override]  # noqa: D102
        kwargs = one_cache_name(kwargs)
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
        request = _request.get()
        if inputs.get(CACHE) is None:
            # In training mode without a cache this looks like a step of training.
            inputs.setdefault("training_step", False)
        if request is not None:
            # Only this mask shows padding. With a static cache, the one in the inputs is 4-D.
            inputs |= request.model_inputs(inputs, kwargs.get("attention_mask"))
        record = _record.get()
        if record is not None:
            if inputs.get(CACHE) is None:  # every forward reads all tokens
                record.forget()
            record.end_forward()
            tokens = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
            record.begin_forward(tokens.shape[0], kwargs.get("attention_mask"))
            inputs["expert_record"] = record
        return inputs

    @wraps(GenerationMixin._update_model_kwargs_for_generation)
    def _update_model_kwargs_for_generation(self, *args, **kwargs):  # type: ignore[override]
        if (record := _record.get()) is not None:
            record.end_forward()
        return super()._update_model_kwargs_for_generation(*args, **kwargs)  # type: ignore[misc]

    def init_continuous_batching(self, generation_config=None, *args, **kwargs):
        """As in Transformers, but refuses document pools, which continuous batching cannot keep.

        Args:
            generation_config (`GenerationConfig`, *optional*): by default the model's.
            args, kwargs: as for every Transformers model.

        Raises:
            ValueError: if `generation_config.document_pool` asks for pools.

        Example: see `GenerationMixin.generate_batch`.
        """
        model: Any = self
        settings, request = generation_config or model.generation_config, _request.get()
        if request is None and getattr(settings, "document_pool", None):
            raise ValueError(f"{_PAGED}: set `generation_config.document_pool = None`, or use `generate`.")
        if request is None and model.base_model.default_document_pool is not None:
            raise ValueError(f"{_PAGED}: leave out `--document-pool` of `emo run`, or use `generate`.")
        return super().init_continuous_batching(generation_config, *args, **kwargs)  # type: ignore[misc]

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        request, cache = _request.get(), model_kwargs.get(CACHE)
        chunk_size = generation_config.prefill_chunk_size
        is_chosen = cache is None or cached_pools(cache) is not None
        whole = request is not None and request.sizes is not None and not is_chosen
        goes_on = cache is not None and cache.get_seq_length() > 0 and not CUTS_BEHIND_CACHE
        if chunk_size is None or not (whole or goes_on):
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        if request is not None and whole:
            request.tokens_at_once = chunk_size
        generation_config.prefill_chunk_size = None
        try:
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        finally:
            generation_config.prefill_chunk_size = chunk_size


def _prompt_length(args: tuple, kwargs: dict[str, Any]) -> int:
    """The number of tokens of the prompt with its padding. Without a prompt it is one, the BOS token."""
    given = [kwargs.get("inputs_embeds"), *args[:1], kwargs.get("inputs"), kwargs.get("input_ids")]
    return next((prompt.shape[1] for prompt in given if prompt is not None), 1)


def _ids_length(args: tuple, kwargs: dict[str, Any]) -> int:
    """How many tokens at the beginning of the output were given: embeddings are not among them."""
    given = [*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")]
    found = next((prompt.shape[1] for prompt in given if prompt is not None), None)
    return (1 if kwargs.get("inputs_embeds") is None else 0) if found is None else found


def _said(kwargs: dict[str, Any], settings: Any, name: str) -> Any:
    """A setting of generation: the argument, or what the config says."""
    return getattr(settings, name, None) if kwargs.get(name) is None else kwargs[name]


def _refuse_other_orders(said: Callable[[str], Any]) -> None:
    """Refuse ways of generating that read tokens which are dropped, or exchange beginnings of sequences."""
    for name, is_refused in (
        ("num_beams", lambda value: value > 1),
        ("assistant_model", bool),
        ("prompt_lookup_num_tokens", bool),
        ("assistant_early_exit", bool),
        ("custom_generate", bool),
        ("cache_implementation", lambda value: "paged" in value),
    ):
        value = said(name)
        if value is not None and is_refused(value):
            shown = type(value).__name__ if name in ("assistant_model", "custom_generate") else value
            raise ValueError(
                f"`return_experts` follows one token after the other, and `{name}={shown}` reads tokens that "
                "it drops, or in another order: leave out one of the two."
            )


def _sizes_in_cache(
    kwargs: dict[str, Any], document_pool: Any, moves: PoolMoves | None
) -> list[int | None] | Any:
    """The sizes of the pools in the cache, for a call that says how they move and not how large they are."""
    pools = None if document_pool is False else cached_pools(kwargs.get(CACHE))
    if pools is not None:
        return list(pools.sizes)
    if moves is not None:
        raise ValueError(
            "`move_pool_every` is for document pools, and this call has none: give their size as "
            "`document_pool`, such as 32."
        )
    return document_pool


def _refuse_other_prompts(kwargs: dict[str, Any], generation_config: Any) -> None:
    """Refuse settings by which generation would read another prompt than the given one."""
    settings = kwargs.get("generation_config") or generation_config

    def said(name: str) -> Any:
        return _said(kwargs, settings, name)

    if "paged" in (said("cache_implementation") or ""):
        raise ValueError(
            f"{_PAGED}: use another `cache_implementation` than {said('cache_implementation')!r}."
        )
    if said("guidance_scale") not in (None, 1):
        raise ValueError(
            f"`guidance_scale={said('guidance_scale')}` reads a second prompt, which chooses no document "
            "pools: leave out `guidance_scale` or `document_pool`."
        )
    if said("token_healing"):
        raise ValueError(
            "`token_healing` rewrites the prompt, which must choose the document pools: call "
            "`model.heal_tokens` on it first, or leave out `token_healing` or `document_pool`."
        )
