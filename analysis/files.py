"""Writing results: a file is whole or not there."""

from __future__ import annotations

import os
from pathlib import Path


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file, in place of one that is there.

    Args:
        path (`str` or `os.PathLike`): the file; its folder is made.
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
