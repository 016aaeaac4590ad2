"""An answer while it is made: text and experts come token by token, and it can be stopped.

Shape suffixes: B sequences (one here), S tokens of a forward, L layers, E experts of the root model, K
experts taken per token.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ...modeling_emo.in_use.routed_experts import expert_usage
from ...subsets.numbering import present_experts
from .text_pieces import TextPieces


class AnswerRun(BaseStreamer):
    """One call of `generate` in a thread of its own; its pieces are taken in another.

    Args:
        model (`EmoForCausalLM`): the model.
        tokenizer: its tokenizer.
        inputs (`dict[str, torch.Tensor]`): the prompt, one sequence.
        settings (`dict[str, Any]`): other arguments of `generate`.

    Example: see `Session`.
    """

    def __init__(self, model: Any, tokenizer: Any, inputs: dict[str, torch.Tensor], settings: dict[str, Any]):
        self.model = model
        self.inputs, self.settings = inputs, settings
        config = model.config
        layers, present = config.layer_experts, present_experts(config)
        self.sizes = list(config.root_experts_per_layer or map(len, present))
        self.always = [
            [ids[e] for e in layer.always_used] if ids else []
            for layer, ids in zip(layers, present, strict=True)
        ]
        self.picks_LE = torch.zeros(len(layers), max(self.sizes))
        self.last_LE = torch.zeros_like(self.picks_LE)
        self.output: Any = None
        self.seconds = 0.0
        self._is_prompt = True
        self._text = TextPieces(tokenizer)
        self._events: SimpleQueue = SimpleQueue()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._generate, name="emo-answer", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Let the model stop after the token that it is at."""
        self._stopped.set()

    def join(self) -> None:
        """Wait until it has."""
        self._thread.join()

    def pieces(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """The text as it comes, and the experts; what waits is taken together."""
        while True:
            events = [self._events.get()]
            with contextlib.suppress(Empty):
                while True:
                    events.append(self._events.get_nowait())
            for event in events:
                if isinstance(event, BaseException):
                    raise event
            told = [event for event in events if event is not None]
            if told:
                yield "".join(text for text, _, _ in told), *told[-1][1:]
            if events[-1] is None:
                return

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, which comes first, and then each new token.

        Args:
            value (`torch.Tensor`): ids.
        """
        if self._is_prompt:
            self._is_prompt = False
            return
        self._tell(self._text.add(value.flatten().tolist()))

    def put_experts(self, ids_BLSK: torch.Tensor, weights_BLSK: torch.Tensor) -> None:
        """Take the experts of a forward.

        Args:
            ids_BLSK (`torch.Tensor`): root ids, -1 where there is none.
            weights_BLSK (`torch.Tensor`): their weights.
        """
        picks_LE = expert_usage(ids_BLSK, weights_BLSK, self.sizes, self.always)[0].cpu()
        self.picks_LE = self.picks_LE + picks_LE
        last = slice(-1, None)
        last_BLE = expert_usage(ids_BLSK[:, :, last], weights_BLSK[:, :, last], self.sizes, self.always)
        self.last_LE = last_BLE[0].cpu()

    def end(self) -> None:
        """Take what the last tokens left over."""
        self._tell(self._text.end())

    def _tell(self, text: str) -> None:
        self._events.put((text, self.picks_LE, self.last_LE))

    def _generate(self) -> None:
        start = time.perf_counter()
        stop = StoppingCriteriaList([_UntilStopped(self._stopped)])
        try:
            self.output = self.model.generate(
                **self.inputs, **self.settings, streamer=self, stopping_criteria=stop, return_experts=True
            )
            self.seconds = time.perf_counter() - start
            self._events.put(None)
        except BaseException as error:
            self._events.put(error)


class _UntilStopped(StoppingCriteria):
    """Ends generation when somebody asks for it."""

    def __init__(self, stopped: threading.Event):
        self.stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.stopped.is_set(), device=input_ids.device)
