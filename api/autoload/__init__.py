"""Lets programs that never import `transformers_emo` load EMO: installed as `transformers_emo_autoload`.

PyTorch calls `autoload` at the end of `import torch`, as it calls the backends of other devices: it is an
entry point of the group `torch.backends`. Nothing is imported then. When Transformers' auto-classes are
imported, this imports `transformers_emo`, which registers EMO with them. `EMO_AUTOLOAD=0` in the environment
leaves it out, and so does PyTorch's own `TORCH_DEVICE_BACKEND_AUTOLOAD=0`.

It is a package of its own because importing a part of `transformers_emo` imports all of its `__init__`, which
takes longer than `import torch` may be held up.
"""

import os
import sys

SWITCH = "EMO_AUTOLOAD"
# Whether the package was imported here: then what fails is told, and nobody's import fails with it.
has_imported_emo = False
# Of Transformers: what EMO registers with. Whichever comes first brings EMO.
_AUTO_CLASSES = tuple(
    f"transformers.models.auto.{name}"
    for name in ("configuration_auto", "modeling_auto", "tokenization_auto")
)


def autoload():
    """Have EMO registered once the auto-classes are imported.

    It never fails: that would break `import torch`.

    Example:

    ```python
    >>> from transformers_emo_autoload import autoload
    >>> autoload()

    ```
    """
    if os.environ.get(SWITCH, "1") == "0" or "transformers_emo" in sys.modules:
        return
    try:
        for name in _AUTO_CLASSES:
            module = sys.modules.get(name)
            if module is not None:  # its import has imported PyTorch
                when_complete(module, _import_emo)
        sys.meta_path.insert(0, _AfterAutoClasses())
    except Exception:
        return


def _import_emo(module=None):
    global has_imported_emo
    if "transformers_emo" not in sys.modules:
        has_imported_emo = True
    try:
        import transformers_emo  # noqa: F401
    except Exception as error:
        tell(error)


def tell(error):
    """Say that Transformers goes on without EMO.

    Args:
        error (`Exception`): why.

    Example:

    ```python
    >>> from transformers_emo_autoload import tell
    >>> tell(ImportError("no such name"))

    ```
    """
    import logging

    logging.getLogger("transformers_emo").warning(
        "EMO is not registered with Transformers: %s (%s=0 leaves it out.)", error, SWITCH
    )


class _AfterAutoClasses:
    """A finder of `sys.meta_path` that has EMO imported after the first of the auto-classes.

    Not while it looks for the module: Python then holds a lock that every import of every thread needs.
    """

    def __init__(self):
        self.is_done = False

    def find_spec(self, fullname, path=None, target=None):
        """Have the finders behind this one find the module."""
        if self.is_done or fullname not in _AUTO_CLASSES:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find = getattr(finder, "find_spec", None)  # old ones have none; Python passes them over too
            spec = find and find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None


class _Loader:
    """A module's own loader, and the import of EMO after it."""

    def __init__(self, loader, finder):
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def exec_module(self, module):
        """Load the module, and then EMO. The module is none the wiser."""
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if not self._finder.is_done:
            self._finder.is_done = True  # it stays in the list: another thread may be reading that
            _import_emo()


def when_complete(module, action):
    """Run `action(module)` when the import of a module is done: at once, if it is.

    Python says so by one attribute of the module's spec, which it sets when the module is there, and before
    any other import sees it.

    Args:
        module (`ModuleType`): imported, or being imported by this thread.
        action (`Callable[[ModuleType], None]`): what to do.

    Example:

    ```python
    >>> import json
    >>> from transformers_emo_autoload import when_complete
    >>> when_complete(json, lambda module: print(module.__name__))
    json

    ```
    """
    spec = module.__spec__
    waiting = spec.__dict__.get("_emo_waits") if spec is not None else None
    if waiting is not None:
        waiting.append(action)
    elif not getattr(spec, "_initializing", False):
        action(module)
    else:
        _watch(spec, module, [action])


def _watch(spec, module, waiting):
    plain = type(spec)

    class Watched(plain):
        @property
        def _initializing(self):
            return True

        @_initializing.setter
        def _initializing(self, value):
            self.__class__ = plain
            self._initializing = value
            del self._emo_waits
            if not value and sys.modules.get(self.name) is module:
                for action in waiting:
                    action(module)

    del spec._initializing
    spec._emo_waits = waiting
    spec.__class__ = Watched
