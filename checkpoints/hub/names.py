"""What a path names: a folder on this machine, or a repository of the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from transformers.utils import cached_file

from ...imports.transformers_versions import private_names
from ..errors import CheckpointError
from ..patience import bounded_waits

with private_names("hub"):
    from huggingface_hub.utils import validate_repo_id
    from transformers.utils.hub import extract_commit_hash

HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def is_hub_repo(path: str | os.PathLike) -> bool:
    """Whether a path given to `from_pretrained` names a repository: no folder or file has this name.

    Args:
        path (`str` or `os.PathLike`): the path.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.hub.names import is_hub_repo
    >>> is_hub_repo("allenai/Emo_1b14b_1T"), is_hub_repo("model_cards/toy-emo")
    (True, False)

    ```
    """
    return not os.path.exists(path)


def is_repo_name(name: str) -> bool:
    """Whether a name has the form `owner/repository`, and nothing on this machine has it.

    Args:
        name (`str`): where a model is from, by its config; may be empty.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.hub.names import is_repo_name
    >>> is_repo_name("allenai/Emo_1b14b_1T"), is_repo_name("model_cards/toy-emo"), is_repo_name("emo")
    (True, False, False)

    ```
    """
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and is_hub_repo(name)


def can_be_repo(name: str | os.PathLike) -> bool:
    """Whether a repository of the Hub could have this name.

    Args:
        name (`str` or `os.PathLike`): a name, or a path.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.hub.names import can_be_repo
    >>> can_be_repo("allenai/Emo_1b14b_1T"), can_be_repo("./Emo_1b14b_1T")
    (True, False)

    ```
    """
    try:
        validate_repo_id(os.fspath(name))
    except HFValidationError:
        return False
    return True


def existing_folder(path: str | os.PathLike) -> Path:
    """Check that a folder to be read exists.

    Args:
        path (`str` or `os.PathLike`): the folder.

    Raises:
        FileNotFoundError: if nothing has this name.
        NotADirectoryError: if a file has it.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.hub.names import existing_folder
    >>> existing_folder("model_cards/toy-emo").name
    'toy-emo'

    ```
    """
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"There is no folder {os.fspath(path)!r} (seen from {os.getcwd()}): check the path."
        )
    if not os.path.isdir(path):
        raise NotADirectoryError(
            f"{os.fspath(path)!r} is a file, expected a folder: name the folder it is in."
        )
    return Path(path)


@contextmanager
def folder_or_repo(path: str | os.PathLike) -> Iterator[None]:
    """Make errors name both that a path can be: a folder on this machine, and a repository of the Hub.

    Args:
        path (`str` or `os.PathLike`): the folder or repository that the block reads.

    Raises:
        FileNotFoundError: if there is no such folder, and no repository can have this name.
        OSError: if there is no such folder, and the repository cannot be read.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.hub.names import folder_or_repo
    >>> try:
    ...     with folder_or_repo("./my/model"):
    ...         pass
    ... except FileNotFoundError as error:
    ...     print(str(error).startswith("There is no folder './my/model' (seen from "))
    True

    ```
    """
    missing = f"There is no folder {os.fspath(path)!r} (seen from {os.getcwd()})"
    if not os.path.exists(path) and not can_be_repo(path):
        raise FileNotFoundError(f"{missing}, and a Hub repository cannot have this name. Check the path.")
    try:
        yield
    except (OSError, ValueError) as error:
        if not is_hub_repo(path) or isinstance(error, CheckpointError):
            raise
        raise OSError(f"{missing}, and as a Hub repository it cannot be read: {error}") from error
    except RuntimeError as error:  # of `Path.expanduser`
        if "home directory" not in str(error):
            raise
        raise OSError(
            f"{missing}, and as a Hub repository it cannot be read: nothing says where your home is, in "
            "which the cache would be. Set HF_HOME to a folder."
        ) from error


def pinned(path: str | os.PathLike, hub_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Settle on one commit of a repository, for several steps that must read the same files.

    Args:
        path (`str` or `os.PathLike`): folder or Hub repository of a model.
        hub_kwargs (`dict[str, Any]`): `revision`, `token`, `cache_dir` and so on, as for `from_pretrained`.

    Returns:
        `dict[str, Any]`: `hub_kwargs`, in which for a repository the `revision` is its newest commit.

    Raises:
        OSError: if there is neither such a folder nor such a repository, or it may not be read.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.hub.names import pinned
    >>> pinned("model_cards/toy-emo", {"token": None})
    {'token': None}

    ```
    """
    if not is_hub_repo(path):
        return hub_kwargs
    with folder_or_repo(path), bounded_waits():
        commit = extract_commit_hash(cached_file(path, "config.json", **hub_kwargs), None)
    return hub_kwargs if commit is None else hub_kwargs | {"revision": commit}
