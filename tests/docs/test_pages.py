"""What the manual and the README point to is there: pages, files, and the names in the code."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
README = ROOT / "README.md"
TEXTS = [README, ROOT / "CONTRIBUTING.md", *PAGES]
# A path of the project in backticks: its first folder is there. Results of commands are not in the project.
PATH = re.compile(r"`([\w.-]+/[\w./-]*)`")
MADE = ("build/", "out/", "short/", "curve/", "me/", "subsets/code.json", "model_and_optim/")
QUESTION = re.compile(r"^\| (?P<question>[^|]+\?) \| `(?P<file>[\w./]+)` \| `(?P<name>\w+)` \|$", re.M)


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", [README, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_links_lead_to_files_of_the_project(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_files_that_are_named_are_there(page):
    found = [path for path in PATH.findall(page.read_text(encoding="utf-8")) if not path.startswith(MADE)]
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    named = [path for path in found if path.split("/")[0] in folders]
    assert not [path for path in named if not (ROOT / path).exists()]


def test_questions_about_the_code_are_answered_by_names_that_are_there():
    rows = list(QUESTION.finditer((ROOT / "docs" / "code.md").read_text(encoding="utf-8")))
    assert len(rows) >= 15
    for row in rows:
        source = (ROOT / row["file"]).read_text(encoding="utf-8")
        assert re.search(rf"^\s*(def|class) {row['name']}\b", source, re.M), row[0]


def test_the_readme_fits_on_a_few_screens():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_every_room_is_in_the_readme_and_on_the_page_about_the_code():
    rooms = [path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()]
    assert len(rooms) >= 9
    tree = README.read_text(encoding="utf-8").split("```text")[1]
    table = (ROOT / "docs" / "code.md").read_text(encoding="utf-8")
    assert not [room for room in rooms if f"\n{room}/ " not in tree or f"| `{room}/` |" not in table]


def test_the_reference_has_a_page_for_every_room():
    rooms = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    rooms -= {
        "api",
        "imports",
    }  # what `api` exports is `transformers_emo`; `imports` exports nothing
    pages = {path.stem for path in (ROOT / "docs" / "reference").glob("*.md")}
    assert pages == rooms | {"transformers_emo"}


def test_pictures_say_what_they_show():
    for page in TEXTS:
        for described, picture in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert len(described) > 40, (page, picture)


def test_the_citation_names_this_software_and_the_paper():
    from transformers_emo import __version__

    data = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(data)
    assert data["version"] == __version__
    assert data["references"][0]["url"].endswith("2605.06663")
