"""How long a server may keep a reader waiting.

huggingface_hub waits for as long as a busy server asks, be it a day. It waits for the rest of a file for as
long as a byte comes every ten seconds.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import get_session

from ..imports.transformers_versions import private_names
from .errors import CheckpointError

with private_names("hub"):
    from huggingface_hub.utils import httpx

LIBRARY = "transformers-emo"  # how requests for ranges name their sender
BUSY = (429, 500, 502, 503, 504)  # what a server answers that may answer better later
LONGEST_WAIT = 60.0  # seconds that a server may ask to wait
_WINDOW = 60.0  # seconds in which an answer must bring at least
_LEAST = 64 << 10  # so many bytes, if it has not ended by then

_lock = threading.Lock()
_open = 0


@contextmanager
def bounded_waits(path: str | os.PathLike | None = None) -> Iterator[None]:
    """Give up a server within the block that asks for a long wait, or sends next to nothing.

    It holds for everything that huggingface_hub asks for meanwhile, on every thread: its downloads use
    several.

    Args:
        path (`str` or `os.PathLike`, *optional*): what is read. If it is on this machine, nothing happens.

    Raises:
        CheckpointError: if a server asks to wait for more than 60 seconds, or sends fewer than 64 KiB in 60
            seconds without having sent all.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.patience import bounded_waits
    >>> with bounded_waits():
    ...     pass

    ```
    """
    global _open
    if path is not None and os.path.exists(path):
        yield
        return
    with _lock:
        _open += 1
        hooks = get_session().event_hooks["response"]
        if _check not in hooks:
            hooks.append(_check)
    try:
        yield
    finally:
        with _lock:
            _open -= 1


def asked_wait(headers: Any) -> float | None:
    """The seconds that a server asks to wait; `None` if it says nothing of it.

    Args:
        headers: those of its answer.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.patience import asked_wait
    >>> asked_wait({"Retry-After": "3"})
    3.0

    ```
    """
    found = re.fullmatch(r"\s*(\d{1,18})\s*", headers.get("Retry-After", ""))
    found = re.search(r"\br\s*=\s*0\s*;\s*t\s*=\s*(\d{1,18})", headers.get("ratelimit", "")) or found
    return None if found is None else float(found[1])


def _check(response: Any) -> None:
    """Called by huggingface_hub's client with each answer, before its body is read."""
    if _open == 0 or _is_of_a_range(response.request):  # `hub.ranges` has limits of its own
        return
    if response.status_code in BUSY:
        asked = asked_wait(response.headers)
        if asked is not None and asked > LONGEST_WAIT:
            raise CheckpointError(
                f"The server {response.url.host} asks to wait {asked:.0f} seconds for {_name(response)}, "
                f"more than {LONGEST_WAIT:.0f}, the limit. What was fetched is kept: call again later."
            )
    response.stream = _Watched(response.stream, _name(response))


def _is_of_a_range(request: Any) -> bool:
    return "range" in request.headers and LIBRARY in request.headers.get("user-agent", "")


def _name(response: Any) -> str:
    return str(response.url.path).rpartition("/")[2]


class _Watched(httpx.SyncByteStream):
    """A body that is given up if it comes too slowly."""

    def __init__(self, body: Any, what: str):
        self._body, self._what = body, what

    def __iter__(self) -> Iterator[bytes]:
        begun, got = time.monotonic(), 0
        for data in self._body:
            got += len(data)
            yield data
            now = time.monotonic()
            if now - begun >= _WINDOW:
                if got < _LEAST:
                    raise CheckpointError(
                        f"The server sent {got} bytes of {self._what} in {now - begun:.0f} seconds, expected "
                        f"at least {_LEAST} in {_WINDOW:.0f}: call again later."
                    )
                begun, got = now, 0

    def close(self) -> None:
        self._body.close()
