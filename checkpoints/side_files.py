"""The files beside the weights of a model: finding and copying them, and telling one model from another."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, is_offline_mode
from transformers.utils import cached_file

from .checkpoint import Checkpoint
from .local_files import LocalFiles, file_inside
from .patience import bounded_waits
from .small_files import MAX_JSON_BYTES, open_regular, read_small
from .source_files import SourceFiles

TOKENIZER_FILES = (  # names and patterns, for `side_files`
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
GENERATION_CONFIG = "generation_config.json"
SIDE_FILES = (
    "config.json",
    GENERATION_CONFIG,
    *TOKENIZER_FILES,
    "README.md",
    "LICENSE*",
)


def identity_of(model: str | os.PathLike, checkpoint: Checkpoint, **hub_kwargs: Any) -> dict[str, Any]:
    """Data by which a model is recognised. If any of it differs, it is another model, or it has been changed.

    Args:
        model (`str` or `os.PathLike`): the model's folder or Hub repository.
        checkpoint (`Checkpoint`): its weights.
        hub_kwargs: `subfolder` and so on, as for `from_pretrained`.

    Returns:
        `dict[str, Any]`: the folder's path, or the repository and its commit; the hash of `config.json`; a
        hash of where each tensor lies; and for each file of weights its size, or, in a folder, the state of
        each file as in `SourceFiles`.

    Example:

    ```python
    >>> from transformers_emo.checkpoints import Checkpoint
    >>> from transformers_emo.checkpoints.side_files import identity_of
    >>> toy = "model_cards/toy-emo"
    >>> sorted(identity_of(toy, Checkpoint.from_folder(toy)))
    ['config', 'files', 'headers', 'source']

    ```
    """
    source = checkpoint.source
    files = sorted({span.file for span in checkpoint.tensors.values()})
    found = optional_file(model, "config.json", **hub_kwargs)
    config = b"" if found is None else read_small(found, MAX_JSON_BYTES)
    headers = repr(sorted((name, repr(span)) for name, span in checkpoint.tensors.items()))
    states: dict[str, Any] = {file: [source.size(file)] for file in files}
    if isinstance(source, LocalFiles):
        states = {name: list(state) for name, state in SourceFiles.of(source.folder).files.items()}
        where = [str(source.folder.resolve())]
    else:
        where = [os.fspath(model), str(getattr(source, "commit", None)), hub_kwargs.get("subfolder") or ""]
    return {
        "source": where,
        "config": hashlib.sha256(config).hexdigest(),
        "headers": hashlib.sha256(headers.encode()).hexdigest(),
        "files": states,
    }


def side_files(
    model: str | os.PathLike, patterns: Sequence[str] = SIDE_FILES, **hub_kwargs: Any
) -> list[str]:
    """List the files beside the weights: config, generation config, tokenizer, model card and licence.

    Code is left out.

    Args:
        model (`str` or `os.PathLike`): folder or Hub repository of the model.
        patterns (`Sequence[str]`, *optional*): the names of files to list, or patterns such as `"LICENSE*"`.
        hub_kwargs: `revision`, `token`, `subfolder` and so on, as for `from_pretrained`.

    Returns:
        `list[str]`: the sorted paths in the folder, or in the repository's `subfolder`, for
        `copy_side_files`. Offline they are the files of the repository that are in the cache.

    Raises:
        OSError: if the repository cannot be reached.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.side_files import side_files
    >>> side_files("model_cards/toy-emo")
    ['README.md', 'config.json', 'tokenizer.json', 'tokenizer_config.json']
    >>> side_files("model_cards/toy-emo", ["tokenizer*"])
    ['tokenizer.json', 'tokenizer_config.json']

    ```
    """
    subfolder = hub_kwargs.get("subfolder") or ""
    folder: Path | None = None
    if os.path.isdir(model):
        folder = Path(model, subfolder)
    elif hub_kwargs.get("local_files_only") or is_offline_mode():
        folder = Path(str(cached_file(model, "config.json", **hub_kwargs))).parent
    if folder is not None:
        found = (path for pattern in patterns for path in folder.glob(pattern))
        return sorted(path.relative_to(folder).as_posix() for path in found if path.is_file())
    revision, token = hub_kwargs.get("revision"), hub_kwargs.get("token")
    with bounded_waits():
        names = HfApi(token=token).list_repo_files(os.fspath(model), revision=revision)
    start = f"{subfolder.strip('/')}/" if subfolder else ""
    return matching((name.removeprefix(start) for name in names if name.startswith(start)), patterns)


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The paths of a repository that fit one of some patterns as a whole, sorted.

    Args:
        names (`Iterable[str]`): the paths, with forward slashes.
        patterns (`Sequence[str]`): as for `side_files`.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.side_files import matching
    >>> matching(["subsets/math.json", "LICENSE.txt", "old/LICENSE"], ["LICENSE*", "subsets/*.json"])
    ['LICENSE.txt', 'subsets/math.json']

    ```
    """
    return sorted(
        name for name in names if any(PurePosixPath("/", name).match(f"/{pattern}") for pattern in patterns)
    )


def optional_file(model: str | os.PathLike, name: str, **hub_kwargs: Any) -> str | None:
    """Find a file that a model may have beside its weights, and download it if need be.

    Args:
        model (`str` or `os.PathLike`): folder or Hub repository of the model.
        name (`str`): the file's path in the folder or repository.
        hub_kwargs: `revision`, `token`, `subfolder` and so on, as for `from_pretrained`.

    Returns:
        `str`, *optional*: where it is on this machine; `None` if the model has no such file.

    Raises:
        CheckpointError: if it is a link out of the model's folder.
        OSError: if the repository cannot be reached.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.side_files import optional_file
    >>> optional_file("model_cards/toy-emo", "tokenizer.json")
    'model_cards/toy-emo/tokenizer.json'
    >>> optional_file("model_cards/toy-emo", "subsets/no-such-subset.json")

    ```
    """
    if os.path.isdir(model):
        file_inside(Path(model, hub_kwargs.get("subfolder") or ""), name)
    try:
        with bounded_waits(model):
            return cached_file(model, name, **hub_kwargs | {"_raise_exceptions_for_missing_entries": False})
    except OSError:
        # Offline, a file that is not in the cache counts as not there. Another tool may have filled the cache
        # without asking for it.
        if hub_kwargs.get("local_files_only") or is_offline_mode():
            return None
        raise


def copy_side_files(model: str | os.PathLike, names: Sequence[str], folder: Path, **hub_kwargs: Any) -> None:
    """Copy files that a model has beside its weights. Files that it does not have are left out.

    Args:
        model (`str` or `os.PathLike`): folder or Hub repository of the model.
        names (`Sequence[str]`): the paths of the files.
        folder (`Path`): the folder to copy them to.
        hub_kwargs: `revision`, `token`, `subfolder` and so on, as for `from_pretrained`.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.side_files import copy_side_files
    >>> copy_side_files("model_cards/toy-emo", ["tokenizer.json", "vocab.json"], tmp_path)
    >>> sorted(path.name for path in tmp_path.iterdir())
    ['tokenizer.json']

    ```
    """
    for name in names:
        found = optional_file(model, name, **hub_kwargs)
        if found is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with open(open_regular(found), "rb") as old, open(folder / name, "wb") as new:
                shutil.copyfileobj(old, new)
