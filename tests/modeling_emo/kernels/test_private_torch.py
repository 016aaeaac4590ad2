"""Names of PyTorch that it does not document: listed, there in this version, and missed aloud."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from transformers_emo.modeling_emo.kernels.private_torch import TESTED, USES, private_torch

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = PROJECT["tool"]["setuptools"]["package-dir"].values()
SOURCES = sorted(source for room in ROOMS for source in (ROOT / room).rglob("*.py"))


def private_names(source: str) -> set[str]:
    """What is imported from torch, or reached by dots from it, with a private part in its full name."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    private = re.compile(r"torch(\.\w+)*\._(?!_)\w+")
    return {name for name in names if private.match(name)}


@pytest.mark.parametrize("name", USES)
def test_the_name_is_there(name):
    assert private_torch(name) is not None


def test_private_names_are_found():
    source = "import torch\nfrom torch._dynamo import config\nimport torch.fx._utils\n"
    source += "def f(x):\n    return torch._C._get(x), torch.nn.functional.silu(x), x.__class__"
    found = {"torch._dynamo.config", "torch.fx._utils", "torch._C._get", "torch._C"}
    assert private_names(source) == found


def test_no_other_private_name_is_used():
    assert len(SOURCES) > 50
    used = {source.name: names for source in SOURCES if (names := private_names(source.read_text()))}
    assert used == {}


def test_every_listed_name_is_used():
    listing = ROOT / "modeling_emo" / "private_torch.py"
    code = "".join(source.read_text() for source in SOURCES if source != listing)
    assert [name for name in USES if f'private_torch("{name}")' not in code] == []


@pytest.mark.parametrize("name", ["torch._nowhere.gone", "torch.utils.weak._gone", "torch.Tensor._gone"])
def test_a_name_that_is_gone_is_named_with_its_use_the_versions_and_the_remedy(name, monkeypatch):
    monkeypatch.setitem(USES, name, "is for a test")
    with pytest.raises(ImportError) as caught:
        private_torch(name)
    for part in (f"no {name}, which is for a test", torch.__version__, TESTED, "install one of these"):
        assert part in str(caught.value)


def test_without_the_name_the_module_that_needs_it_is_not_imported():
    """Rather than running without what the name guards."""
    code = "import torch.utils._python_dispatch as place; del place.is_traceable_wrapper_subclass\n"
    code += "import transformers_emo.modeling_emo.kernels.expert_kernels"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and "is_traceable_wrapper_subclass" in run.stderr


def test_the_project_asks_for_the_versions_that_are_tested():
    (asked,) = (line for line in PROJECT["project"]["dependencies"] if line.startswith("torch>="))
    oldest, newest = TESTED.split(" to ")
    major, minor = newest.split(".")
    assert asked == f"torch>={oldest},<{major}.{int(minor) + 1}"
