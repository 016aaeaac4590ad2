"""What differs between the versions of Transformers that the network runs on; its other files need not know.

Transformers 5.24 calls `cache` what was `past_key_values` before, in every forward and every output. EMO
takes and gives both names on every version, and its own code says `past_key_values`.

Shape suffixes: B batch, S sequence, N kept positions, D hidden size.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import transformers
from packaging.version import parse
from transformers.cache_utils import Cache
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils import ModelOutput

_NAMES = ("past_key_values", "cache")
CACHE = "cache" if "cache" in {field.name for field in fields(MoeModelOutputWithPast)} else "past_key_values"
"""The name that this version of Transformers gives a cache."""
_OTHER = next(name for name in _NAMES if name != CACHE)


CUTS_BEHIND_CACHE = parse(transformers.__version__) >= parse("5.21")
"""Whether this version reads a prompt in chunks (`prefill_chunk_size`) where a cache holds its beginning.

Older ones feed the network the beginning once more, and their text is wrong.
"""


EP_ROUTER_PLAN = (
    {}
    if "ep_dispatch_experts" in ALL_PARALLEL_STYLES or not ALL_PARALLEL_STYLES
    else {"layers.*.mlp.gate": "ep_router", "layers.*.mlp.experts": "moe_tp_experts"}
)
"""What expert parallelism calls router and experts in versions that do not send tokens to them."""


def one_cache_name(kwargs: dict[str, Any], name: str = CACHE) -> dict[str, Any]:
    """Keyword arguments with their cache under one name.

    Args:
        kwargs (`dict[str, Any]`): with a cache under `cache`, `past_key_values`, both or neither.
        name (`str`): what to call it; by default as this version of Transformers does.

    Raises:
        ValueError: if there are two different caches.

    Example:

    ```python
    >>> from transformers import DynamicCache
    >>> from transformers_emo.modeling_emo.transformers_differences import one_cache_name
    >>> list(one_cache_name({"use_cache": True, "cache": DynamicCache()}, "past_key_values"))
    ['use_cache', 'past_key_values']

    ```
    """
    given = [key for key in _NAMES if key in kwargs and not _is_for_attention(key, kwargs[key])]
    if not given or given == [name]:
        return kwargs
    caches = [kwargs[key] for key in given if kwargs[key] is not None]
    if len(caches) == 2 and caches[0] is not caches[1]:
        raise ValueError(
            "`cache` and `past_key_values` are two names of one argument, and got two different caches: give "
            "only one."
        )
    rest = {key: value for key, value in kwargs.items() if key not in given}
    return rest | {name: caches[0] if caches else None}


def _is_for_attention(name: str, value: Any) -> bool:
    """Before the change of names, continuous batching hands its cache to the attention alone, as `cache`."""
    return name == _OTHER == "cache" and isinstance(value, PagedAttentionCache)


def takes_cache(forward: Callable) -> Callable:
    """Let a forward that has `past_key_values` be called with `cache` too.

    Its signature has the name of this version of Transformers, which reads signatures.

    Args:
        forward (`Callable`): a method with a parameter `past_key_values`.

    Example:

    ```python
    >>> from transformers import DynamicCache
    >>> from transformers_emo.modeling_emo.transformers_differences import takes_cache
    >>> class Model:
    ...     @takes_cache
    ...     def forward(self, past_key_values=None):
    ...         return past_key_values is not None
    >>> Model().forward(cache=DynamicCache()), Model().forward(past_key_values=DynamicCache())
    (True, True)

    ```
    """

    @wraps(forward)
    def wrapper(self, *args, **kwargs):
        return forward(self, *args, **one_cache_name(kwargs, "past_key_values"))

    signature = inspect.signature(forward)
    named = [p.replace(name=CACHE) if p.name in _NAMES else p for p in signature.parameters.values()]
    wrapper.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    return wrapper


def both_cache_names(forward: Callable) -> Callable:
    """A forward of Transformers' own that takes a cache by both names, and whose output has it under both.

    Args:
        forward (`Callable`): a method of a class of Transformers.

    Example: see `takes_cache`.
    """

    @wraps(forward)
    def wrapper(self, *args, **kwargs):
        return name_cache_twice(forward(self, *args, **one_cache_name(kwargs)))

    return wrapper


def name_cache_twice(output: Any) -> Any:
    """An output of Transformers' own, with its cache under both names, as attributes and as keys.

    Args:
        output: what a forward or `generate` returned; other things than a `ModelOutput` stay as they are.

    Example:

    ```python
    >>> from transformers import DynamicCache
    >>> from transformers.generation import GenerateDecoderOnlyOutput
    >>> from transformers_emo.modeling_emo.transformers_differences import CACHE, name_cache_twice
    >>> output = name_cache_twice(GenerateDecoderOnlyOutput(None, **{CACHE: DynamicCache()}))
    >>> output.cache is output.past_key_values
    True

    ```
    """
    if isinstance(output, ModelOutput) and hasattr(output, CACHE) and _OTHER not in dir(type(output)):
        output.__class__ = _with_both_names(type(output))
    return output


@functools.cache
def _with_both_names(kind: type) -> type:
    """The same class of outputs, with both names. What is pickled or copied is an output of Transformers'."""

    def reduce(output: Any) -> tuple:
        return name_cache_twice, (kind(**output),)

    return type(kind.__name__, (BothCacheNames, kind), {"__module__": kind.__module__, "__reduce__": reduce})


class BothCacheNames:
    """Base of an output whose cache is there as `cache` and as `past_key_values`; one of them is its field.

    Both are attributes and keys. Only the field counts among `keys()` and in `to_tuple()`.

    Example:

    ```python
    >>> from transformers import DynamicCache
    >>> from transformers_emo.modeling_emo.modeling_emo import EmoModelOutputWithPast
    >>> from transformers_emo.modeling_emo.transformers_differences import CACHE
    >>> output = EmoModelOutputWithPast(**{CACHE: DynamicCache()})
    >>> output.cache is output.past_key_values is output["cache"]
    True

    ```
    """

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(_field(key))  # type: ignore[misc]

    def __contains__(self, key: object) -> bool:
        return super().__contains__(_field(key))  # type: ignore[misc]

    def get(self, key: Any, default: Any = None) -> Any:
        """As of every output, by both names."""
        return super().get(_field(key), default)  # type: ignore[misc]


def _field(key: Any) -> Any:
    return CACHE if isinstance(key, str) and key == _OTHER else key


def _get_cache(output: Any) -> Any:
    return getattr(output, CACHE)


def _set_cache(output: Any, cache: Any) -> None:
    setattr(output, CACHE, cache)


setattr(BothCacheNames, _OTHER, property(_get_cache, _set_cache))


def refuse_unknown_caches(kwargs: dict[str, Any]) -> None:
    """See that no cache came by a name that nobody reads: generation would be wrong without an error.

    Args:
        kwargs (`dict[str, Any]`): what a forward got beside the arguments it knows.

    Raises:
        TypeError: if one did.

    Example:

    ```python
    >>> from transformers import DynamicCache
    >>> from transformers_emo.modeling_emo.transformers_differences import refuse_unknown_caches
    >>> try:
    ...     refuse_unknown_caches({"key_value_cache": DynamicCache()})
    ... except TypeError as error:
    ...     print(str(error)[:46])
    EMO got a cache by the name `key_value_cache`,

    ```
    """
    for name, value in kwargs.items():
        is_cache = isinstance(value, Cache | PagedAttentionCache)
        if is_cache and not _is_for_attention(name, value):
            raise TypeError(
                f"EMO got a cache by the name `{name}`, expected `cache` or `past_key_values`: it would not "
                "be read, and what is generated would be wrong. If Transformers calls it so, install a "
                "version that EMO is tested with."
            )


def check_peft() -> None:
    """See that the installed PEFT is one with which Transformers' own `model.add_adapter` works.

    PEFT's `get_peft_model` does not ask Transformers, and works with older ones; so does `load_adapter`.

    Raises:
        ImportError: if it is not.

    Example:

    ```python
    >>> from transformers_emo.modeling_emo.transformers_differences import check_peft
    >>> try:
    ...     check_peft()
    ... except ImportError as error:
    ...     assert "wants PEFT" in str(error)

    ```
    """
    try:
        found = version("peft")
    except PackageNotFoundError:
        return  # Transformers says so itself
    if parse(found) < parse(MIN_PEFT_VERSION):
        raise ImportError(
            f"`model.add_adapter` of Transformers {version('transformers')} wants PEFT {MIN_PEFT_VERSION}, "
            f"and this is {found}: `pip install 'peft>={MIN_PEFT_VERSION}'`. Where that is not to be had, "
            "`peft.get_peft_model(model, config)` works with this one."
        )


def update_cache(
    cache: Any, key: torch.Tensor, value: torch.Tensor, layer: int, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all tokens so far, those of this call put into the cache.

    Args:
        cache (`Cache` or `PagedAttentionCache`): the cache.
        key, value (`torch.Tensor`): (B, heads, S, head size) of the tokens of this call.
        layer (`int`): the number of the layer.
        kwargs (`dict[str, Any]`): what the attention is about to get. From 5.24 on the cache of continuous
            batching changes it.

    Example:

    ```python
    >>> import torch
    >>> from transformers import DynamicCache
    >>> from transformers_emo.modeling_emo.transformers_differences import update_cache
    >>> cache, key = DynamicCache(), torch.zeros(1, 2, 3, 4)
    >>> [update_cache(cache, key, key, 0, {})[0].shape[2] for _ in range(2)]
    [3, 6]

    ```
    """
    if CACHE == "cache":
        return cache.update(key, value, layer, kwargs=kwargs)
    return cache.update(key, value, layer)


def kept_positions(hidden_BSD: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The hidden states whose logits are wanted. (Transformers has this from 5.21 on.)

    Args:
        hidden_BSD (`torch.Tensor`): (B, S, D).
        logits_to_keep (`int` or `torch.Tensor`): the last so many positions, all of them with 0; these, (N,);
            or for each sequence its own, (B, N), or bool (B, S).

    Returns:
        `torch.Tensor`: (B, N, D); with a bool mask (N, D), for sequences may keep different numbers.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.transformers_differences import kept_positions
    >>> hidden = torch.arange(6.0).view(2, 3, 1)
    >>> kept_positions(hidden, 1).flatten().tolist()
    [2.0, 5.0]
    >>> kept_positions(hidden, torch.tensor([[0], [1]])).flatten().tolist()
    [0.0, 4.0]

    ```
    """
    if isinstance(logits_to_keep, int):
        return hidden_BSD[:, -logits_to_keep:] if logits_to_keep else hidden_BSD
    if logits_to_keep.dtype == torch.bool and logits_to_keep.dim() == 2:
        return hidden_BSD[logits_to_keep]
    if logits_to_keep.dim() == 2:
        return hidden_BSD.take_along_dim(logits_to_keep[..., None], dim=1)
    return hidden_BSD[:, logits_to_keep]
