"""Writing results: a file appears under its name only when it is whole."""

from __future__ import annotations

import os
from pathlib import Path


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file. A file that is there already is replaced.

    Args:
        path (`str` or `os.PathLike`): the file. Its folder is made if it does not exist.
        text (`str`): its contents, written as UTF-8.

    Example:

    ```python
    >>> from transformers_emo.analysis.files import write_text
    >>> write_text(tmp_path / "new" / "table.md", "| a |")
    >>> (tmp_path / "new" / "table.md").read_text()
    '| a |'

    ```
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
