"""Names that are imported on request: all there, each itself, and a failing import tells why."""

import ast
import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import transformers_emo
from transformers_emo import EmoConfig, EmoForCausalLM, ExpertSubset, select_experts
from transformers_emo.imports.lazy_imports import import_name

ROOT = Path(__file__).parents[2]
STUBS = {
    "transformers_emo" if stub.parent.name == "api" else f"transformers_emo.{stub.parent.name}": stub
    for stub in ROOT.glob("*/__init__.pyi")
}


def test_stubs_are_found():
    assert len(STUBS) == 7


@pytest.mark.parametrize("name", STUBS)
class TestPackage:
    def test_every_name_is_there_and_listed(self, name):
        package = importlib.import_module(name)
        assert all(getattr(package, public) is not None for public in package.__all__)
        assert set(package.__all__) <= set(dir(package))

    def test_the_stub_exports_what_it_imports(self, name):
        """Type checkers take as public what is in the stub's `__all__`."""
        listed = next(
            ast.literal_eval(node.value)
            for node in ast.parse(STUBS[name].read_text()).body
            if isinstance(node, ast.Assign)
        )
        assert sorted(listed) == importlib.import_module(name).__all__

    def test_no_name_is_that_of_a_module_too(self, name):
        """Importing such a module would put it in the name's place."""
        package = importlib.import_module(name)
        modules = {module.stem for module in STUBS[name].parent.glob("*.py")}
        assert modules.isdisjoint(package.__all__)

    def test_an_unknown_name_is_an_attribute_error(self, name):
        with pytest.raises(AttributeError, match=f"{name!r} has no attribute 'no_such_name'"):
            _ = importlib.import_module(name).no_such_name


def test_modules_are_attributes_without_being_imported():
    assert transformers_emo.subsets.choosing.selection.select_experts is select_experts
    code = "import sys, transformers_emo as emo\nassert 'transformers_emo.training' not in sys.modules\n"
    code += "print(emo.training.Recipe.__name__, hasattr(emo, 'no_such_module'), hasattr(emo, '__no_such__'))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["Recipe", "False", "False"]


def test_a_star_takes_the_names_and_no_modules():
    namespace: dict = {}
    exec("from transformers_emo import *", namespace)
    assert sorted(namespace.keys() - {"__builtins__"}) == transformers_emo.__all__


def test_all_can_be_imported_at_once():
    """`EAGER_IMPORT` is how lazy-loader is told to."""
    code = "import sys, transformers_emo\nprint('transformers_emo.modeling_emo.modeling_emo' in sys.modules)"
    environment = os.environ | {"EAGER_IMPORT": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout == "True\n"


def test_threads_that_ask_at_once_get_the_same():
    code = (
        "import threading, transformers_emo as emo\n"
        "start, got = threading.Barrier(8), []\n"
        "def ask():\n"
        "    start.wait()\n"
        "    got.append(emo.ExpertSubset)\n"
        "threads = [threading.Thread(target=ask) for _ in range(8)]\n"
        "[thread.start() for thread in threads]\n"
        "[thread.join() for thread in threads]\n"
        "print(len(got), len(set(got)))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["8", "1"]


def test_pickled_objects_arrive_in_a_process_that_has_imported_nothing():
    objects = pickle.dumps([EmoConfig(num_hidden_layers=2), ExpertSubset([[0, 1], [2, 3]]), EmoForCausalLM])
    code = (
        "import pickle, sys\n"
        "config, subset, network = pickle.load(sys.stdin.buffer)\n"
        "print(config.num_hidden_layers, subset.experts[1], network.__name__)\n"
        "from transformers import AutoModelForCausalLM\n"
        "assert AutoModelForCausalLM._model_mapping[type(config)] is network\n"
    )
    result = subprocess.run([sys.executable, "-c", code], input=objects, capture_output=True, check=True)
    assert result.stdout.decode().split() == ["2", "[2,", "3]", "EmoForCausalLM"]


class TestBrokenImport:
    @pytest.fixture
    def broken(self, tmp_path, monkeypatch):
        """Make a package whose one name fails to import."""

        def make(line: str):
            folder = tmp_path / "broken_package"
            folder.mkdir()
            (folder / "__init__.py").write_text(
                "from transformers_emo.imports.lazy_imports import lazy_names\n"
                "__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)\n"
            )
            (folder / "__init__.pyi").write_text("from .inside import thing\n")
            (folder / "inside.py").write_text(f"{line}\nthing = 1\n")
            monkeypatch.syspath_prepend(tmp_path)

        yield make
        for name in [name for name in sys.modules if name.startswith("broken_package")]:
            del sys.modules[name]

    @pytest.mark.parametrize(
        "line, error, message",
        [
            ("import sys; sys.no_such_thing", ImportError, "thing.*AttributeError.*no_such_thing"),
            ("{}['no such key']", ImportError, "thing.*KeyError.*no such key"),
            ("import no_such_module", ModuleNotFoundError, "no_such_module"),
            ("raise RuntimeError('out of order')", RuntimeError, "out of order"),
        ],
    )
    def test_the_error_is_the_true_one(self, broken, line, error, message):
        broken(line)
        with pytest.raises(error, match=message):
            exec("from broken_package import thing")  # no editor can find it

    def test_it_is_told_again(self, broken):
        broken("raise RuntimeError('out of order')")
        package = importlib.import_module("broken_package")
        for _ in range(2):
            with pytest.raises(RuntimeError, match="out of order"):
                _ = package.thing

    def test_a_name_that_its_module_lacks_is_an_import_error(self):
        with pytest.raises(ImportError, match="no_such_name.*transformers_emo.version"):
            import_name("transformers_emo.version", "no_such_name")
