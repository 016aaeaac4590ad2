"""Fetching byte ranges of files of the Hub: in parallel, with retries, and continued after an interruption.

huggingface_hub handles addresses, tokens, mirrors, proxies, offline mode and redirects: its session, headers
and metadata are used here. The Hub serves a large file from a signed address on another server. This address
is asked for once, and again when it has expired. The user's token is not sent to it. It takes ranges for
files in Xet storage too.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

from huggingface_hub import HfFileMetadata, constants, get_hf_file_metadata, hf_hub_url

from ...imports.transformers_versions import private_names

with private_names("hub"):
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff, httpx, tqdm

from ..byte_ranges import Range, split_ranges, total_length
from ..errors import CheckpointError
from ..patience import BUSY, LIBRARY, LONGEST_WAIT, asked_wait
from .part_cache import PartialFile

WORKERS = 8  # requests at a time, as many as huggingface_hub downloads files
_PIECE = 16 << 20  # the most bytes of one request: a worker fetches one piece at a time
_RECORD = 4 << 20  # bytes after which progress is recorded within a request
_RETRIES = 5  # in a row, without a byte
_WINDOW = 60.0  # seconds in which a request must bring at least
_LEAST = 64 << 10  # so many bytes, or it counts as one without a byte
_EXPIRED = (401, 403, 404, 410)  # what storage answers when a signed address has expired
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class RangesIgnoredError(CheckpointError):
    """The server answers a request for a range with the whole file.

    Example:

    ```python
    >>> from transformers_emo import CheckpointError
    >>> from transformers_emo.checkpoints.hub.ranges import RangesIgnoredError
    >>> issubclass(RangesIgnoredError, CheckpointError)
    True

    ```
    """


class RemoteFile:
    """A file of one commit of a repository.

    Args:
        repo_id (`str`): the repository.
        file (`str`): the file's name in it.
        commit (`str`): the commit.
        token (`str` or `bool`, *optional*): as everywhere in huggingface_hub.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.hub.ranges import RemoteFile
    >>> RemoteFile("user/model", "model.safetensors", "main").url.split("/")[-3:]
    ['resolve', 'main', 'model.safetensors']

    ```
    """

    def __init__(self, repo_id: str, file: str, commit: str, token: str | bool | None = None):
        self.repo_id, self.file, self.token = repo_id, file, token
        self.url = hf_hub_url(repo_id, file, revision=commit)
        self._lock = threading.Lock()
        self._metadata: HfFileMetadata | None = None

    def metadata(self, outdated: HfFileMetadata | None = None) -> HfFileMetadata:
        """Size, etag and address. They are asked for once, and again if they are `outdated`."""
        with self._lock:
            if self._metadata is None or self._metadata is outdated:
                failures = 0
                while True:
                    try:
                        self._metadata = get_hf_file_metadata(self.url, token=self.token)
                        break
                    except httpx.HTTPError as error:
                        failures += 1
                        time.sleep(self.wait_after(error, failures))
            return self._metadata

    def wait_after(self, error: httpx.HTTPError, failures: int) -> float:
        """How long to wait before the next try, in seconds, after a server is busy or cannot be reached.

        Raises:
            CheckpointError: if the server asks for a longer wait than 60 seconds.
            httpx.HTTPError: the same error, if trying again does not help, or was tried often enough.
        """
        response = None if isinstance(error, httpx.TransportError) else getattr(error, "response", None)
        asked = None
        if response is not None and response.status_code in BUSY and failures <= _RETRIES:
            asked = asked_wait(response.headers)
        elif failures > _RETRIES or not isinstance(error, httpx.TransportError):
            raise error
        if asked is not None and asked > LONGEST_WAIT:
            raise CheckpointError(
                f"The server of {self.repo_id} asks to wait {asked:.0f} seconds for {self.file}, "
                f"more than {LONGEST_WAIT:.0f}, the limit. What was fetched is kept: call again later."
            ) from error
        return min(0.5 * 2**failures, 8) if asked is None else asked

    def stream(self, start: int, end: int, part: PartialFile) -> Iterator[bytes]:
        """The bytes from `start` to `end`, for `part`. There are fewer if the connection breaks.

        Raises:
            RangesIgnoredError: if the server sends the whole file instead.
            CheckpointError: if the server refuses, sends other bytes, or has another file now than when
                `part` was begun.
        """
        metadata = self.metadata()
        for last in (False, True):
            if not part.is_of(metadata.etag, metadata.size):
                raise CheckpointError(
                    f"The server of {self.repo_id} has another {self.file} than the one of which "
                    f"{part.folder} holds parts (now {metadata.size} bytes, etag {metadata.etag}): nothing "
                    f"of it was used. `emo cache clear {self.repo_id}` deletes the old parts."
                )
            location = urljoin(self.url, metadata.location)
            headers = build_hf_headers(token=self.token, library_name=LIBRARY)
            if not _takes_token(location, self.url):
                headers.pop("authorization", None)
            headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
            with http_stream_backoff(
                "GET",
                location,
                headers=headers,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                retry_on_exceptions=(),  # they also come while the body is read: `_fetch_piece` retries
                retry_on_status_codes=(),  # it would wait for as long as the server says
            ) as response:
                if response.status_code in _EXPIRED and not last:
                    metadata = self.metadata(outdated=metadata)
                    continue
                if response.status_code == 416:
                    raise CheckpointError(
                        f"{self.file} of {self.repo_id} is shorter than expected: clear its parts with `emo "
                        f"cache clear {self.repo_id}` and load again."
                    )
                hf_raise_for_status(response)
                self._check(response, start, metadata.size)
                # Without a chunk size, so that no bytes wait to fill a chunk when the connection breaks.
                yield from response.iter_raw()
                return

    def _check(self, response: Any, start: int, size: int | None) -> None:
        encoding = response.headers.get("Content-Encoding", "identity")
        if response.status_code != 206 or encoding != "identity":
            raise RangesIgnoredError(f"The server of {self.repo_id} sends {self.file} only as a whole.")
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != start or match[3] not in ("*", str(size)):
            raise CheckpointError(
                f"The server of {self.repo_id} sent {response.headers.get('Content-Range')!r} of "
                f"{self.file}, expected bytes from {start} of {size}: call again, or use another server."
            )


@dataclass(frozen=True)
class FileRanges:
    """Ranges of a file of the Hub, and the cached part that they belong to.

    Args:
        remote (`RemoteFile`): the file.
        part (`PartialFile`): where its bytes are written to.
        ranges (`list[tuple[int, int]]`): the ranges `(start, end)`.

    Example: see `fetch_ranges`.
    """

    remote: RemoteFile
    part: PartialFile
    ranges: list[Range]


def fetch_ranges(wanted: list[FileRanges], *, progress: str | None = None) -> None:
    """Fetch ranges of files into the cache, several at a time.

    Every few megabytes are recorded. So after a failure or a kill the next call fetches only the rest.

    Args:
        wanted (`list[FileRanges]`): what to fetch. Bytes that are in the cache are not fetched again.
        progress (`str`, *optional*): show a progress bar in bytes under this name.

    Raises:
        RangesIgnoredError: if a server sends whole files only.
        CheckpointError: if bytes cannot be fetched, after retries. Those that were fetched stay in the cache.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.hub.ranges import fetch_ranges
    >>> fetch_ranges([])

    ```
    """
    missing = [FileRanges(file.remote, file.part, file.part.missing(file.ranges)) for file in wanted]
    total = sum(total_length(file.ranges) for file in wanted)
    left = sum(total_length(file.ranges) for file in missing)
    if left == 0:
        return
    stop = threading.Event()
    with (
        tqdm(
            desc=progress,
            total=total,
            initial=total - left,
            unit="B",
            unit_scale=True,
            disable=True if progress is None else None,
            name="transformers_emo.fetch_ranges",
        ) as bar,
        ThreadPoolExecutor(WORKERS, "emo-ranges") as workers,
    ):
        pieces = [
            workers.submit(_fetch_piece, file, start, end, bar, stop)
            for file in missing
            for start, end in split_ranges(file.ranges, _PIECE)
        ]
        try:
            done, _ = wait(pieces, return_when=FIRST_EXCEPTION)
        finally:  # also after Ctrl-C: the other workers stop at their next bytes
            stop.set()
            for piece in pieces:
                piece.cancel()
        for piece in done:
            piece.result()


def _fetch_piece(file: FileRanges, start: int, end: int, bar: tqdm, stop: threading.Event) -> None:
    """Fetch one range. If the connection breaks, continue at the same byte."""
    position = recorded = start
    failures = 0
    while position < end and not stop.is_set():
        before = position
        reason: Exception | None = None
        begun, counted = time.monotonic(), position
        try:
            for data in file.remote.stream(position, end, file.part):
                data = data[: end - position]
                file.part.write(position, data)
                position += len(data)
                bar.update(len(data))
                now = time.monotonic()
                if now - begun >= _WINDOW:
                    if position - counted < _LEAST:
                        raise _SlowServerError(file, position - counted, now - begun)
                    begun, counted = now, position
                if position - recorded >= _RECORD:
                    file.part.record(recorded, position)
                    recorded = position
                if position == end or stop.is_set():
                    break
        except _SlowServerError as error:
            reason, before = error, position
        except httpx.TransportError as error:
            reason = error
        except httpx.HTTPError as error:  # the server answered
            failures += 1
            try:
                pause = file.remote.wait_after(error, failures)
            except httpx.HTTPError:
                raise CheckpointError(_failure(file, position, end, error)) from error
            stop.wait(pause)
            continue
        finally:
            if position > recorded:
                file.part.record(recorded, position)
                recorded = position
        if position > before:
            failures = 0
        elif not stop.is_set():
            failures += 1
            if failures > _RETRIES:
                raise CheckpointError(_failure(file, position, end, reason)) from reason
        if position < end and failures:
            stop.wait(min(0.5 * 2**failures, 8))


class _SlowServerError(Exception):
    """A server sends next to nothing, and keeps the connection open."""

    def __init__(self, file: FileRanges, got: int, seconds: float):
        super().__init__(
            f"its server sent {got} bytes in {seconds:.0f} seconds, expected at least {_LEAST} in "
            f"{_WINDOW:.0f}"
        )


def _failure(file: FileRanges, position: int, end: int, reason: Exception | None) -> str:
    return (
        f"Bytes {position} to {end} of {file.remote.file} of {file.remote.repo_id} could not be fetched "
        f"({reason or 'the connection closes without an answer'}). What was fetched is kept: call again "
        "to continue."
    )


def _takes_token(location: str, url: str) -> bool:
    """Whether an address is on the Hub itself, and not on a storage server."""
    trusted = (url, constants.ENDPOINT, "https://huggingface.co")
    return _origin(location) in map(_origin, trusted)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port
