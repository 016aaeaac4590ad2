"""`emo chat` and `emo demo` refuse at once what cannot work, and pass their options on."""

import io
import sys

import pytest
from conftest import TOY
from transformers_emo.analysis.trying import Session, terminal
from transformers_emo.cli import main

EMO_TINY = str(TOY.parent / "emo-tiny")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["chat", EMO_TINY, "--domain", "latin"], "no expert subset 'latin'"),
        (["chat", EMO_TINY, "--pool", "2"], "A pool of 2 experts: expected 3, which a token takes, to 63"),
        (["chat", EMO_TINY, "--domain", "python", "--pool", "16"], "to 15, which a layer holds"),
        (["chat", EMO_TINY, "--exclude", "0:1", "--exclude", "python"], "expected LAYER:ID,ID"),
        (["chat", EMO_TINY, "--exclude", "7:1"], "7"),
        (["chat", "no-such-folder/model"], "no-such-folder/model"),
    ],
    ids=lambda value: " ".join(value[2:]) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_told_before_a_line_is_read(words, told, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # reading from it would be another error
    assert main(words) == 1
    assert told in capsys.readouterr().err


def test_options_of_chat_reach_the_answer(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("def read(\n"))
    asked = []
    answer = Session.answer

    def note(self, *arguments, **settings):
        asked.append((arguments, settings))
        return answer(self, *arguments, **settings)

    monkeypatch.setattr(Session, "answer", note)
    words = ["--pool", "5", "--exclude", "1:2,3", "--max-new-tokens", "3", "--seed", "4"]
    words += ["--temperature", "0.5", "--top-p", "0.8"]
    assert main(["chat", EMO_TINY, *words]) == 0
    [(arguments, settings)] = asked
    assert arguments == ("def read(", terminal.ExpertChoice(5, {1: [2, 3]}))
    assert settings == {"history": [], "max_new_tokens": 3, "temperature": 0.5, "top_p": 0.8, "seed": 4}
    assert "layer 3" in capsys.readouterr().out


def test_demo_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", EMO_TINY]) == 1
    assert "gradio" in capsys.readouterr().err


def test_demo_passes_its_address_on(monkeypatch):
    web_page = pytest.importorskip("transformers_emo.analysis.trying.web_page")
    pytest.importorskip("gradio", reason="Gradio is not installed: make test-demo")
    seen = []
    monkeypatch.setattr(
        web_page, "launch_page", lambda session, read, **where: seen.append((session.domain, where))
    )
    assert main(["demo", EMO_TINY, "--domain", "german", "--port", "7999", "--host", "0.0.0.0"]) == 0
    assert seen == [("german", {"host": "0.0.0.0", "port": 7999})]
