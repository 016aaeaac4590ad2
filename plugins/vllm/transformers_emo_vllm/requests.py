"""What a request says of experts: `"vllm_xargs": {"expert_subset": "coq"}` and the like.

vLLM hands `vllm_xargs` on as `SamplingParams.extra_args`. It is looked at twice. In the process that takes
requests, `RequestExperts.validate_params` turns names into experts; what it refuses becomes HTTP 400. In the
process that computes, `RequestExperts` is told which request enters which row of the batch, and puts the
experts into `Rows`.
"""

from __future__ import annotations

import difflib
import sys
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from .architecture import Layer, layers_of
from .choice import ExpertChoiceError, Held, Subset, excluded, no_subset, without
from .routing import Row, rows_of

KEYS = ("expert_subset", "exclude_experts", "document_pool")
"""What a request may say."""
RESOLVED = "emo_experts"
"""What `validate_params` adds: for each layer the experts as a hexadecimal number, and the size of the
pool."""

_SERVERS: list[weakref.ref] = []


def remember_server(vllm_config: Any) -> None:
    """Note that this process takes requests for an EMO.

    Args:
        vllm_config (`VllmConfig`): the server's settings; the model's config in them has `emo_serving`.
    """
    _SERVERS[:] = [known for known in _SERVERS if known() is not None and known() is not vllm_config]
    _SERVERS.append(weakref.ref(vllm_config))
    refuse_beam_search()


def _servers() -> list[Any]:
    """The configs of the models that this process takes requests for, the latest last; equal ones once."""
    live = [vllm_config for known in _SERVERS if (vllm_config := known()) is not None]
    distinct: list[Any] = []
    for config in (vllm_config.model_config.hf_config for vllm_config in live):
        same = [
            o for o in distinct if o.emo_serving == config.emo_serving and layers_of(o) == layers_of(config)
        ]
        distinct = [other for other in distinct if other not in same] + [config]
    return distinct


def resolve(extra_args: Mapping[str, Any] | None, config: Any) -> dict[str, Any] | None:
    """What a request may use, as the network takes it.

    Args:
        extra_args (`Mapping[str, Any]`, *optional*): the request's `vllm_xargs`.
        config: the model's config, with `emo_serving`.

    Returns:
        `dict[str, Any]`, *optional*: under "masks" a hexadecimal number for each layer, whose bit e says
        whether expert e may be taken, or `None` for all; under "pool" the size of the pool, or `None`. `None`
        for a request that says nothing of experts.

    Raises:
        ExpertChoiceError: if the request asks for what does not exist, does not fit, or cannot be had here.

    Example:

    ```python
    >>> from transformers_emo_vllm.config import EmoConfig
    >>> from transformers_emo_vllm.requests import resolve
    >>> config = EmoConfig(num_hidden_layers=1, num_experts=4, num_experts_per_tok=2, num_shared_experts=1)
    >>> config.emo_serving = {"refused": [], "pools_refused": [], "subsets": {"math": [[1, 3]]}, "damaged":
    ...     {}}
    >>> resolve({"expert_subset": "math"}, config)
    {'masks': ['a'], 'pool': None}

    ```
    """
    said = {key: value for key, value in (extra_args or {}).items() if key in KEYS and value is not None}
    for key in extra_args or {}:
        near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.8)
        if near and key not in KEYS:
            raise ExpertChoiceError(f"There is no `{key}` in `vllm_xargs`: is `{near[0]}` meant?")
    if not said:
        return None
    serving = config.emo_serving
    if serving["refused"]:
        raise ExpertChoiceError(
            f"This server cannot give a request experts of its own (`{', '.join(said)}`): "
            f"{'; '.join(serving['refused'])}."
        )
    held = Held.of(config)
    kept: Any = [
        None if layer.is_dense else ids for layer, ids in zip(held.layers, held.present, strict=True)
    ]
    name = said.get("expert_subset")
    if name is not None:
        kept = _by_name(name, serving)
    if "exclude_experts" in said:
        never = excluded(said["exclude_experts"], held, lambda name: Subset(tuple(_by_name(name, serving))))
        kept = without(kept, never, held)
    pool = said.get("document_pool")
    if pool is not None:
        check_pool(pool, held.layers, serving)
    masks = None
    if name is not None or "exclude_experts" in said:
        masks = [_bits(ids, present) for ids, present in zip(kept, held.present, strict=True)]
    return {"masks": masks, "pool": pool}


def _by_name(name: Any, serving: Mapping[str, Any]) -> list[tuple[int, ...] | None]:
    if isinstance(name, str):
        name = name.removesuffix(".json")
        if name in serving["damaged"]:
            raise ExpertChoiceError(serving["damaged"][name])
        if name in serving["subsets"]:
            return [None if ids is None else tuple(ids) for ids in serving["subsets"][name]]
    raise no_subset(name, list(serving["subsets"]))


def check_pool(pool: Any, layers: tuple[Layer, ...], serving: Mapping[str, Any]) -> None:
    """Check that pools of a size can be had.

    Args:
        pool: routed experts in the pool, what a request gave.
        layers (`tuple[Layer, ...]`): of the model.
        serving (`Mapping[str, Any]`): the config's `emo_serving`.

    Raises:
        ExpertChoiceError: if they cannot.

    Example:

    ```python
    >>> from transformers_emo_vllm.architecture import Layer
    >>> from transformers_emo_vllm.requests import check_pool
    >>> check_pool(4, (Layer(num_experts=16, num_shared=1, always_active=(), top_k=4),), {"pools_refused":
    ...     []})

    ```
    """
    if serving["pools_refused"]:
        raise ExpertChoiceError(f"This server has no document pools: {'; '.join(serving['pools_refused'])}.")
    least = max((layer.num_picked for layer in layers if not layer.is_dense), default=1)
    most = max((layer.num_routed for layer in layers if not layer.is_dense), default=0)
    if isinstance(pool, float) and pool.is_integer():
        pool = int(pool)
    if isinstance(pool, bool) or not isinstance(pool, int) or not least <= pool <= most:
        raise ExpertChoiceError(
            f"`document_pool` is {str(pool)[:40]!r}, expected an integer from {least}, the routed experts "
            f"that a token takes, to {most}, those that there are."
        )


def _bits(ids: Any, present: tuple[int, ...]) -> str:
    """Experts of a layer as a hexadecimal number, bit e for expert e of the model."""
    kept = set(ids or ())
    return f"{sum(1 << e for e, root in enumerate(present) if root in kept):x}"


def row_of(extra_args: Mapping[str, Any] | None, layers: list[Layer], prompt_length: int) -> Row | None:
    """What a request may use, from what `validate_params` added to it.

    Args:
        extra_args (`Mapping[str, Any]`, *optional*): the request's.
        layers (`list[Layer]`): of the model.
        prompt_length (`int`): tokens of its prompt.

    Raises:
        RuntimeError: if the request was not looked at by `validate_params`.

    Example:

    ```python
    >>> from transformers_emo_vllm.architecture import Layer
    >>> from transformers_emo_vllm.requests import row_of
    >>> row = row_of({"emo_experts": {"masks": ["a"], "pool": None}}, [Layer(4, 1, (), 2)], 5)
    >>> row.allowed
    [tensor([False,  True, False,  True])]

    ```
    """
    extra_args = extra_args or {}
    resolved = extra_args.get(RESOLVED)
    if resolved is None:
        if any(extra_args.get(key) is not None for key in KEYS):
            raise RuntimeError(
                "A request's choice of experts reached the engine unchecked: this vLLM skips the check."
            )
        return None
    masks = resolved["masks"]
    allowed = None
    if masks is not None:
        allowed = [
            None
            if layer.is_dense
            else torch.tensor([bool(int(bits, 16) >> e & 1) for e in range(layer.num_experts)])
            for layer, bits in zip(layers, masks, strict=True)
        ]
    pool = resolved["pool"]
    return Row(allowed, None if pool is None else int(pool), prompt_length)


def _interfaces() -> tuple[type, ...]:
    """vLLM's two interfaces of this hook.

    The class is found under one name by both runners, and the newer one refuses to start, for any model, if
    it is not of its own interface.
    """
    from vllm.v1.sample.logits_processor.interface import LogitsProcessor

    try:
        from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as OfRunnerV2
    except ImportError:
        return (LogitsProcessor,)
    return LogitsProcessor, OfRunnerV2


class RequestExperts(*_interfaces()):  # type: ignore[misc]
    """Hears which request is in which row of the batch. It leaves logits as they are.

    Args:
        vllm_config (`VllmConfig`): the server's settings.
        device: where logits are; for Runner V2 its state, which is not used.
        is_pin_memory (`bool`): not used.
    """

    def __init__(self, vllm_config: Any, device: Any = None, is_pin_memory: bool = False):
        config = vllm_config.model_config.hf_config
        is_emo = getattr(config, "emo_serving", None) is not None
        self.rows = rows_of(vllm_config, device) if is_emo and isinstance(device, torch.device) else None
        self.layers = layers_of(config) if is_emo else []

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Turn a request's names into experts. What cannot be had is a `ValueError`: HTTP 400."""
        servers = _servers()
        if not servers:  # another model's server
            return
        extra_args = sampling_params.extra_args
        if len(servers) > 1 and any((extra_args or {}).get(key) is not None for key in KEYS):
            raise ExpertChoiceError(
                "This process serves several EMO models: their requests cannot be told apart."
            )
        resolved = resolve(extra_args, servers[-1])
        if resolved is not None:
            sampling_params.extra_args = {**extra_args, RESOLVED: resolved}
        elif extra_args:
            extra_args.pop(RESOLVED, None)

    def is_argmax_invariant(self) -> bool:
        """Whether the most probable token stays the same: logits are not changed."""
        return True

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """The logits, as they are."""
        return logits

    def update_state(self, batch_update: Any) -> None:
        """Take in which requests left the batch, came, and moved."""
        if batch_update is None or self.rows is None:
            return
        for index in batch_update.removed:
            self.rows.put(index, None)
        for index, params, prompt, _ in batch_update.added:
            self.rows.put(index, row_of(params.extra_args, self.layers, len(prompt or ())))
        for source, target, direction in batch_update.moved:
            self.rows.move(source, target, swap=direction.name == "SWAP")

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Runner V2 tells of a request. A choice of experts was refused when the request came."""
        if self.layers:
            row_of(sampling_params.extra_args, self.layers, 0)
        return False


def refuse_beam_search() -> None:
    """Have beam search refuse what it would leave out.

    vLLM makes the requests of its beams anew, without `vllm_xargs`: they would use every expert. Only its
    HTTP interface can ask for both, in processes that have imported it.
    """
    for kind in ("completion", "chat_completion"):
        module = sys.modules.get(f"vllm.entrypoints.openai.{kind}.protocol")
        for name in ("CompletionRequest", "ChatCompletionRequest"):
            request = getattr(module, name, None)
            original = getattr(request, "to_beam_search_params", None)
            if request is None or original is None or hasattr(original, "emo_original"):
                continue

            def checked(self: Any, *args: Any, _original: Any = original, **kwargs: Any) -> Any:
                asked = [key for key in self.vllm_xargs or {} if key in KEYS]
                if asked and _servers():
                    raise ExpertChoiceError(
                        f"vLLM's beam search leaves out `{asked[0]}`: ask without beam search."
                    )
                return _original(self, *args, **kwargs)

            checked.emo_original = original  # type: ignore[attr-defined]
            request.to_beam_search_params = checked
