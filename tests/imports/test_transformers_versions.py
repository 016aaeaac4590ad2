"""Another Transformers than those tested is refused, and so is one in which something is not as expected."""

import ast
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import transformers
import transformers_emo
from conftest import TOY
from transformers_emo.imports import transformers_versions
from transformers_emo.imports.transformers_versions import (
    ANY_VERSION,
    PRIVATE_NAMES,
    TESTED,
    check_names,
    check_transformers,
    private_names,
)

ROOT = Path(__file__).parents[2]
ENTRIES = [(user, entry) for user, entries in PRIVATE_NAMES.items() for entry in entries]
ROOMS = [path.parent.name for path in sorted(ROOT.glob("*/__init__.py")) if path.parent.name != "tests"]
PACKAGES = tuple(TESTED)


class Without:
    """What something is, but for one name in it, or with another thing in its place."""

    def __init__(self, whole, path, *instead):
        self._whole, self._path, self._instead = whole, path, instead

    def __getattr__(self, name):
        found = getattr(self._whole, name)
        if name != self._path[0]:
            return found
        if len(self._path) > 1:
            return Without(found, self._path[1:], *self._instead)
        if not self._instead:
            raise AttributeError(name)
        return self._instead[0]


def change(monkeypatch, entry, *instead) -> None:
    """Have the checks find a module without a name, or with another thing in its place."""
    module, _, path = entry.name.partition(":")
    found = importlib.import_module

    def changed(name):
        return Without(found(name), path.split("."), *instead) if name == module else found(name)

    monkeypatch.setattr(transformers_versions, "importlib", SimpleNamespace(import_module=changed))


def of(entries):
    return pytest.mark.parametrize(("user", "entry"), entries, ids=lambda v: getattr(v, "name", v))


def refusal(user, entry, problem: str) -> str:
    with pytest.raises(ImportError) as error, mock.patch.dict(PRIVATE_NAMES, {user: [entry]}):
        check_names(user)
    text = str(error.value)
    for part in (entry.name.partition(":")[2], entry.why, problem, *TESTED[entry.package], "`pip install "):
        assert part in text, text
    assert importlib.import_module(entry.package).__version__ in text
    return text


@of([(user, entry) for user, entry in ENTRIES if not entry.name.endswith("__init__")])
def test_a_name_that_is_gone_is_told_with_the_versions_and_the_remedy(user, entry, monkeypatch):
    change(monkeypatch, entry)
    refusal(user, entry, "there is no such name")


@of([(user, entry) for user, entry in ENTRIES if entry.first.replace("*", "").strip()])
def test_other_parameters_are_told(user, entry, monkeypatch):
    change(monkeypatch, entry, lambda other: None)
    refusal(user, entry, "its parameters are (other), expected (")


@of([(user, entry) for user, entry in ENTRIES if entry.takes and not entry.first])
def test_a_parameter_or_attribute_that_is_gone_is_told(user, entry, monkeypatch):
    change(monkeypatch, entry, type("Empty", (), {"__slots__": ()}))
    refusal(user, entry, "it has no `")


@of([(user, entry) for user, entry in ENTRIES if entry.mentions])
def test_an_override_that_nobody_calls_is_told(user, entry, monkeypatch):
    whole = importlib.import_module(entry.name.partition(":")[0])
    for part in entry.name.partition(":")[2].split("."):
        whole = getattr(whole, part)
    signature = inspect.signature(whole)
    silent = lambda *args, **kwargs: None  # noqa: E731
    silent.__signature__ = signature
    change(monkeypatch, entry, silent)
    refusal(user, entry, "it does not use `")


def test_an_import_that_fails_says_which_name_is_meant(monkeypatch):
    entry = PRIVATE_NAMES["chats"][0]
    change(monkeypatch, entry)
    with pytest.raises(ImportError, match="EMO needs `render_jinja_template`"), private_names("chats"):
        from transformers.utils.chat_template_utils import no_such_name  # noqa: F401
    monkeypatch.undo()
    with pytest.raises(ImportError, match="cannot import name 'no_such_name'"), private_names("chats"):
        from transformers.utils.chat_template_utils import no_such_name  # noqa: F401


@pytest.mark.parametrize("version", ["5.16.1", "4.57.0", "5.25.0", "5.25.0.dev0", "6.0.0", "main"])
def test_versions_that_are_not_tested_are_refused_unless_allowed(version, monkeypatch):
    monkeypatch.delenv(ANY_VERSION, raising=False)
    monkeypatch.setattr(transformers, "__version__", version)
    oldest, newest = TESTED["transformers"]
    with pytest.raises(ImportError) as error:
        check_transformers()
    for part in (
        version,
        f"{oldest} to {newest}",
        f"{ANY_VERSION}=1",
        "pip install 'transformers>=5.17,<5.25'",
    ):
        assert part in str(error.value)
    monkeypatch.setenv(ANY_VERSION, "1")
    with pytest.warns(RuntimeWarning, match=f"this is {version}: its results may be wrong"):
        check_transformers()


@pytest.mark.parametrize("version", ["5.17.0", "5.20.2", "5.24.0", "5.24.7"])
def test_versions_that_are_tested_are_taken_without_a_word(version, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_transformers()


def test_pyproject_asks_for_the_versions_that_are_tested():
    text = (ROOT / "pyproject.toml").read_text()
    assert f'"{transformers_versions._remedy("transformers").split(chr(39))[1]}"' in text
    for package in PACKAGES[1:]:
        asked = re.search(rf'"{package}(\[\w+\])?(>=(?P<least>[\d.]+))?"', text)
        oldest = TESTED[package][0]
        assert asked and f"{oldest}.".startswith(f"{asked['least'] or oldest}."), package
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert {f"{package}=={newest}" for package, (_, newest) in TESTED.items()} <= set(pinned)


TRIALS = """
import os, sys, warnings
import transformers
transformers.__version__ = "5.31.0"
sys.path.insert(0, sys.argv[1])
from transformers import AutoModelForCausalLM

def trial(load, path, **kwargs):
    try:
        load(path, **kwargs)
    except Exception as error:
        print(type(error).__name__, str(error).replace("\\n", " "))

trial(AutoModelForCausalLM.from_pretrained, sys.argv[2], trust_remote_code=True)
import transformers_emo
transformers_emo.EmoConfig.from_pretrained(sys.argv[3])
trial(AutoModelForCausalLM.from_pretrained, sys.argv[3])
trial(lambda _: transformers_emo.EmoForCausalLM, "")
os.environ["EMO_ANY_TRANSFORMERS"] = "1"
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    AutoModelForCausalLM.from_pretrained(sys.argv[3])
    AutoModelForCausalLM.from_pretrained(sys.argv[3])
print(sum("results may be wrong" in str(warning.message) for warning in said))
"""


def test_a_model_and_a_saved_copy_of_its_code_refuse_an_unknown_transformers(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "copy", include_code=True)
    command = [sys.executable, "-W", "ignore", "-c", TRIALS, str(tmp_path), str(tmp_path / "copy"), str(TOY)]
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), ANY_VERSION: "0"}
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert result.returncode == 0, result.stderr
    *refusals, warned = result.stdout.splitlines()
    assert len(refusals) == 3 and warned == "1"
    for refused in refusals:
        assert refused.startswith("ImportError") and "is 5.31.0" in refused and f"{ANY_VERSION}=1" in refused


def _sources():
    for room in ROOMS:
        for path in sorted((ROOT / room).glob("*.py")):
            yield path, ast.parse(path.read_text())


def _promised(module: str, name: str) -> bool:
    """Whether it is one of the package's top-level names, or documented where it stands."""
    package = module.partition(".")[0]
    return name in _top_level(package) or module in (package, "huggingface_hub.errors")


@cache
def _top_level(package: str) -> frozenset[str]:
    return frozenset(dir(importlib.import_module(package)))


def test_every_import_that_nobody_promises_is_listed():
    listed = {tuple(entry.name.split(":")) for _, entry in ENTRIES}
    listed = {(module, path.partition(".")[0]) for module, path in listed}
    listed_names = {name for _, name in listed}
    missing = [
        f"{path.relative_to(ROOT)}: {node.module}.{alias.name}"
        for path, tree in _sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 0
        if (node.module or "").partition(".")[0] in PACKAGES
        for alias in node.names
        if not _promised(node.module, alias.name) and alias.name not in listed_names
    ]
    assert missing == []


def test_every_private_attribute_of_others_is_listed():
    ours, used = {"_make_wrapper_subclass"}, {}  # PyTorch's
    for path, tree in _sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                ours.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                ours.add(node.id)
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
                is_own = isinstance(node.value, ast.Name) and node.value.id == "self"
                if is_own and isinstance(node.ctx, ast.Store):
                    ours.add(node.attr)
                used.setdefault(node.attr, path.relative_to(ROOT))
    listed = {part for _, entry in ENTRIES for part in _parts(entry)}
    used = {name: path for name, path in used.items() if not name.startswith("__") and name not in ours}
    assert {name: path for name, path in used.items() if name not in listed | OURS_IN_OTHERS} == {}


# Attributes that EMO itself sets on objects of other packages, and public methods of named tuples.
OURS_IN_OTHERS = {"_frozen_row_hooks", "_commit_hash", "_part_of", "_asdict", "_replace"}
# Where PyTorch keeps the hooks of a module: nothing else tells whether somebody looks.
OURS_IN_OTHERS |= {
    "_forward_hooks",
    "_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
}


def _parts(entry):
    return set(entry.name.partition(":")[2].split(".")) | set(f"{entry.takes} {entry.mentions}".split())


def test_every_private_method_that_is_overridden_is_listed():
    listed = {part for _, entry in ENTRIES for part in _parts(entry)}
    unlisted = set()
    for room in ROOMS:
        package = importlib.import_module("transformers_emo" if room == "api" else f"transformers_emo.{room}")
        for module in pkgutil.iter_modules(package.__path__):
            for value in vars(importlib.import_module(f"{package.__name__}.{module.name}")).values():
                if inspect.isclass(value) and value.__module__.startswith(transformers_emo.__name__):
                    unlisted |= _overridden(value) - listed
    assert unlisted - {"_abc_impl"} == set()


def _overridden(ours: type) -> set[str]:
    theirs = [base for base in ours.__mro__[1:] if base.__module__.partition(".")[0] in PACKAGES]
    private = {name for name in vars(ours) if name.startswith("_") and not name.startswith("__")}
    return {name for name in private if any(name in vars(base) for base in theirs)}
