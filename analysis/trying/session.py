"""A model that answers with chosen experts and tells which of them it uses: for `emo chat` and `emo demo`.

Shape suffixes: L layers, E experts of the root model.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from ...checkpoints.hub.names import pinned
from ...configuration import EmoConfig
from ...modeling_emo import EmoForCausalLM
from ...modeling_emo.weight_names import EXPERT_PARAMETERS
from ...quantization.packed_parts import parts_of
from ...subsets.monitoring.domain_usage import DomainMonitor, RequestUsage, library_subsets
from ...subsets.numbering import present_experts
from .answer_run import AnswerRun

FULL = "all experts"


@dataclass(frozen=True)
class ExpertChoice:
    """Which experts may answer, of those that are in memory.

    Args:
        pool (`int`, *optional*): let the prompt choose so many routed experts in every layer; see
            `document_pool` of `EmoForCausalLM.generate`.
        exclude (*optional*): experts never to take: ids by layer, or the name of a domain; see
            `exclude_experts` there.

    Example: see `Session`.
    """

    pool: int | None = None
    exclude: dict[int, list[int]] | str | None = None


@dataclass(frozen=True)
class Switch:
    """What it cost to exchange the experts in memory.

    Args:
        domain (`str`, *optional*): the domain whose experts are there now; `None` for all experts.
        num_in (`int`): experts that came in, in all layers together.
        num_kept (`int`): experts that were there before.
        num_out (`int`): experts that went.
        bytes_in (`int`): size of what came in, router rows included, as the model holds it.
        bytes_held (`int`): size of all experts that are there now.
        milliseconds (`float`): how long it took.

    Example: see `Session`.
    """

    domain: str | None
    num_in: int
    num_kept: int
    num_out: int
    bytes_in: int
    bytes_held: int
    milliseconds: float

    def __str__(self) -> str:
        return (
            f"{self.domain or FULL}: {megabytes(self.bytes_in)} read ({self.num_in} experts in, "
            f"{self.num_out} out, {self.num_kept} kept) in {self.milliseconds:.0f} ms. "
            f"{megabytes(self.bytes_held)} of experts are in memory."
        )


@dataclass(frozen=True)
class Answer:
    """What is known when an answer has ended.

    Args:
        num_prompt (`int`): tokens of the prompt.
        num_new (`int`): tokens of the answer.
        seconds (`float`): how long it took.
        is_cut (`bool`): whether it ended because the context of the model was full.
        usage (`RequestUsage`, *optional*): how much of the routing went to each domain; `None` if the model
            has no library of domains.

    Example: see `Session`.
    """

    num_prompt: int
    num_new: int
    seconds: float
    is_cut: bool
    usage: RequestUsage | None


@dataclass(frozen=True)
class Step:
    """A piece of an answer.

    Args:
        text (`str`): what comes behind the text so far.
        picks_LE (`torch.Tensor`): (L, E) how often each expert was picked so far, by prompt and answer.
            Shared experts, which every token takes, count 0.
        last_LE (`torch.Tensor`): (L, E) the same for the token that was read last.
        answer (`Answer`, *optional*): with the last piece.

    Example: see `Session`.
    """

    text: str
    picks_LE: torch.Tensor
    last_LE: torch.Tensor
    answer: Answer | None = None


class Session:
    """A model in memory. It answers prompts with chosen experts, and exchanges its experts between answers.

    One answer or exchange runs at a time. Others wait for it.

    Args:
        model (`EmoForCausalLM`): the model.
        tokenizer: its tokenizer.
        name (`str`): what it is called.
        domain (`str`, *optional*): the domain whose experts it holds; `None` for all of them.
        config (`EmoConfig`, *optional*): of the place that it was loaded from; by default that of the model.

    Attributes:
        domains (`list[str]`): the names in the model's library.
        num_experts (`int`): experts of the largest layer, with all experts.
        num_routed (`int`): routed ones among these.

    Example:

    ```python
    >>> from transformers_emo.analysis.trying import ExpertChoice, Session
    >>> session = Session.open("model_cards/emo-tiny", domain="python")
    >>> steps = list(session.answer("def read(", ExpertChoice(pool=8), max_new_tokens=8, temperature=0))
    >>> steps[-1].answer.num_new, int(steps[-1].picks_LE[0].gt(0).sum()) <= 8
    (8, True)
    >>> session.switch("german").num_in > 0
    True
    >>> session.domain
    'german'

    ```
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        *,
        domain: str | None = None,
        config: EmoConfig | None = None,
    ):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.domain = domain
        config = model.config if config is None else config
        self._all = present_experts(config)
        self.num_experts = max(map(len, self._all))
        self.num_routed = max(layer.num_experts - len(layer.always_used) for layer in config.layer_experts)
        subsets = library_subsets(model)
        self.domains = list(subsets)
        self._monitor = DomainMonitor(subsets) if subsets else None
        self._lock = threading.Lock()
        self._run: AnswerRun | None = None

    @classmethod
    def open(
        cls,
        model: str | os.PathLike,
        *,
        domain: str | None = None,
        dtype: str | None = None,
        device: str = "cpu",
        **hub_kwargs: Any,
    ) -> Session:
        """Load a model and its tokenizer.

        Args:
            model (`str` or `os.PathLike`): a folder or Hub repository.
            domain (`str`, *optional*): read only the experts of this domain: a name in the model's library,
                or a subset's file. By default all experts are read.
            dtype (`str`, *optional*): by default that of the files.
            device (`str`, defaults to `"cpu"`): where the model runs.
            hub_kwargs: `revision`, `token`, `cache_dir` and so on, as for `from_pretrained`.

        Raises:
            OSError: if there is neither such a folder nor such a repository.
            ValueError: if it is no EMO, or has no tokenizer.
            SubsetError: if there is no such domain.

        Example: see `Session`.
        """
        name = os.fspath(model)
        try:
            hub_kwargs = pinned(model, hub_kwargs)
            config = AutoConfig.from_pretrained(model, **hub_kwargs)
        except OSError as error:
            raise OSError(
                f"{name!r} is no model's folder, nor a repository that can be read: {error}"
            ) from error
        if not isinstance(config, EmoConfig):
            raise ValueError(
                f"{name!r} is a model of the type {config.model_type!r}, expected an EMO: other mixtures are "
                "turned into one by `emo convert`."
            )
        if all(layer.is_dense for layer in config.layer_experts):
            raise ValueError(
                f"{name!r} has no experts to try: all its layers are dense. Give a model that has some."
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(model, **hub_kwargs)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{name!r} has no tokenizer that can be read: put one beside the model ({error})."
            ) from error
        chosen: dict[str, Any] = {} if domain is None else {"expert_subset": domain}
        loaded = EmoForCausalLM.from_pretrained(model, dtype=dtype or "auto", **chosen, **hub_kwargs)
        return cls(loaded.to(device), tokenizer, name, domain=domain, config=config)

    @property
    def is_chat(self) -> bool:
        """Whether the model takes turns in a conversation; others continue a text."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def num_layers(self) -> int:
        """Number of layers, dense ones included."""
        return len(self._all)

    @property
    def context(self) -> int:
        """The most tokens that prompt and answer may have together."""
        return self.model.config.max_position_embeddings

    @property
    def picks(self) -> int:
        """How many routed experts a token takes in a layer, at most."""
        return max(layer.top_k - len(layer.always_used) for layer in self._layers())

    @property
    def most_in_pool(self) -> int:
        """How many routed experts the largest layer holds: no pool can be larger."""
        return max(layer.num_experts - len(layer.always_used) for layer in self._layers())

    @property
    def usual_pool(self) -> int:
        """A size of pools to begin with: what the config says, or a quarter of the experts."""
        said = self.model.config.document_pool_eval or self.most_in_pool // 4
        return max(self.picks, min(said, self.most_in_pool))

    def held(self) -> list[list[int]]:
        """`list[list[int]]`: for each layer the root ids of the routed experts that are in memory."""
        layers = zip(self.model.config.layer_experts, present_experts(self.model.config), strict=True)
        return [[e for row, e in enumerate(ids) if row not in layer.always_used] for layer, ids in layers]

    def experts_text(self) -> str:
        """Say which experts are in memory, in a few words."""
        sizes = sorted({layer.num_experts for layer in self._layers()})
        number = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        return f"{self.domain or FULL} ({number} of {self.num_experts} in each layer)"

    def switch(self, domain: str | None) -> Switch:
        """Exchange the experts in memory for those of a domain, by `swap_experts`.

        Args:
            domain (`str`, *optional*): a name in the model's library, or a subset's file; `None` for all
                experts.

        Raises:
            SubsetError: if there is no such domain. The experts stay as they were.

        Example: see `Session`.
        """
        wanted: Any = [ids or None for ids in self._all] if domain is None else domain
        with self._lock:
            before = present_experts(self.model.config)
            start = time.perf_counter()
            self.model.swap_experts(wanted, progress=False)
            took = time.perf_counter() - start
            self.domain = domain
            after = present_experts(self.model.config)
            sizes = [self._bytes_of_an_expert(layer) for layer in range(len(after))]
        new = [len(set(ids) - set(old)) for ids, old in zip(after, before, strict=True)]
        kept = sum(map(len, after)) - sum(new)
        return Switch(
            domain,
            num_in=sum(new),
            num_kept=kept,
            num_out=sum(map(len, before)) - kept,
            bytes_in=sum(number * size for number, size in zip(new, sizes, strict=True)),
            bytes_held=sum(len(ids) * size for ids, size in zip(after, sizes, strict=True)),
            milliseconds=1000 * took,
        )

    def check(self, choice: ExpertChoice) -> None:
        """See that a choice fits the experts in memory.

        Args:
            choice (`ExpertChoice`): which experts may answer.

        Raises:
            ValueError: if the pool is too small or too large, or an excluded expert is not there or one that
                every token needs.
        """
        least, most = self.picks, self.most_in_pool
        if choice.pool is not None and not least <= choice.pool <= most:
            raise ValueError(
                f"A pool of {choice.pool} experts: expected {least}, which a token takes, to {most}, which a "
                "layer holds."
            )
        if choice.exclude is not None:
            with self.model.use_experts(exclude_experts=choice.exclude):
                pass

    def answer(
        self,
        prompt: str,
        choice: ExpertChoice = ExpertChoice(),
        *,
        history: Sequence[tuple[str, str]] = (),
        max_new_tokens: int = 128,
        temperature: float = 0.7,
        top_p: float = 0.95,
        seed: int | None = None,
    ) -> Generator[Step, None, None]:
        """Answer a prompt piece by piece. Closing the iterator stops the model.

        Args:
            prompt (`str`): the text to go on with; for a model that takes turns, what the user says.
            choice (`ExpertChoice`, *optional*): which experts may answer.
            history (`Sequence[tuple[str, str]]`, *optional*): questions and answers before, for a model that
                takes turns.
            max_new_tokens (`int`, defaults to 128): the longest answer.
            temperature (`float`, defaults to 0.7): 0 takes the likeliest token each time.
            top_p (`float`, defaults to 0.95): draw among the likeliest tokens, of so much probability
                together.
            seed (`int`, *optional*): for the same draws again.

        Raises:
            ValueError: if there is no prompt, it does not fit into the context, or the choice is impossible.

        Example: see `Session`.
        """
        self.check(choice)
        inputs = self._encode(prompt, history)
        length = inputs["input_ids"].shape[1]
        if not 1 <= length < self.context:
            raise ValueError(
                f"The prompt has {length} tokens, expected 1 to {self.context - 1}: the model reads "
                f"{self.context} together with its answer."
            )
        fits = min(max_new_tokens, self.context - length)
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {
                "do_sample": True,
                "temperature": float(temperature),
                "top_p": float(top_p),
                "top_k": 0,
            }
        settings = sampling | {
            "max_new_tokens": fits,
            "document_pool": False if choice.pool is None else choice.pool,
            "exclude_experts": choice.exclude,
        }
        with self._lock:
            if seed is not None:
                torch.manual_seed(seed)
            run = self._run = AnswerRun(self.model, self.tokenizer, inputs, settings)
            try:
                run.start()
                for text, picks_LE, last_LE in run.pieces():
                    yield Step(text, picks_LE, last_LE)
            finally:
                run.stop()
                run.join()
                self._run = None
            num_new = run.output.sequences.shape[1] - length
            usage = None if self._monitor is None else self._monitor(run.output.experts)[0]
        is_cut = num_new == fits < max_new_tokens
        yield Step("", run.picks_LE, run.last_LE, Answer(length, num_new, run.seconds, is_cut, usage))

    def stop(self) -> None:
        """End the answer that runs, after the token that the model is at. Its last step still comes."""
        run = self._run
        if run is not None:
            run.stop()

    def _encode(self, prompt: str, history: Sequence[tuple[str, str]]) -> dict[str, torch.Tensor]:
        if self.is_chat:
            turns = [
                {"role": role, "content": text}
                for pair in history
                for role, text in zip(("user", "assistant"), pair, strict=True)
            ]
            encoded = self.tokenizer.apply_chat_template(
                [*turns, {"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
        else:
            encoded = self.tokenizer(prompt, return_tensors="pt")
        names = ("input_ids", "attention_mask")
        return {name: encoded[name].to(self.model.device) for name in names if name in encoded}

    def _layers(self) -> list[Any]:
        return [layer for layer in self.model.config.layer_experts if not layer.is_dense]

    def _bytes_of_an_expert(self, layer: int) -> int:
        block = self.model.base_model.layers[layer].mlp
        if self.model.config.layer_experts[layer].is_dense:
            return 0
        parameters = [block.get_parameter(name) for name in EXPERT_PARAMETERS]
        parts = [part for parameter in parameters for part in parts_of(parameter).values()]
        return sum(part.nbytes // len(part) for part in parts)


def megabytes(number: int) -> str:
    """A number of bytes as people read it.

    Args:
        number (`int`): bytes.

    Example:

    ```python
    >>> from transformers_emo.analysis.trying.session import megabytes
    >>> megabytes(0), megabytes(3_250_000), megabytes(27_100_000_000)
    ('0 MB', '3.2 MB', '27.1 GB')

    ```
    """
    if number >= 1e9:
        return f"{number / 1e9:.1f} GB"
    return f"{number / 1e6:.1f} MB" if number else "0 MB"
