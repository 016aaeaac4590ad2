"""The page of `emo demo` in a real Chromium: every control does what it says, and it can be read anywhere.

`make test-demo` runs these. They want Gradio and Playwright from PyPI, and a Chromium.
"""

import re

import pytest
from chromium import open_chromium
from conftest import TOY
from transformers_emo.analysis.trying import Session
from transformers_emo.commands.shared import excluded_experts

pytestmark = pytest.mark.report
ENDED = "document.querySelector('#told').innerText.includes('a second')"


@pytest.fixture(scope="module")
def browser():
    with open_chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def served():
    """The session behind the page, and the page's address."""
    gradio = pytest.importorskip("gradio", reason="Gradio is not installed: make test-demo")
    from transformers_emo.analysis.trying.web_page import launch_page

    session = Session.open(TOY.parent / "emo-tiny")
    yield session, launch_page(session, excluded_experts, block=False)
    gradio.close_all()


@pytest.fixture
def opened(browser, served):
    """Opens the page. At the end nothing may have gone wrong in it, nor been asked of another server."""
    told, contexts = [], []

    def open_page(*, width=1280, height=900, scheme="light"):
        session, url = served
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: told.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on(
            "request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else told.append(r.url)
        )
        page.goto(url)
        page.wait_for_selector("#prompt textarea")
        draw(page, longest=12)
        return page

    yield open_page
    for context in contexts:
        context.close()
    if served[0].domain is not None:
        served[0].switch(None)
    assert told == []


def draw(page, *, longest, temperature=0):
    """Set how text is drawn."""
    page.get_by_text("How text is drawn").click()
    for label, value in (("Longest answer", longest), ("Temperature", temperature)):
        page.get_by_role("spinbutton", name=re.compile(label)).fill(str(value))
        page.keyboard.press("Tab")


def write(page, text="def read(path):\n", button="#answer"):
    """Have text written, and give what stands there then."""
    page.evaluate("document.querySelectorAll('#domains .bars').forEach(bars => bars.dataset.old = 1)")
    if button == "#answer":
        page.fill("#prompt textarea", text)
    page.click(button)
    page.wait_for_selector("#domains .bars:not([data-old])", timeout=60_000)  # they come with the end
    page.wait_for_function(ENDED)
    page.wait_for_timeout(300)
    return page.input_value("#text textarea")


def picked(page):
    """By layer the experts that the picture shows as picked."""
    found = {}
    for title in page.eval_on_selector_all("#map title", "nodes => nodes.map(node => node.textContent)"):
        layer, expert = map(int, re.match(r"layer (\d+), expert (\d+):", title).groups())
        found.setdefault(layer, set()).add(expert)
    return found


def choose(page, name):
    page.get_by_label(name, exact=True).check()
    page.wait_for_timeout(500)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_opens_and_nothing_sticks_out(opened, width, scheme):
    page = opened(width=width, scheme=scheme)
    write(page)
    assert page.title() == "emo-tiny: try its experts"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    light, back = page.evaluate(
        """() => [["#told .emo", "color"], ["body", "background-color"]].map(([place, name]) => {
            const colour = getComputedStyle(document.querySelector(place)).getPropertyValue(name);
            const [red, green, blue] = colour.match(/[0-9.]+/g).map(Number);
            return 0.3 * red + 0.6 * green + 0.1 * blue;
        })"""
    )
    assert (light > back) == (scheme == "dark") and abs(light - back) > 120
    top = page.locator("#answer").bounding_box()["y"]
    assert page.locator("#stop").bounding_box()["y"] == top  # the buttons share a line on a phone too


def test_all_experts_write_what_generate_writes(opened, served):
    page, session = opened(), served[0]
    text = write(page)
    steps = list(session.answer("def read(path):\n", max_new_tokens=12, temperature=0))
    assert text == "def read(path):\n" + "".join(step.text for step in steps)
    expected = {n: set(row.nonzero().flatten().tolist()) for n, row in enumerate(steps[-1].picks_LE)}
    assert picked(page) == expected
    assert page.locator("#map .now").count() == 12
    assert page.inner_text("#domains .bars").split()[0] == "python"
    assert "12 tokens in" in page.inner_text("#told")


def test_text_streams_before_it_ends(opened):
    page = opened()
    draw_again = page.get_by_role("spinbutton", name=re.compile("Longest answer"))
    draw_again.fill("400")
    page.keyboard.press("Tab")
    page.fill("#prompt textarea", "def read(path):\n")
    page.click("#answer")
    page.wait_for_function("document.querySelector('#text textarea').value.length > 30")
    assert not page.evaluate(ENDED)
    assert picked(page)
    page.click("#stop")
    page.wait_for_function(ENDED)
    assert int(re.search(r"(\d+) tokens in", page.inner_text("#told"))[1]) < 400


def test_one_domain_exchanges_the_experts_and_go_on_continues_with_others(opened, served):
    page, session = opened(), served[0]
    assert not page.locator("#domain").is_visible()
    first = write(page)
    choose(page, "One domain")
    page.locator("#domain input").click()
    page.get_by_role("option", name="german").click()
    both = write(page, button="#more")
    assert both.startswith(first) and len(both) > len(first) and session.domain == "german"
    told = page.inner_text("#told")
    assert "Exchanged for german: read 0\xa0MB in" in told and "0 experts came, 192 went, 64 stayed" in told
    held = session.held()
    assert all(experts <= set(held[layer]) for layer, experts in picked(page).items())
    assert "Only the experts of german were in memory." in page.inner_text("#domains")
    choose(page, "All experts")
    write(page)
    assert re.search(r"Exchanged for all experts: read 9\.5\sMB in \d+\sms", page.inner_text("#told"))
    write(page)
    assert "Exchanged" not in page.inner_text("#told")


def test_a_pool_keeps_the_text_to_so_many_experts(opened):
    page = opened()
    write(page)
    assert max(map(len, picked(page).values())) > 5
    choose(page, "A pool")
    page.get_by_role("spinbutton", name=re.compile("Experts in the pool")).fill("5")
    page.keyboard.press("Tab")
    write(page)
    assert max(map(len, picked(page).values())) <= 5


def test_excluded_experts_are_never_picked(opened):
    page = opened()
    choose(page, "All but some")
    page.fill("#excluded input, #excluded textarea", "0:0,1,2,3,4,5,6 python")
    page.fill("#prompt textarea", "x")
    page.click("#answer")
    page.wait_for_selector("text=expected LAYER:ID,ID")
    page.fill("#excluded input, #excluded textarea", "python")
    write(page)
    shares = page.inner_text("#domains .bars")
    assert "python" not in shares  # it comes last, with nothing
    page.fill("#excluded input, #excluded textarea", "0:0,1,2,3,4,5,6")
    write(page)
    assert not picked(page)[0] & set(range(7))


@pytest.mark.parametrize(("who", "text", "told"), [
    ("All experts", "", "There is no text yet"), ("All but some", "x", "Nothing is excluded yet"),
    ("All experts", "a " * 700, "expected 1 to 511"),
])  # fmt: skip
def test_what_cannot_be_answered_is_told(opened, who, text, told):
    page = opened()
    choose(page, who)
    page.fill("#prompt textarea", text)
    page.click("#answer")
    page.wait_for_selector(f"text={told}")
    choose(page, "All experts")
    assert write(page).startswith("def read")  # and the page goes on


def test_a_seed_draws_the_same_again_and_keys_reach_every_control(opened):
    page = opened()
    page.get_by_role("spinbutton", name=re.compile("Temperature")).fill("1.2")
    page.keyboard.press("Tab")
    page.fill("#seed input, #seed textarea", "3")
    page.keyboard.press("Tab")
    first = write(page)
    assert write(page) == first
    page.fill("#seed input, #seed textarea", "4")
    page.keyboard.press("Tab")
    assert write(page) != first
    page.focus("#prompt textarea")
    reached = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert {"answer", "more", "stop"} <= reached
