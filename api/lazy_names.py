"""As `lazy_imports`, for a stub that imports from other rooms: `subsets/loading/model_hooks.pyi`."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from .lazy_imports import import_name


def lazy_names(spec: ModuleSpec | None) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """What makes a module hand out names that it imports only on request (https://peps.python.org/pep-0562).

    The names and where they come from are the imports of the module's stub, the `.pyi` file beside it, which
    type checkers and editors read instead of the module: they are written once.

    Args:
        spec (`ModuleSpec`): the module's `__spec__`.

    Returns:
        `tuple`: the module's `__getattr__`, `__dir__` and `__all__`.

    Raises:
        FileNotFoundError: if there is no stub.

    Example:

    ```python
    >>> from transformers_emo import subsets
    >>> from transformers_emo.lazy_names import lazy_names
    >>> load, names, public = lazy_names(subsets.__spec__)
    >>> "ExpertSubset" in public and load("ExpertSubset").__name__
    'ExpertSubset'

    ```
    """
    assert spec is not None and spec.origin is not None
    stub = Path(spec.origin).with_suffix(".pyi")
    module_of = {
        alias.name: importlib.util.resolve_name("." * node.level + (node.module or ""), spec.parent)
        for node in ast.parse(stub.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    modules = set(module_of.values())

    def load(name: str) -> Any:
        if name in module_of:
            value = import_name(module_of[name], name)
            setattr(sys.modules[spec.name], name, value)
            return value
        # `package.module` works without an import of the module, as it does where all is imported at once.
        if f"{spec.parent}.{name}" in modules:
            return importlib.import_module(f"{spec.parent}.{name}")
        raise AttributeError(f"module {spec.name!r} has no attribute {name!r}")

    def names() -> list[str]:
        return sorted(module_of.keys() | vars(sys.modules[spec.name]).keys())

    return load, names, sorted(module_of)
