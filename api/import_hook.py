"""Doing something once a module is imported, by whomever, and not importing it for that."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from transformers_emo_autoload import when_complete

Action = Callable[[ModuleType], None]


class AfterImport(MetaPathFinder):
    """Runs actions on modules as soon as they are imported.

    An action runs in the thread that imports the module, before any other gets to see it; in the one that
    installs the hook, if that is still at it. If the action fails, so does the import, with its error.
    It must not import what imports the module itself: another thread may be half-way through that. A module
    that is reloaded is acted on again.

    Args:
        actions (`Mapping[str, Callable[[ModuleType], None]]`): what to do with which module, by full name.
            Doing it twice must change nothing.

    Example:

    ```python
    >>> import importlib, sys
    >>> from transformers_emo.import_hook import AfterImport
    >>> hook = AfterImport({"this": lambda module: print("imported")})
    >>> hook.install()
    >>> module = importlib.import_module("this")
    The Zen of Python...
    imported
    >>> sys.meta_path.remove(hook)

    ```
    """

    def __init__(self, actions: Mapping[str, Action]):
        self._actions = actions
        self._thread = threading.local()
        self._lock = threading.Lock()
        self._is_installing = False
        self._late: list[ModuleType] = []

    def install(self) -> None:
        """Act on modules that are imported from now on, and at once on those that are."""
        # What another thread imports meanwhile is acted on here. There, the action might wait for something
        # that this thread is importing while this thread waits for that one.
        self._is_installing = True
        # Once in, it stays: taken out of the list, it could make another thread's search skip a finder.
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        try:
            modules = [module for name in self._actions if (module := self._imported(name)) is not None]
            while self._is_installing:
                for module in modules:  # this thread may be importing one of them
                    when_complete(module, self._actions[module.__name__])
                with self._lock:
                    modules, self._late = self._late, []
                    self._is_installing = bool(modules)
        finally:
            self._is_installing = False

    def _act(self, module: ModuleType) -> None:
        with self._lock:
            if self._is_installing:
                self._late.append(module)
                return
        self._actions[module.__name__](module)

    def _imported(self, name: str) -> ModuleType | None:
        """The module if it is imported, or is being imported by another thread: once that is done."""
        self._thread.imports_nothing = True
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            return None
        finally:
            self._thread.imports_nothing = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Have the finders behind this one find the module, and act when it is loaded: `sys.meta_path`."""
        if getattr(self._thread, "imports_nothing", False):
            raise ModuleNotFoundError(fullname)
        if fullname not in self._actions:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find = getattr(finder, "find_spec", None)  # old ones have none; Python passes them over too
            spec = find and find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _ActingLoader(spec.loader, self._act)
                return spec
        return None


class _ActingLoader(Loader):
    """A module's own loader, and an action after it."""

    def __init__(self, loader: Loader, action: Action):
        self._loader = loader
        self._action = action

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader  # the module is none the wiser
        self._loader.exec_module(module)
        self._action(module)
