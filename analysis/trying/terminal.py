"""`emo chat`: lines in, answers out, and below each answer the experts that gave it.

Shape suffixes: L layers, E experts of the root model.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TextIO

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ...subsets.monitoring.domain_usage import RequestUsage
from .session import Answer, ExpertChoice, Session, Step

_MARKS = "▁▂▃▄▅▆▇█"
_HELD, _NOT_HELD = "·", " "
_DOMAINS_SHOWN = 5
HELP = """\
/domain NAME     hold only the experts of this domain (a name of the library, or a subset's file)
/full            hold all experts
/pool N          let each prompt choose N experts in every layer; /pool off
/exclude WHAT    never use these: a domain, or LAYER:ID,ID ...; /exclude off
/more            go on with the last text, with what is chosen now
/domains         the domains of the library
/experts         how much of the last routing went to each domain, and the experts used most
/help            this
/quit            end (so does the end of input)"""


@dataclass
class ChatSettings:
    """How answers are drawn and shown.

    Args:
        max_new_tokens (`int`): the longest answer.
        temperature (`float`): 0 takes the likeliest token each time.
        top_p (`float`): draw among the likeliest tokens, of so much probability together.
        seed (`int`, *optional*): for the same draws again.
        show_experts (`bool`): whether the experts stand below the answer.

    Example: see `Chat`.
    """

    max_new_tokens: int = 128
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int | None = None
    show_experts: bool = True


class Chat:
    """A conversation in a terminal, or with a file or a pipe in its place.

    Args:
        session (`Session`): the model.
        read_exclusion (`Callable`): reads the words behind `/exclude`.
        choice (`ExpertChoice`, *optional*): which experts may answer at first.
        settings (`ChatSettings`, *optional*): how answers are drawn and shown.
        source (`TextIO`, *optional*): where lines come from; stdin by default.
        console (`rich.console.Console`, *optional*): where answers go; stdout by default.

    Example:

    ```python
    >>> import io
    >>> from transformers_emo.analysis.trying import Session
    >>> from transformers_emo.analysis.trying.terminal import Chat, ChatSettings
    >>> session = Session.open("model_cards/emo-tiny", domain="python")
    >>> settings = ChatSettings(max_new_tokens=4, temperature=0, show_experts=False)
    >>> Chat(session, str.split, settings=settings, source=io.StringIO("import os")).run()
    emo-tiny: python (16 of 64 in each layer) in memory. It has no chat template: ...
    import os...
    4 tokens, ... a second; routing: ...

    ```
    """

    def __init__(
        self,
        session: Session,
        read_exclusion: Callable[[list[str]], Any],
        *,
        choice: ExpertChoice | None = None,
        settings: ChatSettings | None = None,
        source: TextIO | None = None,
        console: Console | None = None,
    ):
        self.session = session
        self.read_exclusion = read_exclusion
        self.choice = choice or ExpertChoice()
        self.settings = settings or ChatSettings()
        self.source = source or sys.stdin
        self.console = console or Console(highlight=False, soft_wrap=True, emoji=False, markup=False)
        self.history: list[tuple[str, str]] = []
        self.text = ""  # all of it, for a model that continues texts
        self.usage: RequestUsage | None = None

    @property
    def is_terminal(self) -> bool:
        """Whether a person types. Then errors are told, and the conversation goes on."""
        return self.source.isatty() and self.console.is_terminal

    def run(self) -> None:
        """Answer line by line until the input ends.

        Raises:
            ValueError: if a line cannot be answered, and no person is there to try another.
        """
        self._greet()
        for line in self._lines():
            try:
                if line.strip() in ("/quit", "/exit"):
                    return
                if line.startswith("/"):
                    self._command(line)
                elif line.strip():
                    self._answer(line)
            except (ValueError, OSError) as error:
                if not self.is_terminal:
                    raise
                self.console.print(Text(str(error), style="red"))
            except KeyboardInterrupt:  # ends the answer, not the conversation
                if not self.is_terminal:
                    raise
                self.console.print()

    def _greet(self) -> None:
        session = self.session
        kind = (
            "It answers in turns."
            if session.is_chat
            else (
                "It has no chat template: it continues the text that you type, and does not answer questions."
            )
        )
        name = session.name.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
        self.console.print(
            Text(f"{name}: {session.experts_text()} in memory. {kind} /help lists commands.", style="dim")
        )

    def _lines(self) -> Iterator[str]:
        if not self.is_terminal:
            for line in self.source:
                yield line.rstrip("\r\n")
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (lines can be edited then, and called back)
        while True:
            try:
                yield input("> ")
            except EOFError:
                self.console.print()
                return

    def _command(self, line: str) -> None:
        name, *words = line.split()
        argument = " ".join(words)
        commands: dict[str, tuple[Callable[[], None], str]] = {
            "/domain": (lambda: self._switch(argument), "a domain"),
            "/full": (lambda: self._switch(None), ""),
            "/pool": (lambda: self._set_pool(argument), "a number, or off"),
            "/exclude": (lambda: self._set_exclusion(words), "a domain, LAYER:ID,ID, or off"),
            "/more": (self._go_on, ""),
            "/domains": (
                lambda: self._say(", ".join(self.session.domains) or "The model has no library."),
                "",
            ),
            "/experts": (self._tell_experts, ""),
            "/help": (lambda: self._say(HELP), ""),
        }
        if name not in commands:
            raise ValueError(
                f"There is no command {name!r}: /help lists them. A text cannot begin with a slash."
            )
        run, wanted = commands[name]
        if bool(wanted) != bool(words):
            raise ValueError(f"{name} takes {wanted or 'nothing'}, and got {argument!r}: see /help.")
        run()

    def _switch(self, domain: str | None) -> None:
        self._say(str(self.session.switch(domain)))

    def _set_pool(self, argument: str) -> None:
        if argument == "off":
            self.choice = replace(self.choice, pool=None)
            self._say("No pool: every token picks from all experts in memory.")
            return
        if not argument.isascii() or not argument.isdigit():
            raise ValueError(f"/pool {argument}: expected a number, or off.")
        choice = replace(self.choice, pool=int(argument))
        self.session.check(choice)
        self.choice = choice
        self._say(f"Each prompt chooses {argument} experts in every layer, and its answer keeps to them.")

    def _set_exclusion(self, words: list[str]) -> None:
        if words == ["off"]:
            self.choice = replace(self.choice, exclude=None)
            self._say("No expert is excluded.")
            return
        choice = replace(self.choice, exclude=self.read_exclusion(words))
        self.session.check(choice)
        self.choice = choice
        self._say(f"Excluded: {' '.join(words)}.")

    def _go_on(self) -> None:
        if self.session.is_chat:
            raise ValueError(
                "/more continues a text, and this model answers in turns: type what you want to say."
            )
        if not self.text:
            raise ValueError("/more: there is no text to go on with. Type one first.")
        self._answer(self.text, shown=False)

    def _answer(self, prompt: str, *, shown: bool = True) -> None:
        settings = self.settings
        steps = self.session.answer(
            prompt,
            self.choice,
            history=self.history,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
        )
        # A text that is continued is shown from its beginning.
        begun = prompt if shown and not self.session.is_chat else ""
        with contextlib.closing(steps):
            show = self._show_live if self.is_terminal and settings.show_experts else self._show_plain
            told, last = show(steps, begun)
        if last is None or last.answer is None:
            return
        self.text = prompt + told
        self.usage = last.answer.usage
        if self.session.is_chat:
            self.history.append((prompt, told))
        if settings.show_experts:
            self.console.print(self._strips(last))
        self._say(self._ending(last.answer))

    def _show_plain(self, steps: Iterator[Step], begun: str) -> tuple[str, Step | None]:
        told, last = "", None
        self.console.file.write(begun)
        for last in steps:
            told += last.text
            self.console.file.write(last.text)
            self.console.file.flush()
        self.console.file.write("\n")
        return told, last

    def _show_live(self, steps: Iterator[Step], begun: str) -> tuple[str, Step | None]:
        told, last = "", None
        with Live(console=self.console, transient=True, refresh_per_second=12) as live:
            for last in steps:
                told += last.text
                strips = self._strips(last)
                lines = (
                    Text(begun, style="dim")
                    .append(told, style="not dim")
                    .wrap(self.console, self.console.width)
                )
                room = max(3, self.console.height - self.session.num_layers - 4)
                live.update(Group(Text("\n").join(lines[-room:]), strips))
        self.console.print(Text(begun, style="dim").append(told, style="not dim"))
        return told, last

    def _strips(self, step: Step) -> Table:
        """A line a layer: how often each expert was picked, the last token's in another colour."""
        table = Table.grid(padding=(0, 1))
        held = self.session.held()
        most_E = step.picks_LE.shape[1]
        per_mark = -(-most_E // max(8, self.console.width - 12))
        for layer, ids in enumerate(held):
            if ids:
                row = strip(step.picks_LE[layer], step.last_LE[layer], ids, per_mark)
                table.add_row(Text(f"layer {layer}", style="dim"), row)
        return table

    def _ending(self, answer: Answer) -> str:
        rate = answer.num_new / answer.seconds if answer.seconds else 0.0
        parts = [f"{answer.num_new} tokens, {rate:.0f} a second"]
        if answer.usage is not None:
            shares = list(answer.usage.domains.items())[:2]
            parts.append("routing: " + ", ".join(f"{name} {share.share:.0%}" for name, share in shares))
        if answer.is_cut:
            parts.append(f"ended because the model reads {self.session.context} tokens at most")
        return "; ".join(parts)

    def _tell_experts(self) -> None:
        if self.usage is None:
            raise ValueError("/experts: there is no answer yet whose domains are known.")
        table = Table("domain", "share of the routing", "by chance", box=None, padding=(0, 2, 0, 0))
        for name, share in list(self.usage.domains.items())[:_DOMAINS_SHOWN]:
            table.add_row(name, f"{share.share:.1%}", f"{share.by_chance:.1%}")
        self.console.print(table)
        tops = ", ".join(f"{e.layer}:{e.expert} {e.share:.0%}" for e in self.usage.top_experts)
        self._say(f"Used most, as layer:expert and its share of the layer: {tops}")

    def _say(self, text: str) -> None:
        self.console.print(Text(text, style="dim"))


def strip(picks_E: torch.Tensor, last_E: torch.Tensor, held: Sequence[int], per_mark: int = 1) -> Text:
    """One layer's experts as a line of marks: the higher, the more often picked.

    Args:
        picks_E (`torch.Tensor`): (E,) how often each expert was picked.
        last_E (`torch.Tensor`): (E,) the same for the last token.
        held (`Sequence[int]`): the routed experts in memory. The others are blank.
        per_mark (`int`, defaults to 1): neighbours that share a mark.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.analysis.trying.terminal import strip
    >>> strip(torch.tensor([0.0, 4.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 0.0, 1.0]), [1, 2, 3]).plain
    ' █·▃'

    ```
    """
    most = max(1.0, float(picks_E.max()))
    there = set(held)
    text = Text()
    for first in range(0, len(picks_E), per_mark):
        group = range(first, min(first + per_mark, len(picks_E)))
        picks = float(picks_E[first : first + per_mark].max())
        if picks > 0:
            mark = _MARKS[min(len(_MARKS) - 1, int(picks / most * len(_MARKS)))]
            is_last = bool(last_E[first : first + per_mark].any())
            text.append(mark, style="bold yellow" if is_last else "cyan")
        else:
            text.append(_HELD if there & set(group) else _NOT_HELD, style="dim")
    return text
