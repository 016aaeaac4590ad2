"""The library of ready subsets beside a model: `subsets/<name>.json` in its folder or Hub repository."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from ..checkpoints.hub.names import can_be_repo
from ..checkpoints.local_files import file_inside
from ..checkpoints.side_files import optional_file
from .validation import SubsetError

LIBRARY = "subsets"
LIBRARY_FILES = f"{LIBRARY}/*.json"
RECORD = "expert_subset.json"  # beside an adapter: the experts that it was trained on
_LONGEST_SHOWN = 200  # characters of what was given for a name
# From the path of a file in a repository to its path on this machine, `None` if the repository has none.
Fetch = Callable[[str], str | os.PathLike | None]
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


@dataclass(frozen=True)
class HubLibrary:
    """The library in a Hub repository: a `Fetch` that can also list the names.

    Args:
        repo (`str`): the repository.
        hub_kwargs (`dict[str, Any]`): `revision`, `token`, `cache_dir` and so on, as for `from_pretrained`.

    Example:

    ```python
    >>> from transformers_emo.subsets.library import HubLibrary
    >>> HubLibrary("user/emo", {"local_files_only": True, "cache_dir": tmp_path}).names()
    []

    ```
    """

    repo: str
    hub_kwargs: dict[str, Any]

    def __call__(self, file: str) -> str | None:
        """Where a file of the repository is on this machine, `None` if there is none."""
        # The cache comes first: it learnt the newest commit when the model's config was read. So `generate`
        # does not ask the Hub every time.
        in_cache = self.hub_kwargs | {"local_files_only": True, "force_download": False}
        return optional_file(self.repo, file, **in_cache) or optional_file(self.repo, file, **self.hub_kwargs)

    @property
    def is_offline(self) -> bool:
        """Whether only the cache can be asked."""
        return bool(self.hub_kwargs.get("local_files_only")) or is_offline_mode()

    def names(self) -> list[str]:
        """The names of the subsets in it, sorted; of those in the cache, if the Hub cannot be asked."""
        subfolder = self.hub_kwargs.get("subfolder") or ""
        if not self.is_offline:
            revision, token = self.hub_kwargs.get("revision"), self.hub_kwargs.get("token")
            try:
                tree = HfApi().list_repo_tree(
                    self.repo, f"{subfolder}/{LIBRARY}".lstrip("/"), revision=revision, token=token
                )
                paths = [Path(entry.path) for entry in tree]
                return sorted(p.stem for p in paths if p.suffix == ".json" and library_file(p.stem))
            except EntryNotFoundError:
                return []
            except (
                HfHubHTTPError,
                OSError,
            ):  # an error message asks for the names: it has an error of its own
                pass
        in_cache = self.hub_kwargs | {"local_files_only": True, "force_download": False}
        config = optional_file(self.repo, "config.json", **in_cache)
        return [] if config is None else library_names(Path(config).parent)


def library_of(model: str | os.PathLike | None, **hub_kwargs: Any) -> tuple[Path | None, Fetch | None]:
    """Where the library of a model is: the `folder` and the `fetch` that `find_subset` takes.

    Args:
        model (`str` or `os.PathLike`, *optional*): folder or Hub repository of the model.
        hub_kwargs: `revision`, `token`, `cache_dir` and so on, as for `from_pretrained`.

    Returns:
        `tuple[Path | None, Callable | None]`: a folder, or what asks the Hub, or neither.

    Example:

    ```python
    >>> from transformers_emo import ExpertSubset
    >>> from transformers_emo.subsets.library import find_subset, library_of
    >>> ExpertSubset([[0, 31]]).save(tmp_path / "subsets" / "math.json")
    >>> find_subset("math", *library_of(tmp_path)).name
    'math.json'

    ```
    """
    if not model or os.path.isfile(model):
        return None, None
    if os.path.isdir(model) or not can_be_repo(model):  # a folder, or one that is gone
        return Path(model, hub_kwargs.get("subfolder") or ""), None
    return None, HubLibrary(os.fspath(model), hub_kwargs)


def find_subset(
    name: str | os.PathLike, folder: str | os.PathLike | None = None, fetch: Fetch | None = None
) -> Path | None:
    """The file that a path, or a name in a model's library, stands for.

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
    if _is_file(name):
        return Path(name)
    file = library_file(os.fspath(name))
    if file is None:
        return None
    if folder is not None and Path(folder, file).is_file():
        return file_inside(folder, file)
    fetched = None if fetch is None else fetch(file)
    return None if fetched is None else Path(fetched)


def subset_file(
    name: str | os.PathLike, folder: str | os.PathLike | None = None, fetch: Fetch | None = None
) -> Path:
    """The file that `find_subset` finds. The error says where it looked, what is there and what to do next.

    Args:
        name, folder, fetch: as for `find_subset`.

    Raises:
        SubsetError: if there is no such file.

    Example:

    ```python
    >>> from transformers_emo import ExpertSubset
    >>> from transformers_emo.subsets.library import subset_file
    >>> ExpertSubset([[0, 31]]).save(tmp_path / "subsets" / "math.json")
    >>> subset_file("math", tmp_path).name
    'math.json'

    ```
    """
    found = find_subset(name, folder, fetch)
    if found is not None:
        return found
    given = os.fspath(name)
    shown = repr(given if len(given) <= _LONGEST_SHOWN else f"{given[:_LONGEST_SHOWN]}...")
    if os.path.isdir(given) and library_file(given) is None:
        raise SubsetError(f"{shown} is a folder: give the JSON file of an expert subset.")
    if library_file(given) is None:
        raise SubsetError(
            f"There is no file {shown} (seen from {os.getcwd()}): give the JSON file of an expert subset, or "
            f"the name of one in the model's {LIBRARY}/."
        )
    place, names = _place_and_names(folder, fetch)
    no_subset = f"There is no expert subset {shown}: it is no file in {os.getcwd()}, and "
    if place is None:
        raise SubsetError(
            f"{no_subset}no folder or repository is known whose {LIBRARY}/ could have it (the model was not "
            "loaded from any): give the file, or the experts themselves."
        )
    if names:
        raise SubsetError(f"{no_subset}{place} holds {', '.join(names)}. Give one of these, or a file.")
    is_missing = folder is not None and not Path(folder, LIBRARY).is_dir()
    raise SubsetError(
        f"{no_subset}{place} {'is not there' if is_missing else 'holds none'}. Give a file, or choose "
        f"experts with `select_experts` or `emo select`, and save them as {LIBRARY}/<name>.json beside the "
        "model."
    )


def _place_and_names(folder: str | os.PathLike | None, fetch: Fetch | None) -> tuple[str | None, list[str]]:
    if folder is not None:
        return os.fspath(Path(folder, LIBRARY)), library_names(folder)
    if isinstance(fetch, HubLibrary):
        revision = fetch.hub_kwargs.get("revision")
        place = f"{LIBRARY}/ of {fetch.repo}" + (f" at {revision}" if revision else "")
        place += " (offline: in the cache)" if fetch.is_offline else ""
        return place, fetch.names()
    return None if fetch is None else f"{LIBRARY}/ of the model's repository", []


def _is_file(name: str | os.PathLike) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # too long for a name
        return False
