"""The library of ready subsets beside a model: `subsets/<name>.json` in its folder or Hub repository."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

LIBRARY = "subsets"
# A name is one part of a path: nothing outside the library can be named.
_NAME = re.compile(r"\w[\w.+-]*")


def library_file(name: str) -> str | None:
    """Where the library of a model holds the subset of a name, relative to the model.

    Args:
        name (`str`): such as `"math"`; `"math.json"` is the same.

    Returns:
        `str`, *optional*: the path with forward slashes, `None` for what can be no name, such as a path.

    Example:

    ```python
    >>> from transformers_emo.subsets.library import library_file
    >>> library_file("math"), library_file("../math")
    ('subsets/math.json', None)

    ```
    """
    name = name.removesuffix(".json")
    return f"{LIBRARY}/{name}.json" if _NAME.fullmatch(name) else None


def library_names(folder: str | os.PathLike) -> list[str]:
    """The names of the subsets in the library of a model's folder, sorted.

    Args:
        folder (`str` or `os.PathLike`): the model's folder.

    Example:

    ```python
    >>> from transformers_emo import ExpertSubset
    >>> from transformers_emo.subsets.library import library_names
    >>> ExpertSubset([[0, 31]]).save(tmp_path / "subsets" / "math.json")
    >>> library_names(tmp_path)
    ['math']

    ```
    """
    return sorted(path.stem for path in Path(folder, LIBRARY).glob("*.json") if library_file(path.stem))


def find_subset(
    name: str | os.PathLike,
    folder: str | os.PathLike | None = None,
    fetch: Callable[[str], str | os.PathLike | None] | None = None,
) -> Path | None:
    """The file that a user means by a path, or by a name in a model's library.

    A file of that path comes first, then the library.

    Args:
        name (`str` or `os.PathLike`): the path or name.
        folder (`str` or `os.PathLike`, *optional*): the model's folder, if it is on this machine.
        fetch (`Callable`, *optional*): gets a file of the model's Hub repository: from its path in the
            repository to the path on this machine, `None` if the repository has none.

    Returns:
        `Path`, *optional*: the file, `None` if there is none.

    Example:

    ```python
    >>> from transformers_emo import ExpertSubset
    >>> from transformers_emo.subsets.library import find_subset
    >>> ExpertSubset([[0, 31]]).save(tmp_path / "subsets" / "math.json")
    >>> find_subset("math", tmp_path).name
    'math.json'

    ```
    """
    if Path(name).is_file():
        return Path(name)
    file = library_file(os.fspath(name))
    if file is None:
        return None
    if folder is not None and Path(folder, file).is_file():
        return Path(folder, file)
    fetched = None if fetch is None else fetch(file)
    return None if fetched is None else Path(fetched)
