"""Every public function has an example in its docstring, and every example runs."""

import doctest
import importlib
import inspect
import pkgutil
import tomllib
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).parents[1]
# In a checkout the rooms are no subfolders of the package's own folder: they are listed, not found.
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
MODULES = [
    f"{package}.{module.name}"
    for package in PACKAGES
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__)
    if not module.ispkg
]


def defined_in(module):
    """Public classes, functions and methods whose code stands in `module`."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value) or inspect.isclass(value):
            yield name, value


def test_modules_are_found():
    assert len(MODULES) >= 10 and "transformers_emo.subsets.loading.from_pretrained" in MODULES


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    module = importlib.import_module(name)
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in finder.find(module, name, extraglobs={"tmp_path": tmp_path}):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_public_names_have_an_example(name):
    lacking = []
    for defined, value in defined_in(importlib.import_module(name)):
        doc = inspect.getdoc(value) or ""
        inherits = inspect.isclass(value) and issubclass(value, transformers.PreTrainedModel)
        # Modules of the network are documented by shape; their example is the model's.
        is_part = inspect.isclass(value) and issubclass(value, torch.nn.Module) and not inherits
        if not is_part and "Example" not in doc and not _is_small(value):
            lacking.append(defined)
    assert lacking == []


def _is_small(value) -> bool:
    """Data and protocols, which a sentence describes; generic heads, with Transformers' own example."""
    if not inspect.isclass(value):
        return value.__name__ in {"main"}
    return getattr(value, "_is_protocol", False) or len(inspect.getsource(value).splitlines()) < 12
