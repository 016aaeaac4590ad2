"""The conversation in a terminal and through a pipe."""

import io

import pytest
import torch
from rich.console import Console
from transformers_emo.analysis.trying import terminal
from transformers_emo.analysis.trying.terminal import Chat, ChatSettings, strip
from transformers_emo.commands.shared import excluded_experts

CODE = "from os import path, environ; import sys; def main(argv):"
PLAIN = ChatSettings(max_new_tokens=6, temperature=0)


class Keyboard(io.StringIO):
    def isatty(self):
        return True


def chat(session, text, *, settings=PLAIN, typed=False, monkeypatch=None, width=100):
    """What is printed."""
    out = io.StringIO()
    source = Keyboard(text) if typed else io.StringIO(text)
    if typed:
        lines = iter(text.splitlines())

        def type_line(prompt):
            try:
                return next(lines)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", type_line)
    console = Console(file=out, force_terminal=typed, width=width, height=40, highlight=False, soft_wrap=True,
                      markup=False, emoji=False)  # fmt: skip
    Chat(session, excluded_experts, settings=settings, source=source, console=console).run()
    return out.getvalue()


def test_lines_are_answered_and_the_experts_stand_below(session):
    lines = chat(session, f"{CODE}\n").splitlines()
    assert "all experts (64 of 64 in each layer) in memory. It has no chat template" in lines[0]
    assert lines[1].startswith(CODE)
    strips = [line for line in lines if line.startswith("layer ")]
    assert [line[:7] for line in strips] == [f"layer {n}" for n in range(4)]
    assert all(len(line.rstrip()) <= 8 + 64 and any(mark in line for mark in "▁▂▃▄▅▆▇█") for line in strips)
    assert lines[-1].startswith("6 tokens, ") and "routing: python" in lines[-1]


def test_experts_can_be_left_out_and_narrow_terminals_get_fewer_marks(session):
    assert "layer 0" not in chat(session, "x\n", settings=ChatSettings(6, 0, show_experts=False))
    narrow = [line for line in chat(session, "x\n", width=44).splitlines() if line.startswith("layer ")]
    assert len(narrow) == 4 and all(len(line.rstrip()) <= 8 + 32 for line in narrow)


def test_commands_change_the_experts_and_the_text_goes_on(session):
    told = chat(
        session,
        "def read(\n/domain german\n/more\n/full\n/pool 6\n/pool off\n/exclude 0:1,2 1:5\n/exclude python\n"
        "def read(\n/experts\n/exclude off\n/domains\n/help\n/quit\nnot read\n",
    )
    assert "german: 0 MB read (0 experts in, 192 out, 64 kept)" in told
    assert "all experts: 9.5 MB read (192 experts in, 0 out, 64 kept)" in told
    assert "Each prompt chooses 6 experts in every layer" in told and "No pool" in told
    assert "Excluded: 0:1,2 1:5." in told and "Excluded: python." in told and "No expert is excluded." in told
    lines = told.splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("domain "))
    shares = [line.split()[0] for line in lines[begin + 1 : begin + 6]]
    assert set(shares) < set(session.domains) and "python" not in shares  # it got nothing
    assert "c, chinese, coq" in told and "/domain NAME" in told and "not read" not in told


def test_more_continues_the_text_with_the_experts_chosen_now(session):
    first = chat(session, "def read(\n", settings=ChatSettings(6, 0, show_experts=False)).splitlines()[1:-1]
    both = chat(session, "def read(\n/more\n", settings=ChatSettings(6, 0, show_experts=False))
    long = chat(session, "def read(\n", settings=ChatSettings(12, 0, show_experts=False)).splitlines()[1:-1]
    whole = "\n".join(long)
    assert whole.startswith("\n".join(first))
    # What comes behind the first answer is what one long answer has there.
    assert whole[len("\n".join(first)) :].strip("\n").splitlines()[-1] in both


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/domain", "/domain takes a domain, and got ''"),
        ("/domain latin", "no expert subset 'latin'"),
        ("/full now", "/full takes nothing, and got 'now'"),
        ("/pool many", "/pool many: expected a number, or off"),
        ("/pool 2", "A pool of 2 experts: expected 3"),
        ("/exclude 9:1", "9"),
        ("/more", "no text to go on with"),
        ("/experts", "no answer yet"),
        ("/nothing", "no command '/nothing'"),
        ("x " * 600, "expected 1 to 511"),
    ],
)
def test_a_bad_line_ends_a_pipe_and_is_told_to_a_person(session, line, told, monkeypatch):
    with pytest.raises(ValueError, match=told):
        chat(session, f"{line}\nx\n")
    typed = chat(session, f"{line}\ndef read(\n", typed=True, monkeypatch=monkeypatch)
    assert told in typed.replace("\n", " ") and "6 tokens" in typed


def test_a_terminal_shows_the_answer_while_it_comes(session, monkeypatch):
    shown = []
    update = terminal.Live.update
    monkeypatch.setattr(
        terminal.Live, "update", lambda self, *a, **k: (shown.append(1), update(self, *a, **k))[1]
    )
    told = chat(session, "def read(\n", typed=True, monkeypatch=monkeypatch)
    assert shown and "layer 3" in told and "6 tokens" in told


def test_ctrl_c_ends_an_answer_and_not_the_conversation(session, monkeypatch):
    update, calls = terminal.Live.update, []

    def interrupt(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return update(self, *args, **kwargs)

    monkeypatch.setattr(terminal.Live, "update", interrupt)
    told = chat(session, "def read(\ndef read(\n", typed=True, monkeypatch=monkeypatch)
    assert told.count("6 tokens") == 1


def test_a_conversation_in_turns_remembers(session, monkeypatch):
    monkeypatch.setattr(
        session.tokenizer, "chat_template", "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    )
    seen = []
    encode = session._encode
    monkeypatch.setattr(session, "_encode", lambda p, h: (seen.append((p, list(h))), encode(p, h))[1])
    told = chat(session, "one\ntwo\n")
    assert "It answers in turns." in told
    assert seen[0] == ("one", []) and seen[1][0] == "two" and seen[1][1][0][0] == "one"
    with pytest.raises(ValueError, match="/more continues a text"):
        chat(session, "/more\n")


def test_marks_grow_with_picks_and_show_what_is_held():
    text = strip(torch.tensor([8.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0, 0.0]), [0, 1, 2])
    assert text.plain == "█▂· "
    assert [span.style for span in text.spans][:2] == ["cyan", "bold yellow"]
    assert strip(torch.tensor([8.0, 0.0, 0.0, 0.0]), torch.zeros(4), [0, 3], per_mark=2).plain == "█·"
