"""What the page's controls do, without a browser."""

import pytest
from transformers_emo.analysis.trying.web_page import ALL, DOMAIN, POOL, Page
from transformers_emo.commands.shared import excluded_experts

SETTINGS = (8, "", 6, 0.0, "")  # pool, excluded, longest, temperature, seed


def test_a_domain_is_brought_in_once_and_its_cost_is_told(session):
    page = Page(session, excluded_experts)
    *_, (text, told, picture, bars) = page.answer("def read(", DOMAIN, "german", *SETTINGS)
    assert text.startswith("def read(") and session.domain == "german"
    assert "Exchanged for <b>german</b>: read <b>0&nbsp;MB</b>" in told and "6 tokens in" in told
    assert picture.count("<title>") > 0 and "Only the experts of german were in memory." in bars
    *_, (_, told, _, _) = page.answer("def read(", DOMAIN, "german", *SETTINGS)
    assert "Exchanged" not in told and "In memory: german (16 of 64 in each layer)" in told
    *_, (_, told, _, _) = page.answer("def read(", POOL, "german", *SETTINGS)
    assert "Exchanged for <b>all experts</b>" in told  # the prompt chooses among all


def test_a_conversation_remembers_and_shows_what_was_said(session, monkeypatch):
    monkeypatch.setattr(
        session.tokenizer, "chat_template", "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    )
    page = Page(session, excluded_experts)
    *_, (text, _, _, _, said) = page.converse("one", [], ALL, None, *SETTINGS)
    [(question, answer)] = said
    assert question == "one" and text == f"You: one\n\n{answer}"
    *_, (text, _, _, _, more) = page.converse("two", said, ALL, None, *SETTINGS)
    assert text.startswith(f"You: one\n\n{answer}\n\nYou: two\n\n") and len(more) == 2


def test_a_page_for_a_conversation_has_no_button_to_go_on(session, monkeypatch):
    pytest.importorskip("gradio", reason="Gradio is not installed: make test-demo")
    shown = {}
    for kind, template in (("text", None), ("turns", "{{ messages }}")):
        monkeypatch.setattr(session.tokenizer, "chat_template", template)
        parts = Page(session, excluded_experts).blocks().config["components"]
        shown[kind] = {part["props"].get("value"): part["props"].get("visible") for part in parts
                       if part["type"] == "button"}  # fmt: skip
    assert shown["text"]["Go on"] and "Write" in shown["text"]
    assert not shown["turns"]["Go on"] and "Answer" in shown["turns"]


def test_a_model_opened_with_a_domain_begins_with_it(session):
    pytest.importorskip("gradio", reason="Gradio is not installed: make test-demo")
    session.switch("python")
    parts = Page(session, excluded_experts).blocks().config["components"]
    values = {part["props"].get("elem_id"): part["props"] for part in parts}
    assert (values["who"]["value"], values["domain"]["value"]) == (DOMAIN, "python")
    assert values["domain"]["visible"] and values["pool"]["maximum"] == 63


def test_a_seed_draws_the_same_again_and_nothing_draws_anew(session):
    page = Page(session, excluded_experts)

    def drawn(seed):
        *_, (text, *_) = page.answer("def read(", ALL, None, 8, "", 12, 1.2, seed)
        return text

    assert drawn("3") == drawn(" 3 ") and len({drawn("") for _ in range(4)}) > 1
    gradio = pytest.importorskip("gradio", reason="Gradio is not installed: make test-demo")
    with pytest.raises(gradio.Error, match="seed is 'x', expected a number"):
        drawn("x")
