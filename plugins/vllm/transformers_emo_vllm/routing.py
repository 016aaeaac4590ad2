"""The router: which experts a token takes, and what each request of a batch may use.

vLLM runs the tokens of all requests as one batch. `Rows` knows which request is in which row of it, and what
it may use; `RequestExperts` in `requests.py` tells it. Before each forward, `Rows.prepare` writes for each
token the row it belongs to into a buffer. The network looks up the row's mask there, which compiles as any
other lookup.

Shape suffixes: T tokens of the batch, E experts of a layer, R its routed ones, K experts that a token takes,
N rows.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from .architecture import Layer

_FRACTION = 2.0**40  # probabilities are summed in fixed point: the sum does not depend on the order


def route(
    logits_TE: torch.Tensor, layer: Layer, normalise: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts that each token takes, and their weights.

    Args:
        logits_TE (`torch.Tensor`): (T, E); minus infinity for experts that must not be taken.
        layer (`Layer`): the layer's experts.
        normalise (`bool`): the config's `norm_topk_prob`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: weights (T, K), float32, and ids (T, K), int32.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo_vllm.architecture import Layer
    >>> from transformers_emo_vllm.routing import route
    >>> route(torch.tensor([[0.0, 0.0, 5.0]]), Layer(num_experts=3, num_shared=1, always_active=(), top_k=3))
    (tensor([[0.5000, 0.5000, 1.0000]]), tensor([[0, 1, 2]], dtype=torch.int32))

    ```
    """
    logits_TE = logits_TE.float()
    if layer.always_active:
        probs_TE = F.softmax(logits_TE, dim=-1)
        always_TA = _ids(layer.always_active, logits_TE)
        others_TE = probs_TE.scatter(-1, always_TA, -1.0)  # below every probability: not picked a second time
        picked_T = others_TE.topk(layer.top_k - len(layer.always_active), dim=-1).indices
        ids_TK = torch.cat([always_TA, picked_T], dim=-1)
        weights_TK = probs_TE.gather(-1, ids_TK)
    else:
        logits_TR, shared_TS = logits_TE.split([layer.num_routed, layer.num_shared], dim=-1)
        weights_TK, ids_TK = F.softmax(logits_TR, dim=-1).topk(layer.num_picked, dim=-1)
        if layer.num_shared:
            ids_TS = _ids(range(layer.num_routed, layer.num_experts), logits_TE)
            ids_TK = torch.cat([ids_TK, ids_TS], dim=-1)
            weights_TK = torch.cat([weights_TK, F.softmax(shared_TS, dim=-1)], dim=-1)
    if normalise:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return weights_TK.contiguous(), ids_TK.to(torch.int32).contiguous()


def _ids(ids: Any, logits_TE: torch.Tensor) -> torch.Tensor:
    return torch.tensor(list(ids), device=logits_TE.device).expand(logits_TE.shape[0], -1)


def choose_pool(logits_TR: torch.Tensor, size: int) -> torch.Tensor:
    """The pool of a prompt: the routed experts with the largest summed probability.

    Args:
        logits_TR (`torch.Tensor`): (T, R) of the prompt's tokens.
        size (`int`): experts in the pool.

    Returns:
        `torch.Tensor`: bool (R,), true for experts outside the pool.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo_vllm.routing import choose_pool
    >>> choose_pool(torch.tensor([[3.0, 2.0, 0.0], [3.0, 2.5, 0.0]]), 2)
    tensor([False, False,  True])

    ```
    """
    sums_R = (F.softmax(logits_TR.float(), dim=-1) * _FRACTION).long().sum(0)
    outside_R = torch.ones_like(sums_R, dtype=torch.bool)
    outside_R[sums_R.argsort(descending=True, stable=True)[:size]] = False
    return outside_R


def first_tokens(metadata: Any, attention: str) -> torch.Tensor | None:
    """Where the requests of a batch begin, from vLLM's description of the batch for the attention.

    Args:
        metadata: that description, `None` when vLLM only warms up.
        attention (`str`): the name of the first attention layer.

    Returns:
        `torch.Tensor`, *optional*: (N + 1,) the first token of each row, and the end of the last.

    Raises:
        RuntimeError: if vLLM does not say it: requests would be computed with the experts of others.

    Example:

    ```python
    >>> from transformers_emo_vllm.routing import first_tokens
    >>> first_tokens(None, "model.layers.0.self_attn.attn")

    ```
    """
    if metadata is None:
        return None
    of_layer = metadata.get(attention) if isinstance(metadata, dict) else metadata
    starts_N = getattr(of_layer, "query_start_loc", None)
    if starts_N is None:
        raise RuntimeError(
            "vLLM's attention does not say which tokens belong to which request: choose another attention "
            "backend, or start the server with prefix caching and without `usage_file`, as one for the "
            "same experts in all requests."
        )
    return starts_N


@dataclass
class Row:
    """What one request may use.

    Args:
        allowed (`list[torch.Tensor | None]`, *optional*): for each layer the experts (E,) that may be taken,
            bool; `None` for a dense layer, or in place of the list for all.
        pool (`int`, *optional*): routed experts in the pool that the prompt chooses.
        prompt_length (`int`): tokens of the prompt.
        outside (`dict[int, torch.Tensor]`): for each layer the experts outside the pool, once it is chosen.

    Example:

    ```python
    >>> from transformers_emo_vllm.routing import Row
    >>> Row(pool=16, prompt_length=5).is_restricted
    True

    ```
    """

    allowed: list[torch.Tensor | None] | None = None
    pool: int | None = None
    prompt_length: int = 0
    outside: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def is_restricted(self) -> bool:
        """Whether the request may not use every expert."""
        return self.allowed is not None or self.pool is not None


class Rows:
    """The requests of a batch, by row.

    Args:
        layers (`list[Layer]`): of the model.
        max_rows (`int`): requests in a batch, at most.
        max_tokens (`int`): tokens in a batch, at most.
        device (`torch.device`): where the network is.

    Attributes:
        row_T (`torch.Tensor`): for each token of the batch its row, counted from 1. 0 is a row that may use
            all.
        allowed (`list[torch.Tensor | None]`): for each layer (1 + max_rows, E), bool; `None` for a dense one.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo_vllm.architecture import Layer
    >>> from transformers_emo_vllm.routing import Row, Rows
    >>> rows = Rows([Layer(3, 1, (), 2)], max_rows=2, max_tokens=8, device=torch.device("cpu"))
    >>> rows.put(1, Row(allowed=[torch.tensor([True, False, True])]))
    >>> rows.spread(torch.tensor([0, 2, 3]), torch.arange(3))
    >>> rows.restrict(torch.zeros(3, 3), 0)
    tensor([[0., 0., 0.],
            [0., 0., 0.],
            [0., -inf, 0.]])

    ```
    """

    def __init__(self, layers: list[Layer], max_rows: int, max_tokens: int, device: torch.device):
        self.layers = layers
        self.requests: dict[int, Row] = {}
        self.row_T = torch.zeros(max_tokens, dtype=torch.long, device=device)
        _BY_BUFFER[self.row_T.data_ptr()] = self
        self.allowed = [
            None
            if layer.is_dense
            else torch.ones(max_rows + 1, layer.num_experts, dtype=torch.bool, device=device)
            for layer in layers
        ]
        self._masked: set[int] = set()  # rows of `allowed` that are not all true
        self._spans: list[
            tuple[int, int, bool, Row]
        ] = []  # of rows with pools: first and last token, begins its text

    def put(self, index: int, row: Row | None) -> None:
        """A request is now in this row; `None` for one that may use every expert, or for no request."""
        if row is not None and row.is_restricted:
            self.requests[index] = row
        else:
            self.requests.pop(index, None)
        masks = None if row is None else row.allowed
        if masks is None and index not in self._masked:
            return
        for layer, allowed_NE in enumerate(self.allowed):
            if allowed_NE is not None:
                mask_E = None if masks is None else masks[layer]
                allowed_NE[index + 1] = True if mask_E is None else mask_E.to(allowed_NE.device)
        (self._masked.discard if masks is None else self._masked.add)(index)

    def move(self, source: int, target: int, *, swap: bool) -> None:
        """The request of a row is in another row now; with `swap` the two have changed places."""
        moved, other = self.requests.get(source), self.requests.get(target)
        self.put(target, moved)
        self.put(source, other if swap else None)

    def prepare(self, starts_N: torch.Tensor | None, positions_T: torch.Tensor) -> None:
        """Say for each token of the coming forward which row it belongs to.

        Args:
            starts_N (`torch.Tensor`, *optional*): from `first_tokens`.
            positions_T (`torch.Tensor`): the tokens' positions in their texts.

        Raises:
            RuntimeError: if a request with experts of its own is in a row that the batch does not have.
        """
        if starts_N is None or not self.requests:
            self.row_T.zero_()
            self._spans = []
        else:
            self.spread(starts_N, positions_T)

    def spread(self, starts_N: torch.Tensor, positions_T: torch.Tensor) -> None:
        """Write which token belongs to which row.

        Args:
            starts_N (`torch.Tensor`): (N + 1,) the first token of each row, and the end of the last.
            positions_T (`torch.Tensor`): (T,) the tokens' positions in their texts.

        Raises:
            RuntimeError: if a request with experts of its own is in a row that the batch does not have.
        """
        number = len(starts_N) - 1
        if any(index >= number for index in self.requests):
            raise RuntimeError(
                f"The batch has {number} rows, and requests with experts of their own are thought to be in "
                f"rows {sorted(self.requests)}: this version of vLLM orders its batches in another way than "
                "those tested."
            )
        self.row_T.zero_()
        counts_N = starts_N.diff()
        rows_N = torch.arange(1, number + 1, device=self.row_T.device)
        rows_T = rows_N.repeat_interleave(counts_N.to(self.row_T.device))
        self.row_T[: len(rows_T)] = rows_T
        self._spans = []
        pooled = {index: row for index, row in self.requests.items() if row.pool is not None}
        if pooled:
            starts = starts_N.tolist()
            for index, row in pooled.items():
                first, last = starts[index], starts[index + 1]
                begins = last > first and int(positions_T[first]) == 0
                self._spans.append((first, last, begins, row))

    def restrict(self, logits_TE: torch.Tensor, layer: int) -> torch.Tensor:
        """Put minus infinity where a token's request must not take an expert: logits (T, E), both."""
        allowed_NE = self.allowed[layer]
        assert allowed_NE is not None
        return logits_TE.masked_fill(~allowed_NE[self.row_T[: logits_TE.shape[0]]], float("-inf"))

    def restrict_to_pools(self, logits_TE: torch.Tensor, layer: int) -> torch.Tensor:
        """Put minus infinity outside the pools of the requests that have one.

        Raises:
            RuntimeError: if a pool is not chosen yet, and the batch does not hold the whole prompt.
        """
        if not self._spans:
            return logits_TE.clone()
        routed = self.layers[layer].num_routed
        result_TE = logits_TE.clone()
        for first, last, begins, row in self._spans:
            if first == last:
                continue
            if begins:
                if last - first < row.prompt_length:
                    raise RuntimeError(
                        f"A prompt of {row.prompt_length} tokens was read in parts, the first of "
                        f"{last - first}: its document pool needs it whole. Start the server with "
                        "--no-enable-chunked-prefill."
                    )
                prompt_TR = logits_TE[first : first + row.prompt_length, :routed]
                row.outside[layer] = choose_pool(prompt_TR, row.pool or routed)
            if layer not in row.outside:
                raise RuntimeError(
                    "A request's document pool was lost: start the server without prefix caching."
                )
            result_TE[first:last, :routed].masked_fill_(row.outside[layer], float("-inf"))
        return result_TE


_ROWS: dict[int, tuple[weakref.ref, Rows]] = {}
_BY_BUFFER: weakref.WeakValueDictionary[int, Rows] = weakref.WeakValueDictionary()


def rows_of(vllm_config: Any, device: torch.device | None = None) -> Rows | None:
    """The rows of a server's batch: one object for the network and for what tells it of requests.

    Args:
        vllm_config (`VllmConfig`): vLLM's settings of this server.
        device (`torch.device`, *optional*): where the network is. They are made there if they are not known
            yet.

    Returns:
        `Rows`, *optional*: `None` if this server has no requests with experts of their own.
    """
    from .architecture import layers_of

    known = _ROWS.get(id(vllm_config))
    if known is not None and known[0]() is vllm_config:
        return known[1]
    serving = getattr(vllm_config.model_config.hf_config, "emo_serving", None)
    if serving is None or serving["refused"] or device is None:
        return None
    scheduler = vllm_config.scheduler_config
    rows = Rows(
        layers_of(vllm_config.model_config.hf_config),
        scheduler.max_num_seqs,
        # Batches are padded at times, to the next size that was compiled.
        scheduler.max_num_batched_tokens + (vllm_config.compilation_config.max_cudagraph_capture_size or 0),
        device,
    )
    key = id(vllm_config)
    _ROWS[key] = (weakref.ref(vllm_config, lambda _: _ROWS.pop(key, None)), rows)
    return rows


@torch.library.custom_op("transformers_emo_vllm::restrict_to_pools", mutates_args=())
def restrict_to_pools(logits_TE: torch.Tensor, row_T: torch.Tensor, layer: int) -> torch.Tensor:
    """`Rows.restrict_to_pools` as an operator, which compiled code calls as it is.

    The rows are those with this buffer `row_T`. (Compiled code is kept on disk for later processes: nothing
    in it may be a number of this one.)
    """
    return _BY_BUFFER[row_T.data_ptr()].restrict_to_pools(logits_TE, layer)


@restrict_to_pools.register_fake
def _(logits_TE: torch.Tensor, row_T: torch.Tensor, layer: int) -> torch.Tensor:
    return torch.empty_like(logits_TE)
