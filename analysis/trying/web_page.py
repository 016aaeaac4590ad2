"""The page of `emo demo`, made with Gradio: the same choices as `emo chat`, in a browser."""

from __future__ import annotations

import contextlib
import html
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ...imports.optional_packages import import_optional
from ...subsets.monitoring.domain_usage import RequestUsage
from .heat_map import domain_bars, heat_map
from .session import Answer, ExpertChoice, Session, Switch, megabytes

ALL, DOMAIN, POOL, EXCLUDED = "All experts", "One domain", "A pool", "All but some"
_BETWEEN = 0.12  # seconds from one picture to the next, at least
_STYLE = Path(__file__).with_name("page.css")


class Page:
    """The page.

    Args:
        session (`Session`): the model. It serves one visitor after the other.
        read_exclusion (`Callable`): reads the words that name excluded experts.

    Example:

    ```python
    >>> from transformers_emo.analysis.trying import Session
    >>> from transformers_emo.analysis.trying.web_page import ALL, Page
    >>> page = Page(Session.open("model_cards/emo-tiny"), lambda words: words[0])
    >>> *_, last = page.answer("def read(", ALL, None, 8, "", 4, 0.0, "1")
    >>> last[0][:9]
    'def read('

    ```
    """

    def __init__(self, session: Session, read_exclusion: Callable[[list[str]], Any]):
        self.session = session
        self.read_exclusion = read_exclusion

    def blocks(self) -> Any:
        """`gradio.Blocks`: the page, to be launched."""
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        gr = import_optional("gradio", "The page needs")
        session = self.session
        domains = list(dict.fromkeys([*session.domains, *filter(None, [session.domain])]))
        first = ALL if session.domain is None else DOMAIN
        with gr.Blocks(title=f"{self.name}: try its experts", analytics_enabled=False) as page:
            gr.Markdown(self._about(), elem_classes="emo-about")
            with gr.Row():
                with gr.Column(scale=5, min_width=320):
                    prompt = gr.Textbox(
                        label="What you say" if session.is_chat else "Text to go on with",
                        lines=4,
                        max_lines=12,
                        placeholder="Say something."
                        if session.is_chat
                        else "Begin a text in any of the model's domains.",
                        elem_id="prompt",
                    )
                    who = gr.Radio(
                        [ALL, DOMAIN, POOL, EXCLUDED] if domains else [ALL, POOL, EXCLUDED],
                        value=first,
                        label="Experts that may answer" if session.is_chat else "Experts that may write",
                        info=_explained(first),
                        elem_id="who",
                    )
                    domain = gr.Dropdown(
                        domains,
                        value=session.domain or (domains[0] if domains else None),
                        label="Domain",
                        visible=first == DOMAIN,
                        elem_id="domain",
                    )
                    pool = gr.Slider(
                        session.picks,
                        session.num_routed,
                        value=session.usual_pool,
                        step=1,
                        label="Experts in the pool of each layer",
                        visible=False,
                        elem_id="pool",
                    )
                    excluded = gr.Textbox(
                        label="Never use",
                        info="A domain, or LAYER:ID,ID and more of these with spaces between them.",
                        placeholder=", ".join(session.domains[:3]) or "0:3,17 2:5",
                        visible=False,
                        elem_id="excluded",
                    )
                    with gr.Row():
                        answer = gr.Button(
                            "Answer" if session.is_chat else "Write",
                            variant="primary",
                            min_width=80,
                            elem_id="answer",
                        )
                        more = gr.Button("Go on", visible=not session.is_chat, min_width=80, elem_id="more")
                        stop = gr.Button("Stop", min_width=80, elem_id="stop")
                    with gr.Accordion("How text is drawn", open=False, elem_id="drawing"):
                        longest = gr.Slider(
                            1,
                            session.context - 1,
                            value=min(96, session.context // 2),
                            step=1,
                            label="Longest answer, in tokens",
                        )
                        temperature = gr.Slider(
                            0,
                            1.5,
                            value=0.7,
                            step=0.05,
                            label="Temperature",
                            info="0 takes the likeliest token each time.",
                        )
                        seed = gr.Textbox(label="Seed", info="Empty: other draws each time.", elem_id="seed")
                with gr.Column(scale=6, min_width=320):
                    text = gr.Textbox(
                        label="Conversation" if session.is_chat else "Text",
                        lines=9,
                        max_lines=18,
                        interactive=False,
                        buttons=["copy"],
                        elem_id="text",
                    )
                    told = gr.HTML(self._held, elem_id="told")
                    picture = gr.HTML(self._empty, elem_id="map")
                    bars = gr.HTML(elem_id="domains")
            chosen = [who, domain, pool, excluded, longest, temperature, seed]
            shown = [text, told, picture, bars]
            said = gr.State([])
            one = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "hidden"}
            who.change(
                self._show_options, who, [who, domain, pool, excluded], queue=False, show_progress="hidden"
            )
            if session.is_chat:
                gr.on(
                    [answer.click, prompt.submit],
                    self.converse,
                    [prompt, said, *chosen],
                    [*shown, said],
                    **one,
                )
            else:
                gr.on([answer.click, prompt.submit], self.answer, [prompt, *chosen], shown, **one)
                more.click(self.answer, [text, *chosen], shown, **one)
            stop.click(session.stop, queue=False, show_progress="hidden")
        return page

    @property
    def name(self) -> str:
        """What the model is called: the last part of its folder or repository."""
        return self.session.name.rstrip("/\\").replace("\\", "/").rpartition("/")[2]

    def answer(
        self,
        prompt: str,
        who: str,
        domain: str | None,
        pool: int,
        excluded: str,
        longest: int,
        temperature: float,
        seed: str,
    ) -> Iterator[tuple[str, str, str, str]]:
        """Go on with a text, with the experts that the controls say.

        Args:
            prompt (`str`): the text.
            who (`str`): one of the choices of the page.
            domain (`str`, *optional*): whose experts, for the choice of one domain.
            pool (`int`): the size of the pool, for that choice.
            excluded (`str`): what is excluded, for that choice.
            longest (`int`): the longest answer.
            temperature (`float`): 0 takes the likeliest token each time.
            seed (`str`): a number, for the same draws again, or nothing.

        Returns:
            An iterator over what the page shows: the text, the cost, the picture of the experts and the
            domains.
        """
        yield from self._answer(prompt, prompt, [], who, domain, pool, excluded, longest, temperature, seed)

    def converse(self, prompt: str, said: list, *chosen: Any) -> Iterator[tuple[str, str, str, str, list]]:
        """Answer in a conversation; as `answer`, with what was said before.

        Args:
            prompt (`str`): what the user says.
            said (`list`): pairs of what was said and answered before.
            chosen: the other controls, as in `answer`.
        """
        before = "".join(f"You: {question}\n\n{answer}\n\n" for question, answer in said)
        begun = f"{before}You: {prompt}\n\n"
        shown = ("", "", "", "")
        for shown in self._answer(prompt, begun, said, *chosen):
            yield *shown, said
        yield *shown, [*said, (prompt, shown[0][len(begun) :])]

    def _answer(
        self, prompt: str, begun: str, said: list, who: str, domain: str | None, pool: int, excluded: str,
        longest: int, temperature: float, seed: str,
    ) -> Iterator[tuple[str, str, str, str]]:  # fmt: skip
        session = self.session
        bars = _headed("Domains whose experts were used", '<div class="emo soft">...</div>')
        try:
            if not prompt.strip():
                raise ValueError("There is no text yet: type one first.")
            wanted = domain if who == DOMAIN else None
            exclude = self.read_exclusion(excluded.split()) if who == EXCLUDED else None
            if who == EXCLUDED and exclude is None:
                raise ValueError("Nothing is excluded yet: name a domain, or experts like 0:3,17.")
            told = self._held()
            if wanted != session.domain:
                told = _cost(session.switch(wanted))
            choice = ExpertChoice(int(pool) if who == POOL else None, exclude)
            settings: dict[str, Any] = {"max_new_tokens": int(longest), "temperature": temperature}
            if seed.strip() and not re.fullmatch(r"\d{1,18}", seed.strip()):
                raise ValueError(f"The seed is {seed!r}, expected a number from 0, or nothing.")
            settings["seed"] = int(seed) if seed.strip() else None
            steps = session.answer(prompt, choice, history=said, **settings)
            text, held, last_time = begun, session.held(), 0.0
            with contextlib.closing(steps):
                for step in steps:
                    text += step.text
                    if step.answer is not None:
                        told += _ending(step.answer, session.context)
                        bars = self._bars(step.answer.usage)
                    elif time.monotonic() - last_time < _BETWEEN:
                        continue
                    last_time = time.monotonic()
                    yield text, told, _map(step.picks_LE, step.last_LE, held), bars
        except (ValueError, OSError) as error:
            gr = import_optional("gradio", "The page needs")
            raise gr.Error(
                html.escape(str(error), quote=False), title="Not answered", print_exception=False
            ) from error

    def _show_options(self, who: str) -> tuple:
        gr = import_optional("gradio", "The page needs")
        return (
            gr.update(info=_explained(who)),
            gr.update(visible=who == DOMAIN),
            gr.update(visible=who == POOL),
            gr.update(visible=who == EXCLUDED),
        )

    def _about(self) -> str:
        session = self.session
        kind = (
            "It answers in turns."
            if session.is_chat
            else "It has no chat template: it goes on with your text, and does not answer questions."
        )
        return (
            f"## {html.escape(self.name)}\n\nA mixture of experts with {session.num_layers} layers of "
            f"{session.num_routed} routed experts, of which a token takes {session.picks}. "
            f"{kind} Choose which experts may write, and see which do. "
            "Between two texts the experts in memory can be exchanged: *Go on* then continues with others."
        )

    def _held(self) -> str:
        return f'<div class="emo emo-cost soft">In memory: {html.escape(self.session.experts_text())}.</div>'

    def _empty(self) -> str:
        none_LE = torch.zeros(self.session.num_layers, self.session.num_experts)
        return _map(none_LE, none_LE, self.session.held())

    def _bars(self, usage: RequestUsage | None) -> str:
        domain = self.session.domain
        only = "" if domain is None else f"Only the experts of {html.escape(domain)} were in memory. "
        note = f'<div class="emo soft">{only}An expert may belong to several domains.</div>'
        return _headed("Domains whose experts were used", domain_bars(usage) + (note if usage else ""))


def _map(picks_LE: torch.Tensor, last_LE: torch.Tensor, held: list[list[int]]) -> str:
    return _headed("Experts that fire, layer by layer", heat_map(picks_LE, last_LE, held))


def _headed(head: str, body: str) -> str:
    return f'<h3 class="emo-head">{head}</h3>{body}'


def _explained(who: str) -> str:
    return {
        ALL: "Every token picks from all of them.",
        DOMAIN: "Only this domain's experts stay in memory. What is lacking is read from the files.",
        POOL: "The prompt chooses some experts in each layer, and the text keeps to them.",
        EXCLUDED: "All experts are in memory, and some are never picked.",
    }[who]


def _cost(switch: Switch) -> str:
    domain = html.escape(switch.domain or "all experts")
    read, held = (megabytes(number).replace(" ", "&nbsp;") for number in (switch.bytes_in, switch.bytes_held))
    return (
        f'<div class="emo emo-cost">Exchanged for <b>{domain}</b>: read <b>{read}</b> in '
        f"<b>{switch.milliseconds:.0f}&nbsp;ms</b>. {switch.num_in} experts came, {switch.num_out} went, "
        f"{switch.num_kept} stayed; {held} of experts are in memory.</div>"
    )


def _ending(answer: Answer, context: int) -> str:
    rate = answer.num_new / answer.seconds if answer.seconds else 0
    cut = f" It ended because the model reads {context} tokens at most." if answer.is_cut else ""
    told = f"{answer.num_new} tokens in {answer.seconds:.1f} s, {rate:.0f} a second.{cut}"
    return f'<div class="emo soft">{told}</div>'


def launch_page(
    session: Session,
    read_exclusion: Callable[[list[str]], Any],
    *,
    host: str | None = None,
    port: int | None = None,
    block: bool = True,
) -> str:
    """Serve the page. Nothing is asked of any other server.

    Args:
        session (`Session`): the model.
        read_exclusion (`Callable`): reads the words that name excluded experts.
        host (`str`, *optional*): the address to listen at; this machine alone by default, or what
            `GRADIO_SERVER_NAME` says.
        port (`int`, *optional*): by default the first free one from 7860 on, or what `GRADIO_SERVER_PORT`
            says.
        block (`bool`, defaults to `True`): return when the server is stopped.

    Returns:
        `str`: the page's address.

    Raises:
        ImportError: if Gradio is not installed.
        OSError: if the port is taken.

    Example: see `emo demo`.
    """
    page = Page(session, read_exclusion).blocks()
    gr = import_optional("gradio", "The page needs")
    plain = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=[],
        theme=gr.themes.Default(primary_hue="blue", **plain),
        css_paths=_STYLE,
    )
    if block:
        print(f"{session.name}: {url}", flush=True)
        page.block_thread()
    return url
