"""Names that are imported when somebody asks for them, so that importing their package costs little."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lazy_loader


def lazy_names(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make a package hand out names that it imports only on request (https://peps.python.org/pep-0562).

    The names and where they come from are the imports of the package's stub, the `.pyi` file beside it, which
    type checkers and editors read. `lazy_loader` imports them. Added to that are the true error of an import
    that fails, modules of the package as its attributes, and the full `dir`.

    Args:
        package (`str`): the package's `__name__`.
        file (`str`): its `__file__`.

    Returns:
        `tuple`: the package's `__getattr__`, `__dir__` and `__all__`.

    Raises:
        FileNotFoundError: if there is no stub.
        ValueError: if the stub imports from elsewhere than the package.

    Example:

    ```python
    >>> from transformers_emo import subsets
    >>> from transformers_emo.imports.lazy_imports import lazy_names
    >>> load, names, public = lazy_names(subsets.__name__, subsets.__file__)
    >>> "ExpertSubset" in public and load("ExpertSubset").__name__
    'ExpertSubset'

    ```
    """
    attached, _, public = lazy_loader.attach(package, submod_attrs=_names_in_stub(package, file))

    def load(name: str) -> Any:
        if name in public:
            return _true_error(lambda: attached(name), package, name)
        # `package.module` works without an import of the module, as it does where all is imported at once.
        module = f"{package}.{name}"
        if not name.startswith("_") and importlib.util.find_spec(module) is not None:
            return importlib.import_module(module)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        return sorted({*public, *vars(sys.modules[package])})

    return load, names, public


def _names_in_stub(package: str, file: str) -> dict[str, list[str]]:
    """From the modules of a package to the names that its stub takes from them.

    `lazy_loader.attach_stub` reads only relative imports. In a checkout, editors cannot follow these from
    `api/` to the rooms, so its stub names the package.
    """
    names: dict[str, list[str]] = {}
    for node in ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            if not module.startswith(f"{package}."):
                raise ValueError(
                    f"The stub of {package} imports from {module}, expected a module of its own."
                )
            inside = module.removeprefix(f"{package}.")
            names.setdefault(inside, []).extend(alias.name for alias in node.names)
    return names


def import_name(module: str, name: str) -> Any:
    """Import one name, and tell every failure as what it is.

    Args:
        module (`str`): the module's full name.
        name (`str`): what to take from it.

    Returns:
        `Any`: the class, function or other value.

    Raises:
        ImportError: if the import fails with one of the errors by which Python and Transformers tell that
            something does not exist (`AttributeError`, `KeyError`): as they are, they would be swallowed.

    Example:

    ```python
    >>> from transformers_emo.imports.lazy_imports import import_name
    >>> import_name("transformers_emo.version", "__version__").count(".")
    2

    ```
    """
    return _true_error(lambda: getattr(importlib.import_module(module), name), module, name)


def _true_error(imported: Callable[[], Any], module: str, name: str) -> Any:
    try:
        return imported()
    except (AttributeError, KeyError) as error:
        raise ImportError(f"Cannot import {name} from {module}: {type(error).__name__}: {error}") from error
