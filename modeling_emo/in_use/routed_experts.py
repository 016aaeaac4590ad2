"""Which experts the tokens of a generation took: `generate(..., return_experts=True)`.

Routers hand their picks to an `ExpertRecord` while the tokens pass. Meanwhile nothing is read off the device.

Shape suffixes: B sequences, S tokens read, L layers, E experts of the root model, K experts taken per token,
T tokens of one forward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from transformers.generation import GenerateDecoderOnlyOutput

from ...configuration.configuration_emo import EmoConfig

_COMPACT_AFTER = 64  # forwards: memory for their small tensors is given back
_PARTS = ("all", "prompt", "new")
_Picks = dict[int, tuple[torch.Tensor, torch.Tensor]]  # by layer: ids (T, K) and weights (T, K)


@dataclass(frozen=True)
class RoutedExperts:
    """Which experts each token took, in the numbering of the root model.

    The last new token of a sequence was never read, so it took none. Tokens that were in a cache before the
    call are not there either.

    Args:
        ids_BLSK (`torch.Tensor`): int64 (B, L, S, K). First the experts that the router picked, the strongest
            first, then the shared ones. -1 where there is none: padding, what stands behind the end of a
            sequence, dense layers.
        weights_BLSK (`torch.Tensor`): float32, the weight of each in the layer's sum; 0 where there is none.
        is_read_BS (`torch.Tensor`): bool, false for padding and behind the end of a sequence.
        num_prompt (`int`): so many of the S tokens are the prompt with its padding; the others are new.
        num_before (`int`): tokens of the cache in front of these.
        sizes (`list[int]`): experts in each layer of the root model, 0 for a dense one.
        always_used (`list[list[int]]`): the shared and always-active experts of each layer.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoForCausalLM
    >>> model = EmoForCausalLM.from_pretrained("model_cards/toy-emo")
    >>> prompt = torch.tensor([[5, 6, 7]])
    >>> out = model.generate(prompt, return_experts=True, max_new_tokens=4, do_sample=False)
    >>> out.experts.ids_BLSK.shape, out.experts.num_prompt, out.sequences.shape
    (torch.Size([1, 4, 6, 4]), 3, torch.Size([1, 7]))
    >>> out.experts.usage("new").sum(-1).round().tolist()  # picks of 3 tokens, 3 each, in each of 4 layers
    [[9.0, 9.0, 9.0, 9.0]]

    ```
    """

    ids_BLSK: torch.Tensor
    weights_BLSK: torch.Tensor
    is_read_BS: torch.Tensor
    num_prompt: int
    num_before: int
    sizes: list[int]
    always_used: list[list[int]]

    def usage(self, part: Literal["all", "prompt", "new"] = "all", *, weighted: bool = False) -> torch.Tensor:
        """How much each expert was used, without those that every token uses.

        Args:
            part (`str`, defaults to `"all"`): which tokens count: all, those of the prompt, or the new ones.
            weighted (`bool`, defaults to `False`): add up weights, and not picks.

        Returns:
            `torch.Tensor`: float32 (B, L, E), by root id; E is the largest number of experts of a layer.

        Raises:
            ValueError: if there is no such part.

        Example: see `RoutedExperts`.
        """
        if part not in _PARTS:
            raise ValueError(f"`part` is {part!r}, expected one of {', '.join(_PARTS)}.")
        first = self.num_prompt if part == "new" else 0
        last = self.num_prompt if part == "prompt" else None
        ids_BLSK = self.ids_BLSK[:, :, first:last]
        weights_BLSK = self.weights_BLSK[:, :, first:last]
        return expert_usage(ids_BLSK, weights_BLSK, self.sizes, self.always_used, weighted=weighted)


def expert_usage(
    ids_BLSK: torch.Tensor,
    weights_BLSK: torch.Tensor,
    sizes: list[int],
    always_used: list[list[int]],
    *,
    weighted: bool = False,
) -> torch.Tensor:
    """Add up picks by expert; see `RoutedExperts.usage`.

    Args:
        ids_BLSK, weights_BLSK, sizes, always_used: as in `RoutedExperts`.
        weighted (`bool`, defaults to `False`): add up weights, and not picks.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.in_use.routed_experts import expert_usage
    >>> ids = torch.tensor([[[[0, 2], [1, 2]]]])
    >>> expert_usage(ids, torch.ones(ids.shape), [3], [[2]]).tolist()
    [[[1.0, 1.0, 0.0]]]

    ```
    """
    batch, layers = ids_BLSK.shape[:2]
    most = max(sizes, default=0)
    taken_BLN = ids_BLSK.flatten(2)
    amount_BLN = (weights_BLSK.flatten(2) if weighted else torch.ones_like(weights_BLSK).flatten(2)).float()
    usage_BLE = amount_BLN.new_zeros(batch, layers, most + 1)  # one more, for picks that are none
    usage_BLE.scatter_add_(2, taken_BLN.masked_fill(taken_BLN < 0, most), amount_BLN)
    for index, ids in enumerate(always_used):
        usage_BLE[:, index, ids] = 0
    return usage_BLE[..., :most]


@dataclass
class GenerateWithExpertsOutput(GenerateDecoderOnlyOutput):
    """What `generate(..., return_experts=True)` returns: Transformers' output, and the experts.

    Example: see `RoutedExperts`.
    """

    experts: RoutedExperts | None = None


class LayerRecord:
    """What one layer's router notes its picks with. (No tuple: what moves layers' inputs copies these.)

    Args:
        picks (`dict`): ids and weights of the forward that runs, by layer.
        layer (`int`): the layer.

    Example: see `ExpertRecord`.
    """

    def __init__(self, picks: _Picks, layer: int):
        self.picks = picks
        self.layer = layer

    def take(self, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        """Note ids (T, K), in the numbering of the layer, and weights (T, K)."""
        self.picks[self.layer] = (index_TK, weights_TK)


class ExpertRecord:
    """Collects the picks of all layers while a model generates.

    Args:
        config (`EmoConfig`): the model's config.
        put_experts (`Callable`, *optional*): gets the experts of each forward as soon as it has run: root ids
            (B, L, S, K) and their weights.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.modeling_emo.in_use.routed_experts import ExpertRecord
    >>> record = ExpertRecord(EmoConfig(num_hidden_layers=1, num_experts=4, num_experts_per_tok=2))
    >>> record.begin_forward(batch=1)
    >>> record.layer(0).take(torch.tensor([[1, 3], [0, 3]]), torch.ones(2, 2))
    >>> record.end_forward()
    >>> record.experts(torch.tensor([[7]]), num_prompt=2).ids_BLSK.tolist()
    [[[[1, 3], [0, 3]]]]

    ```
    """

    def __init__(self, config: EmoConfig, put_experts: Callable[[Any, Any], None] | None = None):
        self.layers = config.layer_experts
        present = config.retained_experts
        self.present = [None] * len(self.layers) if present is None else present
        self.sizes = list(config.root_experts_per_layer or [layer.num_experts for layer in self.layers])
        self.always_used = [
            [] if layer.is_dense else [e if ids is None else ids[e] for e in layer.always_used]
            for layer, ids in zip(self.layers, self.present, strict=True)
        ]
        self.top_k = max((layer.top_k for layer in self.layers if not layer.is_dense), default=0)
        self.put_experts = put_experts
        self.attention_mask: torch.Tensor | None = None  # of the last forward
        self._batch = 1
        self._running: _Picks = {}
        self._forwards: list[tuple[int, _Picks]] = []
        self._read: list[tuple[torch.Tensor, torch.Tensor]] = []  # (B, L, S, K) each
        self._numbers: dict[torch.device, torch.Tensor] = {}

    def layer(self, index: int) -> "LayerRecord":
        """What the router of a layer notes its picks with."""
        return LayerRecord(self._running, index)

    def begin_forward(self, batch: int, attention_mask: torch.Tensor | None = None) -> None:
        """Say what the next forward is about.

        Args:
            batch (`int`): sequences in it.
            attention_mask (`torch.Tensor`, *optional*): 0 for padding, of all tokens so far.
        """
        self._batch = batch
        self.attention_mask = attention_mask

    def end_forward(self) -> None:
        """Keep what was noted, if a forward has run since the last time."""
        if not self._running:
            return
        # Emptied, and not replaced: the layers' records hold it, and so does code compiled with them.
        taken = dict(self._running)
        self._running.clear()
        self._forwards.append((self._batch, taken))
        # What a graph on a GPU has put out is overwritten by its next run.
        on_gpu = next(iter(taken.values()))[0].is_cuda
        if self.put_experts is not None or on_gpu or len(self._forwards) >= _COMPACT_AFTER:
            self._compact()
        if self.put_experts is not None:
            self.put_experts(*self._read[-1])

    def forget(self) -> None:
        """Forget everything: the next forward reads all tokens again."""
        self._running.clear()
        self._forwards, self._read = [], []

    def experts(
        self,
        new_BN: torch.Tensor,
        num_prompt: int,
        *,
        num_cached: int = 0,
        ends: Sequence[int] = (),
        pad: int | None = None,
    ) -> RoutedExperts:
        """What was collected.

        Args:
            new_BN (`torch.Tensor`): the tokens that were generated.
            num_prompt (`int`): tokens of the prompt with its padding, as it was given.
            num_cached (`int`, defaults to 0): tokens in the cache that was given.
            ends (`Sequence[int]`, *optional*): ids that end a sequence.
            pad (`int`, *optional*): the id behind the end of a sequence.

        Raises:
            RuntimeError: if other tokens passed the routers than were generated.
        """
        self._compact()
        ids_BLSK, weights_BLSK = (torch.cat(part, dim=2) for part in zip(*self._read, strict=True))
        batch, _, num_seen, _ = ids_BLSK.shape
        num_new = new_BN.shape[1]
        total = num_prompt + num_new - 1  # the last one is not read
        # The prompt may be given whole, or without what the cache holds.
        num_before = 0 if num_seen >= total else min(num_cached, num_prompt - 1)
        length = total - num_before
        if num_seen < length or new_BN.shape[0] != batch:
            raise RuntimeError(
                f"{num_seen} tokens of {batch} sequences passed the routers, expected {length} of "
                f"{new_BN.shape[0]}: `return_experts` cannot follow this way of generating. Leave it out."
            )
        prompt = num_prompt - num_before
        is_read_BS = torch.ones(batch, length, dtype=torch.bool, device=ids_BLSK.device)
        mask = self.attention_mask
        if mask is not None and mask.dim() == 2:
            first = mask.shape[1] - num_seen  # both end with the token that was read last
            is_read_BS[:, :prompt] = mask[:, first : first + prompt].to(ids_BLSK.device, torch.bool)
        is_read_BS[:, prompt:] = _within(new_BN, ends, pad)[:, : num_new - 1].to(ids_BLSK.device)
        gone = ~is_read_BS[:, None, :, None]
        return RoutedExperts(
            ids_BLSK[:, :, :length].masked_fill(gone, -1),
            weights_BLSK[:, :, :length].masked_fill(gone, 0),
            is_read_BS,
            prompt,
            num_before,
            self.sizes,
            self.always_used,
        )

    def _compact(self) -> None:
        """Make one tensor of the forwards that wait: those of one token each, which are most, at once."""
        waiting, self._forwards = self._forwards, []
        while waiting:
            batch, first = waiting[0]
            shapes = {layer: index.shape for layer, (index, _) in first.items()}
            alike = 0
            for other, taken in waiting:
                if other != batch or {layer: index.shape for layer, (index, _) in taken.items()} != shapes:
                    break
                alike += 1
            self._read.append(self._joined(batch, [taken for _, taken in waiting[:alike]]))
            waiting = waiting[alike:]

    def _joined(self, batch: int, forwards: list[_Picks]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and weights (B, L, S, K) of forwards of one shape, in their order."""
        ids, weights = (
            torch.stack([part for forward in forwards for part in self._of_layers(forward, which, filling)])
            .view(len(forwards), len(self.layers), batch, -1, self.top_k)
            .permute(2, 1, 0, 3, 4)
            .flatten(2, 3)
            for which, filling in ((0, -1), (1, 0))
        )
        return self._root_ids(ids), weights.float()

    def _of_layers(self, picks: _Picks, which: int, filling: int) -> list[torch.Tensor]:
        """Of each layer ids (0) or weights (1) of one forward, all as wide and on one device."""
        first = next(iter(picks.values()))[which]
        parts = []
        for layer in range(len(self.layers)):
            if layer not in picks:
                parts.append(first.new_full((*first.shape[:-1], self.top_k), filling))
                continue
            part = picks[layer][which].to(first.device)
            lacking = self.top_k - part.shape[-1]
            parts.append(F.pad(part, (0, lacking), value=filling) if lacking else part)
        return parts

    def _root_ids(self, ids_BLSK: torch.Tensor) -> torch.Tensor:
        if all(ids is None for ids in self.present):
            return ids_BLSK
        device = ids_BLSK.device
        if device not in self._numbers:
            most = max(layer.num_experts for layer in self.layers if not layer.is_dense)
            rows = [[*(ids or range(most)), *[-1] * most][:most] + [-1] for ids in self.present]
            self._numbers[device] = torch.tensor(rows, device=device)  # the last column is for -1
        table_LE = self._numbers[device]
        layer_L = torch.arange(len(self.layers), device=device)[None, :, None, None]
        return table_LE[layer_L, ids_BLSK]


def _within(new_BN: torch.Tensor, ends: Sequence[int], pad: int | None) -> torch.Tensor:
    """Which new tokens belong to their sequence: those up to its end, not the filling behind it."""
    within_BN = torch.ones_like(new_BN, dtype=torch.bool)
    if new_BN.shape[0] == 1:  # generation stopped where it ended
        return within_BN
    if ends:
        # A tensor made of the ids would wait for the device.
        is_end_BN = torch.stack([new_BN == end for end in ends]).any(0)
        within_BN = is_end_BN.cumsum(1) - is_end_BN.long() == 0
    if pad is not None and pad not in ends:
        within_BN = within_BN & ((new_BN != pad).flip(1).cumsum(1).flip(1) > 0)
    return within_BN
