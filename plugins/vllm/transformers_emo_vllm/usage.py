"""Which experts a server's requests use: sums of router probabilities, written to a file while the server
runs.

It is the statistic by which `emo select --method global` chooses, of the server's own traffic: `emo select
MODEL OUT --usage FILE` chooses experts by it. Only tokens of requests that may use every expert count.

Shape suffixes: T tokens of the batch, E experts of a layer, R its routed ones.
"""

from __future__ import annotations

import json
import os
import threading
import weakref
from typing import Any

import torch
import torch.nn.functional as F

from .choice import Held
from .routing import Rows

SECONDS = 2.0
"""How long after a forward the file is at most behind."""


class Usage:
    """The sums of a server.

    Args:
        held (`Held`): the experts of the model.
        path (`str`, *optional*): the file; `None` in processes that do not write it.
        max_tokens (`int`): tokens in a batch, at most.
        device (`torch.device`): where the network is.

    Attributes:
        counts_T (`torch.Tensor`): 1 for each token of the batch that counts, else 0.
        sums (`list[torch.Tensor]`): for each layer the sums (R,), float64.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo_vllm.choice import Held
    >>> from transformers_emo_vllm.config import EmoConfig
    >>> from transformers_emo_vllm.usage import Usage, count_usage
    >>> held = Held.of(EmoConfig(num_hidden_layers=1, num_experts=3, num_experts_per_tok=2,
    ...     num_shared_experts=1))
    >>> usage = Usage(held, None, 8, torch.device("cpu"))
    >>> usage.prepare(torch.tensor([0, 2]), None)
    >>> count_usage(usage.sums[0], torch.zeros(2, 3), usage.counts_T)
    >>> usage.data()["usage"], usage.data()["num_tokens"]
    ([[1.0, 1.0, 2.0]], 2)

    ```
    """

    def __init__(self, held: Held, path: str | None, max_tokens: int, device: torch.device):
        self.held, self.path = held, path
        self.counts_T = torch.zeros(max_tokens, dtype=torch.float64, device=device)
        self.sums = [
            torch.zeros(
                layer.num_experts if layer.always_active else layer.num_routed,
                dtype=torch.float64,
                device=device,
            )
            for layer in held.layers
        ]
        self.num_tokens = 0
        self._changed = threading.Event()
        if path is not None:
            open(path, "a").close()  # tells early of a place that cannot be written to
            threading.Thread(target=self._keep_writing, daemon=True, name="emo-usage").start()

    def prepare(self, starts_N: torch.Tensor | None, rows: Rows | None) -> None:
        """Say which tokens of the coming forward count.

        Args:
            starts_N (`torch.Tensor`, *optional*): the first token of each row, and the end of the last;
                `None` for a forward that only warms up.
            rows (`Rows`, *optional*): which rows may not use every expert.
        """
        self.counts_T.zero_()
        if starts_N is None:
            return
        total = int(starts_N[-1])
        self.counts_T[:total] = 1.0
        for index in rows.requests if rows is not None else ():
            self.counts_T[int(starts_N[index]) : int(starts_N[index + 1])] = 0.0
        self.num_tokens += int(self.counts_T.sum())
        self._changed.set()

    def data(self) -> dict[str, Any]:
        """What the file holds: in `usage` for each layer the sum for each expert of the full model, `None`
        for one that this model does not hold. Experts that every token uses have the number of tokens."""
        usage: list[list[float | None] | None] = []
        for layer, present, size, sums_R in zip(
            self.held.layers, self.held.present, self.held.root_sizes, self.sums, strict=True
        ):
            if layer.is_dense:
                usage.append(None)
                continue
            values = sums_R.tolist() + [0.0] * (layer.num_experts - len(sums_R))
            for e in layer.always_used:
                values[e] = float(self.num_tokens)
            by_root = dict(zip(present, values, strict=True))
            usage.append([by_root.get(e) for e in range(size)])
        return {
            "format": "emo-expert-usage",
            "version": 1,
            "kind": "probability",
            "num_tokens": self.num_tokens,
            "usage": usage,
        }

    def _keep_writing(self) -> None:
        while True:
            self._changed.wait()
            threading.Event().wait(SECONDS)
            self._changed.clear()
            self.write()

    def write(self) -> None:
        """Write the file. It appears whole."""
        assert self.path is not None
        partial = f"{self.path}.partial"
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(self.data(), file)
            file.write("\n")
        os.replace(partial, self.path)


_USAGE: dict[int, tuple[weakref.ref, Usage]] = {}


def usage_of(vllm_config: Any, device: torch.device) -> Usage | None:
    """The sums of a server, one object for all its layers.

    Args:
        vllm_config (`VllmConfig`): vLLM's settings of this server.
        device (`torch.device`): where the network is.

    Returns:
        `Usage`, *optional*: `None` if the server was not asked to count.
    """
    known = _USAGE.get(id(vllm_config))
    if known is not None and known[0]() is vllm_config:
        return known[1]
    config = vllm_config.model_config.hf_config
    path = getattr(config, "usage_file", None)
    if path is None:
        return None
    from vllm.distributed import get_tensor_model_parallel_rank

    tokens = vllm_config.scheduler_config.max_num_batched_tokens
    tokens += vllm_config.compilation_config.max_cudagraph_capture_size or 0
    usage = Usage(Held.of(config), path if get_tensor_model_parallel_rank() == 0 else None, tokens, device)
    key = id(vllm_config)
    _USAGE[key] = (weakref.ref(vllm_config, lambda _: _USAGE.pop(key, None)), usage)
    return usage


@torch.library.custom_op("transformers_emo_vllm::count_usage", mutates_args=("sums_R",))
def count_usage(sums_R: torch.Tensor, logits_TE: torch.Tensor, counts_T: torch.Tensor) -> None:
    """Add the router probabilities of the tokens that count, as an operator that compiled code calls."""
    probs_TR = F.softmax(logits_TE[:, : len(sums_R)].float(), dim=-1).double()
    sums_R += counts_T[: len(probs_TR)] @ probs_TR


@count_usage.register_fake
def _(sums_R: torch.Tensor, logits_TE: torch.Tensor, counts_T: torch.Tensor) -> None:
    return None
