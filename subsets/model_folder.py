"""Making the folder of a model: whole under its name, or not there; and what goes with the weights."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode
from transformers.utils import cached_file

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
GENERATION_CONFIG = "generation_config.json"


@contextmanager
def new_folder(out: str | os.PathLike) -> Iterator[Path]:
    """A folder to write to, which gets its name when all went well and is removed otherwise.

    A run that is killed leaves at most `.<name>.*.partial` beside it.

    Args:
        out (`str` or `os.PathLike`): the name.

    Raises:
        FileExistsError: if it exists.

    Example:

    ```python
    >>> from transformers_emo.subsets.model_folder import new_folder
    >>> with new_folder(tmp_path / "model") as folder:
    ...     _ = (folder / "config.json").write_text("{}")
    ...     (tmp_path / "model").exists()
    False
    >>> (tmp_path / "model" / "config.json").is_file()
    True

    ```
    """
    out = Path(out)
    check_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        yield partial
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o777 & ~mask)  # made for this user alone
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_new(out: Path) -> None:
    """See that there is nothing of this name, not even a broken link.

    Args:
        out (`Path`): the folder to be made.

    Raises:
        FileExistsError: if there is.

    Example:

    ```python
    >>> from transformers_emo.subsets.model_folder import check_new
    >>> check_new(tmp_path / "model")

    ```
    """
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} exists already: name a folder that does not.")


def check_space(out: Path, needed: int) -> None:
    """See that the disk has room, before anything is written.

    Args:
        out (`Path`): the folder to be made; its parents may not exist yet.
        needed (`int`): bytes.

    Raises:
        OSError: if it has not.

    Example:

    ```python
    >>> from transformers_emo.subsets.model_folder import check_space
    >>> check_space(tmp_path / "models" / "math", 1000)

    ```
    """
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"{out} will take {needed / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB left: make room, "
            "or name a folder on another disk."
        )


def optional_file(model: str | os.PathLike, name: str, **hub_kwargs: Any) -> str | None:
    """A file that a model may have beside its weights.

    Args:
        model (`str` or `os.PathLike`): folder or Hub repository of the model.
        name (`str`): its path there.
        hub_kwargs: `revision`, `token`, `subfolder` and so on, as for `from_pretrained`.

    Returns:
        `str`, *optional*: where it is on this machine, `None` if there is none.

    Example:

    ```python
    >>> from transformers_emo.subsets.model_folder import optional_file
    >>> optional_file("model_cards/toy-emo", "tokenizer.json")
    'model_cards/toy-emo/tokenizer.json'
    >>> optional_file("model_cards/toy-emo", "subsets/no-such-subset.json")

    ```
    """
    try:
        return cached_file(model, name, **hub_kwargs | {"_raise_exceptions_for_missing_entries": False})
    except OSError:
        # Offline, a file that the cache does not know of is taken as not there: other tools, which did not
        # ask for it, may have filled the cache.
        if hub_kwargs.get("local_files_only") or is_offline_mode():
            return None
        raise


def copy_companions(model: str | os.PathLike, names: Sequence[str], folder: Path, **hub_kwargs: Any) -> None:
    """Copy files that a model has beside its weights; those that it has not are left out.

    Args:
        model (`str` or `os.PathLike`): folder or Hub repository of the model.
        names (`Sequence[str]`): the files.
        folder (`Path`): where to.
        hub_kwargs: `revision`, `token`, `subfolder` and so on, as for `from_pretrained`.

    Example:

    ```python
    >>> from transformers_emo.subsets.model_folder import TOKENIZER_FILES, copy_companions
    >>> copy_companions("model_cards/toy-emo", TOKENIZER_FILES, tmp_path)
    >>> sorted(path.name for path in tmp_path.iterdir())
    ['tokenizer.json', 'tokenizer_config.json']

    ```
    """
    for name in names:
        found = optional_file(model, name, **hub_kwargs)
        if found is not None:
            shutil.copyfile(found, folder / name)
