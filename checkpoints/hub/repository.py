"""The files of one commit of a repository. Some are in the ordinary cache as a whole, others in part."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from transformers.utils import cached_file, logging

from ...imports.transformers_versions import private_names

with private_names("hub"):
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import httpx
    from transformers.utils.hub import cached_files, extract_commit_hash

from ..byte_ranges import Range, bridge_gaps, merge_ranges, total_length
from ..errors import CheckpointError
from ..local_files import LocalFiles
from ..patience import bounded_waits
from ..safetensors_header import MAX_HEADER_BYTES
from ..side_files import optional_file
from .part_cache import PartialFile, cache_root, clear_repo, find_part, part_folder, write_about
from .ranges import WORKERS, FileRanges, RangesIgnoredError, RemoteFile, fetch_ranges

logger = logging.get_logger(__name__)

# A gap between two ranges is fetched too if it is no longer than this: that is cheaper than two requests.
_MAX_GAP = 256 << 10
_GAP_SHARE = 0.01  # and if all such gaps together are at most this share of the wanted bytes
_FREE = 64 << 20  # bytes of the disk that stay free


class HubFiles:
    """The files of one commit as a source of bytes. Bytes that are not in the cache are fetched.

    Args:
        repo_id (`str`): the repository.
        hub_kwargs (`dict[str, Any]`, *optional*): `revision`, `token`, `cache_dir` and so on, as for
            `from_pretrained`.

    Raises:
        OSError: if there is no such repository or revision, or it may not be read.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.hub.repository import HubFiles
    >>> try:
    ...     HubFiles("user/no-such-model", {"cache_dir": tmp_path, "local_files_only": True})
    ... except OSError as error:
    ...     print("We couldn't connect" in str(error))
    True

    ```
    """

    def __init__(self, repo_id: str, hub_kwargs: dict[str, Any] | None = None):
        self.repo_id = repo_id
        self.hub_kwargs = {name: value for name, value in (hub_kwargs or {}).items() if value is not None}
        force = self.hub_kwargs.pop("force_download", False)
        self.subfolder = self.hub_kwargs.get("subfolder") or ""
        self.offline = bool(self.hub_kwargs.get("local_files_only")) or is_offline_mode()
        # From here on it is one commit, even if the repository changes.
        with bounded_waits():
            config = cached_file(repo_id, "config.json", **self.hub_kwargs, force_download=force)
        commit = extract_commit_hash(config, None)
        if commit is None:
            raise CheckpointError(f"The cache does not say of which commit {config} is: download it again.")
        self.commit: str = commit
        self.hub_kwargs["revision"] = commit
        self.cache = cache_root(self.hub_kwargs.get("cache_dir")) / repo_folder_name(
            repo_id=repo_id, repo_type="model"
        )
        if force:
            clear_repo(self.cache)
        self._force = force
        self.folder = self.cache / "snapshots" / self.commit / self.subfolder  # of whole files
        self._local = LocalFiles(self.folder)
        self._remotes: dict[str, RemoteFile] = {}
        self._parts: dict[str, PartialFile] = {}
        self._whole: set[str] = set()
        self._lock = threading.Lock()

    # As a source of bytes.

    def size(self, file: str) -> int:
        """The size of a file in bytes."""
        return self._local.size(file) if self.is_whole(file) else self._part(file).size

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of a file from `start`, and fetch those that are not in the cache."""
        if self.is_whole(file):
            return self._local.read_into(file, start, buffer)
        part, wanted = self._part(file), (start, start + len(buffer))
        if part.missing([wanted]):
            self.fetch({file: [wanted]})
            if self.is_whole(file):
                return self._local.read_into(file, start, buffer)
        part.read_into(start, buffer)

    def close(self) -> None:
        """Close open files."""
        self._local.close()
        with self._lock:
            while self._parts:
                self._parts.popitem()[1].close()

    # What is in the cache, and fetching more.

    def find(self, file: str) -> Path | None:
        """The path of a small file, which is downloaded if need be; `None` if there is no such file."""
        path = optional_file(self.repo_id, file, **self.hub_kwargs, force_download=self._force)
        return None if path is None else Path(path)

    def exists(self, file: str) -> bool:
        """Whether the repository has a file. The file is not downloaded."""
        if self.is_whole(file) or find_part(self.cache, self._path(file), self.commit) is not None:
            return True
        if self.offline:
            return False
        try:
            self._remote(file).metadata()
        except EntryNotFoundError:
            return False
        except httpx.HTTPError as error:
            raise CheckpointError(
                f"Cannot look up {file} of {self.repo_id}: {error}. Try again later."
            ) from error
        return True

    def is_whole(self, file: str) -> bool:
        """Whether the whole file is in the ordinary cache. With `force_download` only new downloads count."""
        if file not in self._whole:
            if self._force:
                return False
            found = try_to_load_from_cache(
                self.repo_id,
                self._path(file),
                cache_dir=self.hub_kwargs.get("cache_dir"),
                revision=self.commit,
            )
            if not isinstance(found, str):
                return False
            self._whole.add(file)
        return True

    def download(self, files: Iterable[str]) -> None:
        """Download whole files into the ordinary cache.

        Raises:
            CheckpointError: if files are not in the cache, and this machine is offline.
        """
        missing = [file for file in sorted(set(files)) if not self.is_whole(file)]
        if not missing:
            return
        if self.offline:
            raise CheckpointError(
                f"{len(missing)} files of {self.repo_id} are not in the cache, such as {missing[0]}, and "
                "nothing can be downloaded offline: load this subset once while online."
            )
        with bounded_waits():
            cached_files(self.repo_id, missing, **self.hub_kwargs, force_download=self._force)
        self._whole.update(missing)

    def fetch_headers(self, files: Iterable[str]) -> None:
        """Fetch the headers of safetensors files, several at a time."""
        with ThreadPoolExecutor(WORKERS) as workers:
            list(workers.map(self._fetch_header, files))

    def fetch(self, ranges: dict[str, list[Range]], *, progress: str | None = None) -> None:
        """Fetch byte ranges of files. Ranges with small gaps between them are fetched as one.

        Args:
            ranges (`dict[str, list[tuple[int, int]]]`): the ranges of each file.
            progress (`str`, *optional*): show a progress bar in bytes under this name.

        Raises:
            CheckpointError: if bytes are not in the cache and cannot be fetched, or the disk is too full.
        """
        wanted = {file: merge_ranges(part) for file, part in ranges.items() if not self.is_whole(file)}
        budget = int(_GAP_SHARE * sum(map(total_length, wanted.values())))
        file_ranges, missing = [], 0
        for file, parts in wanted.items():
            part = self._part(file)
            lacking = part.missing(parts)
            missing += total_length(lacking)
            joined = bridge_gaps(parts, gap=_MAX_GAP, budget=budget) if lacking else parts
            budget -= total_length(joined) - total_length(parts)
            file_ranges.append(FileRanges(self._remote(file), part, joined))
        if not missing:
            return
        if self.offline:
            raise CheckpointError(
                f"{missing} bytes of {self.repo_id} are not in the cache, and nothing can be downloaded "
                "offline: load this subset once while online."
            )
        free = shutil.disk_usage(self.cache).free
        if free < missing + _FREE:
            raise CheckpointError(
                f"{self.cache} has room for {free} bytes, expected {missing + _FREE}: make room. `emo cache` "
                "shows what can be cleared."
            )
        try:
            fetch_ranges(file_ranges, progress=progress)
        except RangesIgnoredError as error:
            self._fall_back(wanted, error)

    def _fall_back(self, files: Iterable[str], error: RangesIgnoredError) -> None:
        logger.warning_once(f"{error} Downloading whole files instead.")
        self.download(files)

    def _fetch_header(self, file: str) -> None:
        prefix = bytearray(8)
        try:
            if self.is_whole(file) or self.size(file) < 8:
                return
            self.read_into(file, 0, memoryview(prefix))
            end = 8 + int.from_bytes(prefix, "little")
            if not self.is_whole(file) and end <= min(self.size(file), MAX_HEADER_BYTES):
                self.fetch({file: [(8, end)]})
        except RangesIgnoredError as error:
            self._fall_back([file], error)

    def _path(self, file: str) -> str:
        return f"{self.subfolder}/{file}" if self.subfolder else file

    def _remote(self, file: str) -> RemoteFile:
        with self._lock:
            if file not in self._remotes:
                token = self.hub_kwargs.get("token")
                self._remotes[file] = RemoteFile(self.repo_id, self._path(file), self.commit, token)
            return self._remotes[file]

    def _part(self, file: str) -> PartialFile:
        with self._lock:
            if file in self._parts:
                return self._parts[file]
        known = find_part(self.cache, self._path(file), self.commit)
        if known is not None:
            folder, size = known.folder, known.size
        elif self.offline:
            raise CheckpointError(
                f"{file} of {self.repo_id} is not in the cache, and nothing can be downloaded offline: load "
                "this subset once while online."
            )
        else:
            try:
                metadata = self._remote(file).metadata()
            except httpx.HTTPError as error:
                raise CheckpointError(
                    f"Cannot look up {file} of {self.repo_id}: {error}. Try again later."
                ) from error
            if metadata.size is None or metadata.etag is None:
                raise RangesIgnoredError(f"The server of {self.repo_id} does not say how long {file} is.")
            folder, size = part_folder(self.cache, metadata.etag), metadata.size
            write_about(folder, self._path(file), self.commit, size)
        part = PartialFile(folder, size)
        with self._lock:
            kept = self._parts.setdefault(file, part)
        if kept is not part:
            part.close()
        return kept
