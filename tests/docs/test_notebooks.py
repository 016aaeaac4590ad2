"""The notebooks are saved with their results, and run from top to bottom."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def code_cells(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def text_of(cell):
    """What a cell printed, but for warnings."""
    printed = [output for output in cell["outputs"] if output.get("name") == "stdout"]
    return "".join("".join(output["text"]) for output in printed)


def decimals(cell):
    """The numbers with two decimals or more that a cell printed, but for the Trainer's line with times."""
    lines = [line for line in text_of(cell).splitlines() if "train_runtime" not in line]
    return [float(number) for line in lines for number in re.findall(r"\d+\.\d{2,}", line)]


def test_there_are_two():
    assert len(NOTEBOOKS) == 2


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_results_are_saved_in_order_without_errors(notebook):
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs and not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert notebook.stat().st_size < 100_000


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_saved_results_name_no_folder_of_a_machine(notebook):
    place = re.compile(r"(?<![\w.])/(tmp|home|work|Users)/")
    assert not [cell for cell in code_cells(notebook) if place.search(text_of(cell))]


@pytest.mark.docs
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_gives_the_losses_that_are_saved(notebook):
    nbclient = pytest.importorskip("nbclient")  # `make test-docs` installs it
    nbformat = pytest.importorskip("nbformat")
    document = nbformat.read(notebook, as_version=4)
    where = {"metadata": {"path": str(notebook.parent)}}
    nbclient.NotebookClient(document, timeout=600, kernel_name="python3", resources=where).execute()
    now = [cell for cell in document.cells if cell.cell_type == "code"]
    losses = [decimals(cell) for cell in now]
    assert sum(map(len, losses)) >= 6
    for found, saved in zip(losses, map(decimals, code_cells(notebook)), strict=True):
        assert found == pytest.approx(saved, abs=0.05)
