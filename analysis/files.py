"""Writing results: a file appears under its name only when it is whole."""

from __future__ import annotations

import os

from ..checkpoints.writing.durable_files import write_whole


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
    write_whole(path, text)
