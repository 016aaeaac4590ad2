"""A session answers as `generate` does, and tells which experts it used and what an exchange of them cost."""

import itertools
import json

import pytest
import torch
from conftest import TOY, tiny_model
from transformers import AutoTokenizer, GPT2Config
from transformers_emo import EmoForCausalLM, SubsetError
from transformers_emo.analysis.trying import ExpertChoice, Session
from transformers_emo.subsets import present_experts

EMO_TINY = TOY.parent / "emo-tiny"
PROMPT = "def read(path):\n"
NOTHING_CHOSEN = ExpertChoice()


def answered(session, prompt=PROMPT, choice=NOTHING_CHOSEN, **settings):
    """The text, and the last step."""
    settings = {"max_new_tokens": 12, "temperature": 0} | settings
    steps = list(session.answer(prompt, choice, **settings))
    return "".join(step.text for step in steps), steps[-1]


def generated(session, prompt=PROMPT, **settings):
    inputs = session.tokenizer(prompt, return_tensors="pt")
    out = session.model.generate(
        **inputs, max_new_tokens=12, do_sample=False, return_experts=True, **settings
    )
    new = out.sequences[0, inputs["input_ids"].shape[1] :]
    return session.tokenizer.decode(new, skip_special_tokens=True), out.experts


def test_text_and_experts_are_those_of_generate(session):
    text, last = answered(session)
    expected, experts = generated(session)
    assert text == expected
    assert torch.equal(last.picks_LE, experts.usage()[0])
    assert last.last_LE.sum(-1).eq(3).all()
    assert (last.answer.num_new, last.answer.is_cut, last.answer.usage.nearest) == (12, False, "python")


@pytest.mark.parametrize(
    ("choice", "settings"),
    [
        (ExpertChoice(pool=6), {"document_pool": 6}),
        (ExpertChoice(exclude="python"), {"exclude_experts": "python"}),
        (ExpertChoice(8, {0: [1, 2]}), {"document_pool": 8, "exclude_experts": {0: [1, 2]}}),
    ],
    ids=str,
)
def test_a_choice_is_that_of_generate(session, choice, settings):
    text, last = answered(session, choice=choice)
    expected, experts = generated(session, **settings)
    assert text == expected
    assert torch.equal(last.picks_LE, experts.usage()[0])


def test_a_domain_is_the_model_loaded_with_it_and_its_cost_is_what_the_files_hold():
    session = Session.open(EMO_TINY, domain="python")
    loaded = EmoForCausalLM.from_pretrained(EMO_TINY, expert_subset="german")
    before = present_experts(session.model.config)
    switch = session.switch("german")
    after = present_experts(loaded.config)
    new = sum(len(set(ids) - set(old)) for ids, old in zip(after, before, strict=True))
    one = (3 * 128 * 64 + 128) * 2  # gate, up, down, and a row of the router, in bfloat16
    assert (switch.num_in, switch.num_out, switch.num_kept) == (new, new, 64 - new)
    assert (switch.bytes_in, switch.bytes_held) == (new * one, 64 * one)
    assert switch.milliseconds > 0 and f"{new} experts in" in str(switch)
    for (name, ours), theirs in zip(session.model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    back = session.switch(None)
    assert present_experts(session.model.config) == [list(range(64))] * 4
    assert (back.num_in, back.num_out) == (4 * 48, 0)
    assert session.switch("python").bytes_in == 0  # all were there


def test_an_unknown_domain_changes_nothing(session):
    with pytest.raises(SubsetError, match="no expert subset 'latin'"):
        session.switch("latin")
    assert session.domain is None and session.experts_text() == "all experts (64 of 64 in each layer)"
    with pytest.raises(SubsetError, match="no expert subset 'latin'"):
        Session.open(EMO_TINY, domain="latin")


def test_an_answer_is_drawn_again_with_its_seed(session):
    texts = [answered(session, temperature=1.0, seed=seed)[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_characters_of_several_tokens_come_whole(session):
    prompt = json.loads((EMO_TINY / "documents" / "chinese.jsonl").read_text("utf-8").splitlines()[0])[
        "text"
    ][:60]
    steps = list(session.answer(prompt, max_new_tokens=24, temperature=0))
    text = "".join(step.text for step in steps)
    assert any(ord(character) > 0x4E00 for character in text)
    assert all("\ufffd" not in step.text for step in steps[:-2])


def test_stop_ends_an_answer_with_its_last_step_and_closing_leaves_the_session_free(session):
    steps = session.answer(PROMPT, max_new_tokens=400, temperature=0)
    first = next(steps)
    session.stop()
    rest = list(steps)
    assert first.answer is None and rest[-1].answer.num_new < 400
    abandoned = session.answer(PROMPT, max_new_tokens=400, temperature=0)
    next(abandoned)
    abandoned.close()
    assert answered(session)[1].answer.num_new == 12
    session.stop()  # nothing runs


def test_prompts_and_choices_that_cannot_be_are_refused(session):
    for prompt, length in (("", 0), ("a " * 600, 601)):
        with pytest.raises(ValueError, match=r"tokens, expected 1 to 511"):
            answered(session, prompt)
        assert length == 0 or len(session.tokenizer(prompt).input_ids) >= 512
    with pytest.raises(ValueError, match="A pool of 2 experts: expected 3, which a token takes, to 63"):
        answered(session, choice=ExpertChoice(pool=2))
    with pytest.raises(SubsetError):
        answered(session, choice=ExpertChoice(exclude={9: [1]}))
    assert answered(session)[1].answer.num_new == 12


def test_an_answer_ends_where_the_context_is_full(session):
    prompt = PROMPT * 100
    length = next(n for n in itertools.count(1) if len(session.tokenizer(PROMPT * n).input_ids) > 500) - 1
    prompt = PROMPT * length
    room = session.context - len(session.tokenizer(prompt).input_ids)
    session.model.generation_config.eos_token_id, ends = None, session.model.generation_config.eos_token_id
    try:
        last = answered(session, prompt, max_new_tokens=room + 50)[1]
    finally:
        session.model.generation_config.eos_token_id = ends
    assert last.answer.num_new == room and last.answer.is_cut


def test_an_error_of_the_model_reaches_the_caller(session, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(session.model, "generate", fail)
    with pytest.raises(RuntimeError, match="no memory left"):
        answered(session)
    monkeypatch.undo()
    assert answered(session)[1].answer.num_new == 12


TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def test_a_chat_template_gets_the_conversation():
    tokenizer = AutoTokenizer.from_pretrained(EMO_TINY)
    tokenizer.chat_template = TEMPLATE
    session = Session(EmoForCausalLM.from_pretrained(EMO_TINY), tokenizer, "chatty")
    assert session.is_chat
    encoded = session._encode("and you?", [("hello", "hi")])["input_ids"]
    assert tokenizer.decode(encoded[0]) == "user: hello\nassistant: hi\nuser: and you?\nassistant:"
    assert answered(session, "hello")[1].answer.num_prompt == len(
        tokenizer("user: hello\nassistant:").input_ids
    )


def test_a_model_without_a_library_has_no_domains(tmp_path, make_checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    session = Session(tiny_model(vocab_size=len(tokenizer)), tokenizer, "tiny")
    assert session.domains == [] and answered(session)[1].answer.usage is None
    with pytest.raises(ValueError, match="has no tokenizer"):
        Session.open(make_checkpoint())
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="type 'gpt2', expected an EMO"):
        Session.open(tmp_path)
