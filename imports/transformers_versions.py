"""The versions of Transformers that EMO is tested with, and everything it uses there that nobody promises.

Names that begin with an underscore, methods that are overridden or called though they are not documented,
and what stands deep inside a module may change with any release. Each is listed once, with the reason.
The module that uses some of them imports them in a block, `with private_names("loading"):`, which sees that
they are there, take the arguments that we give, and are still used where we rely on it. What it looks at is
imported there anyway.

The names are in `names_of_others`. Both go along with code saved beside a model.

`transformers_differences` has what differs within the tested versions.
"""

import importlib
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

from .names_of_others import PRIVATE_NAMES, PrivateName

TESTED = {
    "transformers": ("5.17.0", "5.24.0"),
    "huggingface_hub": ("1.31.0", "2.4.0"),
    "accelerate": ("1.15.0", "1.15.0"),
    "peft": ("0.21.2", "0.21.2"),
    "torchao": ("0.18.0", "0.18.0"),
    "lm_eval": ("0.4.13", "0.4.13"),
}
"""The oldest and the newest version of each package that the tests have run with."""

ANY_VERSION = "EMO_ANY_TRANSFORMERS"
"""The environment variable that allows other versions of Transformers, when it is 1."""


def check_transformers() -> None:
    """See that the installed Transformers is one that EMO is tested with.

    With others it might compute something else and not say so. `EMO_ANY_TRANSFORMERS=1` in the environment
    allows them, with a warning.

    Raises:
        ImportError: if it is not.

    Example:

    ```python
    >>> from transformers_emo.imports.transformers_versions import check_transformers
    >>> check_transformers()

    ```
    """
    oldest, newest = TESTED["transformers"]
    found = _version("transformers")
    if _minor(oldest) <= _minor(found) <= _minor(newest):
        return
    problem = f"EMO is tested with Transformers {oldest} to {newest}, and this is {found}"
    if os.environ.get(ANY_VERSION) == "1":
        warnings.warn(f"{problem}: its results may be wrong.", RuntimeWarning, stacklevel=2)
        return
    raise ImportError(
        f"{problem}, with which its results may be wrong: `{_remedy('transformers')}`. To try it all the "
        f"same set the environment variable {ANY_VERSION}=1."
    )


def check_names(user: str) -> None:
    """See that everything of other packages that nobody promises is as EMO expects it.

    Args:
        user (`str`): who is about to use it, a key of `PRIVATE_NAMES`.

    Raises:
        ImportError: if a name is missing, lacks parameters, or is not used where EMO relies on it; with the
            versions found and tested, and what to do.

    Example:

    ```python
    >>> from transformers_emo.imports.transformers_versions import check_names
    >>> check_names("loading")

    ```
    """
    for entry in PRIVATE_NAMES[user]:
        problem = _problem(entry)
        if problem is not None:
            (module, _, name), package = entry.name.partition(":"), entry.package
            oldest, newest = TESTED[package]
            tested = oldest if oldest == newest else f"{oldest} to {newest}"
            raise ImportError(
                f"EMO needs `{name}` of {module} ({entry.why}); in {package} {_version(package)} {problem}. "
                f"Tested with {package} {tested}: `{_remedy(package)}`."
            )


@contextmanager
def private_names(user: str) -> Iterator[None]:
    """A block that imports what nobody promises: see that it is there, and as expected.

    Args:
        user (`str`): who is about to use it, a key of `PRIVATE_NAMES`. For the network the version of
            Transformers is looked at first.

    Raises:
        ImportError: as from `check_transformers` and `check_names`.

    Example:

    ```python
    >>> from transformers_emo.imports.transformers_versions import private_names
    >>> with private_names("loading"):
    ...     from transformers.utils.hub import extract_commit_hash

    ```
    """
    if user == "network":
        check_transformers()
    try:
        yield
    except ImportError:
        check_names(user)  # says more, if it is one of them
        raise
    check_names(user)


def _problem(entry: PrivateName) -> str | None:
    module, _, path = entry.name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return "there is no such name"
    if entry.first or entry.takes:
        given = _parameters(found)
        first = entry.first.split()
        fits = all(want in ("*", name) for want, name in zip(first, given, strict=False))
        if len(given) < len(first) or not fits:
            return f"its parameters are ({', '.join(given)}), expected ({', '.join(first)}, ...)"
        for name in entry.takes.split():
            if name not in given and not (isinstance(found, type) and hasattr(found, name)):
                return f"it has no `{name}`"
    for name in entry.mentions.split():
        if not _mentions(found, name):
            return f"it does not use `{name}`"
    return None


def _parameters(found: Any) -> list[str]:
    """Names of the parameters of a function, or of what makes an object of a class; none, if nobody knows."""
    try:
        names = list(inspect.signature(found).parameters)
    except (TypeError, ValueError):
        return []
    is_method = inspect.isfunction(found) and "." in found.__qualname__ and names[:1] in (["self"], ["cls"])
    return names[1:] if is_method else names


def _mentions(function: Callable, name: str) -> bool:
    """Whether the code of a function has a name in it, as a name or as a string."""
    code = getattr(inspect.unwrap(getattr(function, "__func__", function)), "__code__", None)
    codes: list[CodeType] = [] if code is None else [code]
    while codes:
        code = codes.pop()
        if name in code.co_names or name in code.co_consts:
            return True
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return False


def _version(package: str) -> str:
    return importlib.import_module(package).__version__


def _minor(text: str) -> tuple[int, ...]:
    """(5, 24) of 5.24.1; of what is no version, (0,)."""
    numbers = text.split(".")[:2]
    return tuple(map(int, numbers)) if all(number.isdigit() for number in numbers) else (0,)


def _remedy(package: str) -> str:
    oldest, newest = TESTED[package]
    if package != "transformers":
        return f"pip install '{package}=={newest}'"
    low, (major, minor) = ".".join(map(str, _minor(oldest))), _minor(newest)
    return f"pip install 'transformers>={low},<{major}.{minor + 1}'"
