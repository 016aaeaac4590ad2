"""The page as one file: its content, its style, its program and the library that draws, put together."""

from __future__ import annotations

import html
import json
import os
import re
from importlib.resources import files
from typing import Any

from ...imports.optional_packages import require
from ..files import write_text

MOST_BYTES = 10_000_000


def write_page(
    content: dict[str, Any], path: str | os.PathLike, *, title: str = "What the experts learned"
) -> int:
    """Write a page that needs no network: everything is in one file.

    Args:
        content (`dict[str, Any]`): from `page_content`.
        path (`str` or `os.PathLike`): the file.
        title (`str`): its title.

    Returns:
        `int`: the bytes of the file.

    Raises:
        ValueError: if it would be larger than 10 MB.
        ImportError: if plotly is not installed.

    Example:

    ```python
    >>> from transformers_emo.analysis.page.html import write_page
    >>> content = {"domains": [], "documents": 0, "tokens": 0, "meanings": {}, "models": []}
    >>> content["retention"] = None
    >>> write_page(content, tmp_path / "report.html") > 1_000_000  # the library alone
    True

    ```
    """
    require("The report needs", "plotly")
    from plotly.offline import get_plotlyjs

    data = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    parts = {
        "@title@": html.escape(title),
        "@style@": _file("page.css"),
        "@content@": data.replace("<", "\\u003c"),  # ends no script, whatever stands in a document
        "@library@": get_plotlyjs(),
        "@program@": _file("page.js"),
    }
    page = re.sub("|".join(parts), lambda mark: parts[mark[0]], _file("page.html"))
    page = page.encode("utf-8", "replace").decode()  # halves of characters, which no file can hold
    size = len(page.encode())
    if size > MOST_BYTES:
        raise ValueError(
            f"The page would have {size:,} bytes, and at most {MOST_BYTES:,} open well: show fewer "
            "documents, or shorter ones."
        )
    write_text(path, page)
    return size


def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
