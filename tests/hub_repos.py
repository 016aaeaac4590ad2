"""What the small Hub of the tests holds: repositories, commits and files; requests it has had, and faults."""

import hashlib
import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

_LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf", ".parquet", "tokenizer.json")
_LFS_SIZE = 10_000_000
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"


@dataclass(frozen=True)
class StoredFile:
    """A file of a commit. `etag` is the sha256 of a large file, the git blob id of any other."""

    path: str
    size: int
    sha256: str
    blob_id: str
    is_lfs: bool

    @property
    def etag(self) -> str:
        """The file's identity as the client's cache names it."""
        return self.sha256 if self.is_lfs else self.blob_id

    def describe(self) -> dict:
        """The file as listings show it."""
        entry = {"type": "file", "path": self.path, "size": self.size, "oid": self.blob_id}
        if self.is_lfs:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": len(self._pointer())}
        return entry

    def _pointer(self) -> str:
        return POINTER.format(sha256=self.sha256, size=self.size)


@dataclass(frozen=True)
class Commit:
    """A commit: its id and all files it holds."""

    id: str
    title: str
    message: str
    date: str
    files: dict[str, StoredFile]
    parent: "Commit | None"


@dataclass
class Repo:
    """A repository. `readers` are the users beside its owner who may read it where it is private or gated.

    Of an `xet` one large files are said to be in Xet storage.
    """

    kind: str
    id: str
    private: bool = False
    gated: bool = False
    xet: bool = False
    readers: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        """The user in whose namespace the repository is."""
        return self.id.split("/")[0]

    @property
    def url_path(self) -> str:
        """`user/name`, with the kind before it for datasets and spaces."""
        return self.id if self.kind == "models" else f"{self.kind}/{self.id}"


@dataclass
class Request:
    """A request and what was sent in answer. `file` is `user/name/path` where a file's content was asked for.

    Bytes are counted when they are handed to the socket, so a client that hangs up may have read fewer.
    """

    method: str
    path: str
    server: str
    headers: dict[str, str]
    status: int = 0
    file: str | None = None
    body_bytes: int = 0
    sent_bytes: int = 0


@dataclass
class Fault:
    """What shall go wrong with the requests whose path and method match: with the `nth` of them, or more.

    Args:
        path (`str`): pattern (`*`, `?`) of the URL's path, such as `"/cdn/*model.safetensors"`.
        method (`str`, *optional*): only requests of this method.
        nth (`int`, defaults to 1): the first matching request that is hit, counted from 1.
        times (`int`, *optional*, defaults to 1): how many requests are hit from there on; `None` for all.
        status (`int`, *optional*): answer with this status instead.
        headers (`dict[str, str]`): added to that answer, such as `Retry-After`.
        cut_after (`int`, *optional*): close the connection after so many bytes of the body.
        ignore_range (`bool`, defaults to `False`): answer a range request with 200 and the whole file.
        delay (`float`, defaults to 0): seconds to wait before the answer.
        trickle (`float`, defaults to 0): seconds to wait before each 100 bytes of the body.
        seen (`int`): matching requests so far.
        hits (`int`): requests hit so far.
    """

    path: str
    method: str | None = None
    nth: int = 1
    times: int | None = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    ignore_range: bool = False
    delay: float = 0.0
    trickle: float = 0.0
    seen: int = 0
    hits: int = 0

    def strikes(self, method: str, path: str) -> bool:
        """Whether this request is hit; counts it."""
        if not fnmatchcase(path, self.path) or self.method not in (None, method):
            return False
        self.seen += 1
        hit = self.seen >= self.nth and (self.times is None or self.hits < self.times)
        self.hits += hit
        return hit


class RangeNotSatisfiableError(Exception):
    """The range asked for holds no byte of the file."""


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and end of the range that a `Range` header asks for.

    Args:
        header (`str`, *optional*): the header; one range, closed, open or a suffix.
        size (`int`): the file's size.

    Returns:
        `tuple[int, int]` or `None`: `None` where the whole file is the right answer: no header, one that is
        not understood, or several ranges (which a server may ignore).

    Raises:
        RangeNotSatisfiableError: if the range begins after the file's end.

    Example:

    ```python
    >>> from hub_repos import parse_range
    >>> parse_range("bytes=2-5", 10), parse_range("bytes=-3", 10), parse_range("bytes=8-99", 10)
    ((2, 6), (7, 10), (8, 10))

    ```
    """
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if match is None or match.group(1) == match.group(2) == "":
        return None
    first, last = match.groups()
    if first == "":
        start, end = max(size - int(last), 0), size
    else:
        start, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None
    if start >= size:
        raise RangeNotSatisfiableError
    return start, end


def is_large(path: str, size: int) -> bool:
    """Whether a file goes to the large-file store: by its name, as `.gitattributes` rules, or by its size."""
    return size > 0 and (path.endswith(_LFS_SUFFIXES) or size > _LFS_SIZE)


def folder_id(path: str, files: dict[str, StoredFile]) -> str:
    """An id that changes with the folder's contents."""
    below = (f"{name} {file.blob_id}" for name, file in sorted(files.items()) if name.startswith(f"{path}/"))
    return hashlib.sha1("\n".join(below).encode()).hexdigest()
