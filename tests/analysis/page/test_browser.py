"""The page in a real Chromium: it opens, every control does what it says, and it can be read anywhere.

`make test-report` runs these. They want Playwright from PyPI and a Chromium (Debian: `apt install chromium`).
"""

import csv

import pytest
from chromium import open_chromium

pytestmark = pytest.mark.report


@pytest.fixture(scope="module")
def browser():
    with open_chromium() as browser:
        yield browser


@pytest.fixture
def opened(browser, page_file):
    """Opens the page; at the end nothing may have gone wrong in it, and nothing been asked of a network."""
    told, contexts = [], []

    def open_page(*, width=1280, height=900, scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            offline=True,
            accept_downloads=True,
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: told.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on(
            "request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else told.append(r.url)
        )
        page.goto(page_file.as_uri())
        page.wait_for_selector("#figure-stability .main-svg")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert told == []


def drawn(page, place):
    """What a figure shows, as JSON text."""
    return page.evaluate("id => JSON.stringify([...document.querySelectorAll(`#${id} .plot`)].map("
                         "plot => [plot.data, plot.layout.title]))", place)  # fmt: skip


SET = """([id, value]) => {
    const control = document.getElementById(id);
    control.value = value;
    control.dispatchEvent(new Event("input", {bubbles: true}));
}"""


def set_control(page, control, value):
    page.evaluate(SET, [control, str(value)])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_opens_and_nothing_sticks_out(opened, width, scheme):
    page = opened(width=width, scheme=scheme)
    assert page.title() == "Toys & <twins>"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".plot .main-svg").count() >= 9
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    assert page.locator(".empty").count() == 0


CONTROLS = [
    ("retention-method", "random", "figure-retention"),
    ("retention-shown", "loss", "figure-retention"),
    ("maps-layer", "3", "figure-maps"),
    ("maps-scale", "share", "figure-maps"),
    ("words-layer", "2", "figure-words"),
    ("clusters-model", "1", "figure-composition"),
    ("clusters-cluster", "2", "figure-composition"),
    ("clusters-by", "cluster", "figure-plane"),
    ("route-model", "1", "figure-route"),
    ("route-document", "3", "figure-route"),
    ("route-token", "7", "figure-route"),
]


@pytest.mark.parametrize(("control", "value", "place"), CONTROLS)
def test_a_control_changes_its_figure(opened, control, value, place):
    page = opened()
    before = drawn(page, place)
    set_control(page, control, value)
    assert drawn(page, place) != before


def test_every_control_was_tried(opened):
    page = opened()
    found = page.evaluate("[...document.querySelectorAll('select, input')].map(c => c.id)")
    others = {"retention-domain", "similar-by", "clusters-document", "numbers-layer"}  # in tests of their own
    assert set(found) == {control for control, _, _ in CONTROLS} | others


def test_the_curve_of_a_domain(opened, content):
    page = opened()
    domain = content["retention"]["domains"][2]
    page.locator("#retention-domain").select_option(domain)
    shown = page.evaluate("document.querySelector('#figure-retention .plot').data[0]")
    points = content["retention"]["curves"][0]["points"][domain]
    assert shown["y"] == [point["rise"] for point in points]
    assert len(page.evaluate("document.querySelector('#figure-retention .plot').data")) == 4


def test_the_cliff_is_marked_on_the_mean(opened, content):
    page = opened()
    data = page.evaluate("document.querySelector('#figure-retention .plot').data")
    marks = [trace["x"][0] for trace in data if trace.get("marker", {}).get("symbol") == "diamond"]
    curves = [c for c in content["retention"]["curves"] if c["method"] == "layerwise"]
    assert marks == [curve["cliff"] for curve in curves]


def test_similarity_is_shown_as_chosen(opened, content):
    page = opened()
    name = "overlap of subsets of 1/4 of the experts"
    page.locator("#similar-by").select_option(name)
    shown = page.evaluate("[...document.querySelectorAll('#figure-similar .plot')].map(p => p.data[0].z)")
    assert shown == [model["similar"][name] for model in content["models"]]


def test_numbers_of_a_layer(opened, content):
    page = opened()
    row = page.locator("#numbers-table tr", has_text="topic cosine").first
    assert len(row.locator("td").all()) == 5
    before = row.inner_text()
    page.locator("#numbers-layer").select_option("1")
    exact = next(
        n for n in content["models"][0]["numbers"] if n["name"] == "topic cosine" and n.get("layer") == 1
    )
    assert f"{exact['value']:.2f}" in row.inner_text() and row.inner_text() != before


def test_tokens_can_be_read_by_mouse_and_by_keys(opened, content):
    page = opened()
    one = content["models"][0]["shown"][2]
    page.locator("#clusters-document").select_option("2")
    tokens, said = page.locator("#clusters-text span"), page.locator("#clusters-token")
    assert tokens.count() == len(one["pieces"])
    tokens.nth(5).hover()
    assert f"cluster {one['clusters'][5] + 1}," in said.inner_text()
    tokens.nth(8).click()
    for key, place in (("ArrowRight", 9), ("ArrowLeft", 8), ("End", 47), ("Home", 0)):
        page.keyboard.press(key)
        chosen = page.locator("#clusters-text [aria-selected='true']")
        assert chosen.count() == 1 and chosen.evaluate("s => [...s.parentNode.children].indexOf(s)") == place
        assert f"cluster {one['clusters'][place] + 1}," in said.inner_text()
    assert chosen.evaluate("s => s === document.activeElement")


def test_the_route_follows_the_token(opened, content):
    page = opened()
    model = content["models"][0]
    page.locator("#route-text span").nth(11).click()
    marks = page.evaluate("(({x, y}) => ({x, y}))(document.querySelector('#figure-route .plot').data[1])")
    exact = [
        (shown["places"].index(pick), layer)
        for layer, shown in enumerate(model["maps"])
        for pick in model["shown"][0]["picks"][layer][11]
    ]
    assert list(zip(marks["x"], marks["y"], strict=True)) == exact
    assert page.locator("#route-token").input_value() == "11"
    page.locator("#route-token").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#route-token-name").inner_text().startswith("13:")
    assert page.locator("#route-text [aria-selected='true']").evaluate(
        "s => [...s.parentNode.children].indexOf(s)"
    ) == 12  # fmt: skip


def test_colours_can_be_changed_and_can_be_read(opened):
    page = opened(scheme="dark")
    for theme in ("dark", "light"):
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        back = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--back').trim()")
        plots = page.evaluate("[...document.querySelectorAll('.plot')].map(p => p.layout.paper_bgcolor)")
        assert set(plots) == {back}
        for pair in (
            ("text", "back"),
            ("soft", "back"),
            ("text", "card"),
            ("link", "back"),
            ("soft", "card"),
        ):
            assert contrast(page, *pair) >= 4.5, (theme, pair)
        page.locator("#theme").click()


def contrast(page, one, other):
    """The ratio that WCAG asks to be 4.5 for text."""
    values = []
    for name in (one, other):
        code = page.evaluate(
            f"getComputedStyle(document.documentElement).getPropertyValue('--{name}').trim()"
        )
        parts = [int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        values.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(values) + 0.05) / (min(values) + 0.05)


@pytest.mark.parametrize(
    ("format", "start"), [("PNG", b"\x89PNG"), ("SVG", b"<svg"), ("CSV", b"model,chosen by")]
)
def test_a_figure_is_saved(opened, content, format, start):
    page = opened()
    with page.expect_download() as download:
        page.get_by_role("button", name=f"Save retention curve as {format}").click()
    path = download.value.path()
    assert path.read_bytes().startswith(start)
    if format == "CSV":
        rows = list(csv.DictReader(path.open()))
        mean = content["retention"]["domains"][0]
        assert len(rows) == sum(len(curve["points"][mean]) for curve in content["retention"]["curves"])
        assert float(rows[1]["rise"]) == content["retention"]["curves"][0]["points"][mean][1]["rise"]


def test_the_data_of_a_figure_is_shown_as_a_table(opened, content):
    page = opened()
    details = page.locator("#figure-words details")
    details.locator("summary").click()
    cells = details.locator("tbody tr").first.locator("td").all_text_contents()
    exact = next(n for n in content["models"][0]["numbers"] if n["name"] == "domain" and "layer" not in n)
    assert cells[:2] == ["toy", "domain"] and float(cells[2]) == pytest.approx(exact["value"])


def test_everything_that_can_be_used_has_a_name_and_is_reached_by_tab(opened):
    page = opened()
    unnamed = page.evaluate(
        "[...document.querySelectorAll('select, input, button, [role=listbox], [role=region], [role=img]')]"
        ".filter(c => !(c.labels?.length || c.getAttribute('aria-label') || c.textContent.trim()))"
        ".map(c => c.outerHTML.slice(0, 80))"
    )
    assert unnamed == []
    reached = set()
    for _ in range(150):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("document.activeElement.id || document.activeElement.parentElement?.id || ''")
        )
    wanted = page.evaluate("[...document.querySelectorAll('select, input, #theme')].map(c => c.id)")
    assert set(wanted) | {"clusters-text", "route-text", "numbers-table"} <= reached
