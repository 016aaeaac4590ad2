"""The folder of a model to convert. A repository of the Hub is downloaded."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import snapshot_download
from transformers.utils.hub import extract_commit_hash

from ..checkpoints.hub.names import folder_or_repo, is_hub_repo
from ..checkpoints.patience import bounded_waits

ALL_FILES = ("**/*",)  # for `SourceFiles`: conversions copy whatever lies beside the weights


def source_folder(model: str | os.PathLike, *, without: Iterable[str] = (), **hub_kwargs: Any) -> Path:
    """The folder with the files of a model on this machine. A repository is downloaded, at one commit.

    Args:
        model (`str` or `os.PathLike`): folder or Hub repository.
        without (`Iterable[str]`, *optional*): endings of files not to download, such as `".bin"`.
        hub_kwargs: `revision`, `token`, `cache_dir`, `subfolder` and so on, as for `from_pretrained`.

    Returns:
        `Path`: the folder.

    Raises:
        OSError: if there is no such folder or repository, or it may not be read.

    Example:

    ```python
    >>> from transformers_emo.conversion.source_folder import source_folder
    >>> source_folder("model_cards/toy-emo").name
    'toy-emo'
    >>> try:
    ...     source_folder(tmp_path / "no" / "such" / "folder")
    ... except OSError as error:
    ...     print("There is no folder" in str(error))
    True

    ```
    """
    subfolder = str(hub_kwargs.pop("subfolder", None) or "").strip("/")
    if is_hub_repo(model):
        inside = f"{subfolder}/*" if subfolder else None
        ignored = [f"*{ending}" for ending in sorted(without)]
        with folder_or_repo(model), bounded_waits():
            model = snapshot_download(
                os.fspath(model), allow_patterns=inside, ignore_patterns=ignored, **hub_kwargs
            )
    return Path(model, subfolder)


def name_and_commit(model: str | os.PathLike, folder: Path) -> tuple[str, str | None]:
    """The name and commit of a model, for the notes of a conversion.

    Args:
        model (`str` or `os.PathLike`): folder or Hub repository, as given.
        folder (`Path`): from `source_folder`.

    Returns:
        `tuple[str, str | None]`: the folder's name and `None`, or the repository and its commit.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from transformers_emo.conversion.source_folder import name_and_commit
    >>> name_and_commit("model_cards/toy-emo", Path("model_cards/toy-emo"))
    ('toy-emo', None)

    ```
    """
    if not is_hub_repo(model):
        return folder.resolve().name, None
    return os.fspath(model), extract_commit_hash(str(PurePosixPath(folder, "config.json")), None)
