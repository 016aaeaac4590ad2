"""Packages that only some uses need, and how to get them where they are missing."""

from __future__ import annotations

import importlib
import re
from importlib.metadata import PackageNotFoundError, requires
from typing import Any


def import_optional(name: str, purpose: str) -> Any:
    """Import a package that one of this package's extras brings.

    Args:
        name (`str`): the package, as it is installed and imported.
        purpose (`str`): what needs it, with a verb: `"Pictures need"`.

    Returns:
        The package.

    Raises:
        ImportError: if it is not installed, with the command that installs it; or if it cannot be imported.

    Example:

    ```python
    >>> from transformers_emo.imports.optional_packages import import_optional
    >>> import_optional("json", "Configs need").__name__
    'json'

    ```
    """
    require(purpose, name)
    return importlib.import_module(name)


def require(purpose: str, *names: str) -> None:
    """See that packages can be imported, all of them before anything is done.

    Args:
        purpose (`str`): what needs them, with a verb: `"Training needs"`.
        names (`str`): the packages, as they are installed and imported.

    Raises:
        ImportError: if some are not installed, with one command that installs these; or if one cannot be
            imported.

    Example:

    ```python
    >>> from transformers_emo.imports.optional_packages import require
    >>> try:
    ...     require("Dreaming needs", "json", "no_such_package")
    ... except ImportError as error:
    ...     print(error)
    Dreaming needs no_such_package: `pip install no_such_package`.

    ```
    """
    missing = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            if not isinstance(error, ModuleNotFoundError) or error.name != name:
                raise ImportError(f"{purpose} {name}, which cannot be imported: {error}") from error
            missing.append(name)
    if missing:
        command = " ".join(map(requirement_of, missing))
        raise ImportError(f"{purpose} {' and '.join(missing)}: `pip install {command}`.")


def requirement_of(name: str) -> str:
    """What to give to `pip install`: the package, with the versions that this package's extras name.

    The package itself and not the extra: that is right however this package was installed.

    Args:
        name (`str`): the package.

    Example:

    ```python
    >>> from transformers_emo.imports.optional_packages import requirement_of
    >>> requirement_of("peft"), requirement_of("accelerate")
    ("'peft>=0.21'", 'accelerate')

    ```
    """
    try:
        known = requires("transformers-emo") or []
    except PackageNotFoundError:  # on the path, and not installed
        known = []
    for requirement in known:
        wanted, _, condition = requirement.partition(";")
        wanted = wanted.strip()
        if "extra" in condition and re.match(r"[\w.-]+", wanted)[0] == name:  # type: ignore[index]
            return wanted if wanted == name else f"'{wanted}'"
    return name
