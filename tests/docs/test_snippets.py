"""The code and the commands of the manual run as they stand, from top to bottom of each page."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer
from transformers_emo import cli
from transformers_emo.analysis import Retention
from transformers_emo.analysis.tasks import TaskScores

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [DOCS / "quick-start.md", *sorted((DOCS / "tutorials").glob("*.md"))]
ON_THE_HUB = DOCS / "tutorials" / "share.md"
BLOCK = re.compile(
    r"^(?:<!-- test: (?P<mark>[\w .]+) -->\n)?```(?P<kind>\w*)\n(?P<code>.*?)^```", re.M | re.S
)
# Beside `slow`: tests/tools and tests/engines run these, in environments that have the tools.
NOT_HERE = {"other tools", "vLLM", "MLX", "llama.cpp"}


def blocks_of(page):
    """The page's blocks of code as (kind, code, mark)."""
    found = [
        match.group("kind", "code", "mark") for match in BLOCK.finditer(page.read_text(encoding="utf-8"))
    ]
    assert {kind for kind, _, _ in found} <= {"python", "bash", "text"}, page
    assert {mark for _, _, mark in found} <= {None, "slow", *NOT_HERE}, page
    return [block for block in found if block[0] != "text"]


def folder_with_the_project(folder):
    """A folder that a reader's commands may fill, with the project's models and examples in it."""
    for name in ("model_cards", "examples"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(page, marks=(None,)):
    """Run a page's blocks in the current folder, with one namespace for all its code."""
    names = {"__name__": "__main__"}
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for kind, code, mark in blocks_of(page):
        if mark not in marks:
            continue
        if kind == "python":
            exec(compile(code, page.name, "exec"), names)
            continue
        for command in re.sub(r"\\\n\s*", "", code).splitlines():
            words = shlex.split(command, comments=True)
            if words[:1] == ["emo"] and words[1] != "run":  # in this process, which is quicker
                assert cli.main(words[1:]) == 0, command
            elif words:
                done = subprocess.run(
                    ["bash", "-c", command], env=environment, capture_output=True, text=True
                )
                assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", [page for page in PAGES if page != ON_THE_HUB], ids=lambda page: page.stem)
def test_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(folder_with_the_project(tmp_path))
    run(page)


@pytest.mark.slow
def test_training_in_two_processes_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(folder_with_the_project(tmp_path))
    run(DOCS / "tutorials" / "train-with-pools.md", ("slow",))
    assert (tmp_path / "out" / "two-processes" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_retention_command_gives_the_table_below_it(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(folder_with_the_project(tmp_path))
    page = DOCS / "tutorials" / "retention.md"
    run(page, ("slow",))
    found = Retention.read(tmp_path / "curve")
    rows = re.findall(r"^\| (\d+) \| ([+-]?\d\.\d{3}.*) \|$", page.read_text(encoding="utf-8"), re.M)
    assert [int(kept) for kept, _ in rows] == [64, 32, 16, 8, 4, 2]
    columns = [(model, method) for model in ("emo-tiny", "std-tiny") for method in ("layerwise", "random")]
    for kept, row in rows:
        for (model, method), said in zip(columns, row.split(" | "), strict=True):
            loss, full = found.loss(model, method, int(kept) / 64), found.loss(model, method, 1)
            # An expert chosen by a hair's breadth may be another one where sums round otherwise.
            assert float(said) == pytest.approx(loss if kept == "64" else loss - full, abs=0.005)
    scores = TaskScores.read(tmp_path / "scores")
    rows = re.findall(r"^\| (emo_\w+) \(.*\) \| (\d+) \| (.*) \|$", page.read_text(encoding="utf-8"), re.M)
    assert len(rows) == 2 * 5
    for task, kept, row in rows:
        for model, said in zip(("emo-tiny", "std-tiny"), row.split(" | "), strict=True):
            value = scores.value(model, task, "layerwise", int(kept)) / scores.unit(task)
            # One of 40 questions may be answered otherwise where sums round otherwise.
            assert float(said.split()[0]) == pytest.approx(value, rel=0.01, abs=2.6 if "both" in task else 0)


@pytest.mark.slow
def test_the_report_of_emo_tiny_and_its_twin_is_one_page(tmp_path, monkeypatch):
    for name in ("plotly", "sklearn", "HanTa"):
        pytest.importorskip(name)
    monkeypatch.chdir(folder_with_the_project(tmp_path))
    run(DOCS / "tutorials" / "report.md", ("slow",))
    assert 1e5 < (tmp_path / "report.html").stat().st_size < 10e6
    assert list((tmp_path / "pictures").glob("*.png"))


def test_what_is_slow_has_a_test_here():
    slow = {page.stem for page in PAGES for _, _, mark in blocks_of(page) if mark == "slow"}
    assert slow == {"train-with-pools", "retention", "report"}


def test_sharing_runs_against_a_small_hub():
    with HubServer() as hub:
        token = hub.add_user("me")
        program = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(ROOT / "tests")]!r}
from test_snippets import ON_THE_HUB, folder_with_the_project, run
from pathlib import Path
folder_with_the_project(Path.cwd())
run(ON_THE_HUB)
"""
        hub.run(program, HF_TOKEN=token)
        assert {"me/emo-code", "me/emo-code-with-its-code", "me/toy-emo"} <= set(hub.repos)
        toy = hub.repos["me/toy-emo"]
        assert "subsets/code.json" in toy.commits[toy.branches["main"]].files


def test_every_page_has_something_to_run():
    assert len(PAGES) >= 8
    for page in PAGES:
        assert any(mark is None for _, _, mark in blocks_of(page)), page
