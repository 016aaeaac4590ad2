"""Acting on modules when they are imported."""

import importlib
import sys
import threading
import time
from importlib.machinery import SourceFileLoader

import pytest
from transformers_emo.import_hook import AfterImport


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A module that can be imported, and nothing left of it afterwards."""
    (tmp_path / "toy_parent").mkdir()
    (tmp_path / "toy_parent" / "__init__.py").write_text("")
    (tmp_path / "toy_parent" / "toy.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield "toy_parent.toy"
    for name in ("toy_parent", "toy_parent.toy"):
        sys.modules.pop(name, None)


class Seen(list):
    """An action that notes the value of a module."""

    def __call__(self, module):
        self.append(module.value)


def test_it_acts_when_the_module_is_imported_and_imports_nothing_itself(toy):
    seen = Seen()
    AfterImport({toy: seen}).install()
    assert seen == [] and not {"toy_parent", toy} & sys.modules.keys()
    importlib.import_module(toy)
    assert seen == [1]


def test_it_acts_at_once_on_a_module_that_is_there(toy):
    seen = Seen()
    importlib.import_module(toy)
    AfterImport({toy: seen}).install()
    assert seen == [1]


def test_a_module_that_does_not_exist_is_never_acted_on(toy):
    AfterImport({"toy_parent.nowhere": Seen()}).install()
    with pytest.raises(ModuleNotFoundError, match="toy_parent.nowhere"):
        importlib.import_module("toy_parent.nowhere")


def test_the_module_looks_as_without_the_hook(toy):
    AfterImport({toy: Seen()}).install()
    assert importlib.util.find_spec(toy).loader.get_filename(toy).endswith("toy.py")
    module = importlib.import_module(toy)
    assert type(module.__loader__) is type(module.__spec__.loader) is SourceFileLoader


def test_a_reloaded_module_is_acted_on_again(toy):
    seen = Seen()
    AfterImport({toy: seen}).install()
    importlib.reload(importlib.import_module(toy))
    assert seen == [1, 1]


def test_two_hooks_both_act_and_installing_one_again_adds_none(toy):
    seen = Seen()
    hooks = [AfterImport({toy: seen}) for _ in range(2)]
    for hook in hooks * 2:
        hook.install()
    assert sum(isinstance(finder, AfterImport) and finder in hooks for finder in sys.meta_path) == 2
    importlib.import_module(toy)
    assert seen == [1, 1]


def test_an_action_that_fails_fails_the_import_with_its_error(toy):
    def fail(module):
        raise RuntimeError("the true error")

    AfterImport({toy: fail}).install()
    for _ in range(2):  # nothing half-done stays behind
        with pytest.raises(RuntimeError, match="the true error"):
            importlib.import_module(toy)
        assert toy not in sys.modules


def test_a_module_that_another_thread_is_about_to_import_is_not_missed(toy):
    """The thread has asked the finders, before ours was one of them, and the module is not there yet."""
    searching, go_on = threading.Event(), threading.Event()

    class SlowFinder:
        def find_spec(self, fullname, path=None, target=None):
            if fullname == toy:
                searching.set()
                assert go_on.wait(30)

    sys.meta_path.insert(0, SlowFinder())
    thread = threading.Thread(target=importlib.import_module, args=(toy,))
    thread.start()
    assert searching.wait(30)
    seen = Seen()
    hook = AfterImport({toy: seen})
    installing = threading.Thread(target=hook.install)
    installing.start()
    while hook not in sys.meta_path:
        time.sleep(0.001)
    go_on.set()
    thread.join(30)
    installing.join(30)
    assert seen and set(seen) == {1}


def test_threads_do_not_wait_for_each_other(toy, tmp_path):
    """One installs in the midst of an import; the other's import is acted on by importing a part of that."""
    (tmp_path / "toy_ours").mkdir()
    (tmp_path / "toy_ours" / "__init__.py").write_text("import toy_stage\ntoy_stage.install()\n")
    (tmp_path / "toy_ours" / "part.py").write_text("")
    (tmp_path / "toy_outer.py").write_text(f"import toy_stage\ntoy_stage.wait()\nimport {toy}\n")
    begun, installed = threading.Event(), threading.Event()
    seen = []

    def action(module):
        importlib.import_module("toy_ours.part")
        seen.append(module.__name__)

    hook = AfterImport({"toy_outer": action, toy: action})

    class Stage:
        @staticmethod
        def install():
            assert begun.wait(30)
            threading.Timer(0.1, installed.set).start()  # once it waits for the other thread
            hook.install()

        @staticmethod
        def wait():
            begun.set()
            assert installed.wait(30)

    sys.modules["toy_stage"] = Stage
    errors = []

    def run(name):
        try:
            importlib.import_module(name)
        except BaseException as error:
            errors.append(error)

    # The child first: its lock is held while its parent is imported, and the action wants it.
    threads = [threading.Thread(target=run, args=(name,)) for name in ("toy_outer", "toy_ours.part")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for name in ("toy_stage", "toy_outer", "toy_ours", "toy_ours.part"):
        sys.modules.pop(name, None)
    assert not errors and set(seen) == {"toy_outer", toy}
