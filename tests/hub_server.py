"""A small Hub on loopback: enough of its HTTP API for `huggingface_hub` to push to it and pull from it.

Nothing is patched: the client is the real one, pointed here with `HF_ENDPOINT`. It reads that variable once,
when imported, so code that talks to the server runs in a process of its own (`HubServer.run`).

Large files are answered as the Hub answers them, with a redirect to a signed address on another origin (here
another port), which must not be sent the user's token.

Files can be said to be in Xet storage (`Repo.xet`), as most of the Hub's are; that storage is not there.
A renamed repository (`HubServer.rename`) is found under its old name by redirect.

Not spoken: Xet's own protocol, pull requests, tags, pages of listings, `If-None-Match`.
"""

import base64
import binascii
import hashlib
import hmac
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

_CHUNK = 1 << 16
_LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf", ".parquet", "tokenizer.json")
_LFS_SIZE = 10_000_000
_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
# Variables that would lead the client elsewhere than to this server, or to another cache.
_FOREIGN_VARIABLES = re.compile(r"(HF_|HUGGING|TRANSFORMERS_|(http|https|all|no)_proxy$)", re.IGNORECASE)


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
        return _POINTER.format(sha256=self.sha256, size=self.size)


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
    >>> from hub_server import parse_range
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


class HubServer:
    r"""A Hub with one user, `user`, and that user's token, serving on loopback while the context is open.

    Args:
        root (`Path`, *optional*): folder for the repositories' contents and the clients' caches; a temporary
            one, removed at the end, when not given.

    Example:

    ```python
    >>> from hub_server import HubServer
    >>> with HubServer() as hub:
    ...     commit = hub.commit("user/greeting", {"hello.txt": b"hello"})
    ...     output = hub.run(
    ...         "from huggingface_hub import hf_hub_download\n"
    ...         "print(open(hf_hub_download('user/greeting', 'hello.txt')).read())"
    ...     )
    ...     output, hub.bytes_served("user/greeting/hello.txt")
    ('hello\n', 5)

    ```
    """

    user = "user"
    token = "hf_token_of_user"

    def __init__(self, root: str | os.PathLike | None = None):
        self._is_temporary = root is None
        self.root = Path(root if root is not None else tempfile.mkdtemp(prefix="hub-"))
        self.tokens = {self.token: self.user}
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.renamed: dict[str, str] = {}
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self._secret = os.urandom(16)
        self._servers: list[_Server] = []
        for name in ("blobs", "work"):
            (self.root / name).mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        for role in ("hub", "cdn"):
            server = _Server(self, role)
            # A short poll, as shutting down waits for one.
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
            self._servers.append(server)
        return self

    def __exit__(self, *exc_info) -> None:
        self.closing.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()
        if self._is_temporary:
            shutil.rmtree(self.root, ignore_errors=True)

    @property
    def endpoint(self) -> str:
        """The address to give as `HF_ENDPOINT`."""
        return self._servers[0].url

    # What tests do and ask

    def add_user(self, name: str) -> str:
        """Add a user; returns the user's token."""
        token = f"hf_token_of_{name}"
        self.tokens[token] = name
        return token

    def create_repo(
        self, repo_id: str, *, kind: str = "models", private: bool = False, gated: bool = False
    ) -> Repo:
        """Make an empty repository, or return the one there is.

        Args:
            repo_id (`str`): `user/name`.
            kind (`str`, defaults to `"models"`): `"models"`, `"datasets"` or `"spaces"`.
            private (`bool`, defaults to `False`): only its owner and its `readers` see it.
            gated (`bool`, defaults to `False`): everyone sees it, its owner and its `readers` get its files.
        """
        repo = Repo(kind, repo_id, private=private, gated=gated)
        with self.lock:
            if repo.url_path not in self.repos:
                self.repos[repo.url_path] = repo
                self._write_commit(repo, "main", "initial commit", "", {})
            return self.repos[repo.url_path]

    def commit(
        self,
        repo_id: str,
        files: dict[str, bytes | Path] | Path,
        *,
        kind: str = "models",
        branch: str = "main",
        private: bool = False,
    ) -> str:
        """Add files to a repository without going through a client.

        Args:
            repo_id (`str`): `user/name`; made if need be.
            files (`dict[str, bytes | Path]` or `Path`): contents by path, or a folder.
            kind, private: as in `create_repo`.
            branch (`str`, defaults to `"main"`): the branch; made from `main` if need be.

        Returns:
            `str`: the commit's id.
        """
        if isinstance(files, Path):
            folder = files
            files = {
                path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
            }
        repo = self.create_repo(repo_id, kind=kind, private=private)
        added = {}
        for path, content in files.items():
            if isinstance(content, Path):
                with content.open("rb") as stream:
                    added[path] = self._store(path, stream)
            else:
                with tempfile.SpooledTemporaryFile() as stream:
                    stream.write(content)
                    stream.seek(0)
                    added[path] = self._store(path, stream)
        with self.lock:
            head = repo.branches.get(branch, repo.branches["main"])
            return self._write_commit(repo, branch, "commit", "", repo.commits[head].files | added).id

    def rename(self, old: str, new: str) -> None:
        """Rename a repository; the old name leads to the new one."""
        with self.lock:
            repo = self.repos[new] = self.repos.pop(old)
            repo.id = new.removeprefix(f"{repo.kind}/")
            self.renamed[old] = new

    def inject(self, path: str, **what) -> Fault:
        """Let something go wrong; see `Fault`. The first fault that strikes a request is the one it meets."""
        fault = Fault(path, **what)
        with self.lock:
            self.faults.append(fault)
        return fault

    def bytes_served(self, file: str | None = None, *, with_headers: bool = False) -> int:
        """Bytes sent since the start or the last `forget`.

        Args:
            file (`str`, *optional*): count this file only, `user/name/path` (`datasets/user/name/path`).
            with_headers (`bool`, defaults to `False`): count status lines and headers too, not bodies alone.
        """
        with self.lock:
            wanted = [request for request in self.requests if file in (None, request.file)]
        return sum(request.sent_bytes if with_headers else request.body_bytes for request in wanted)

    def forget(self) -> None:
        """Drop all recorded requests and all faults."""
        with self.lock:
            self.requests = []
            self.faults = []

    def run(
        self,
        code: str,
        *,
        timeout: float = 300,
        meanwhile: Callable[[subprocess.Popen], None] | None = None,
        **env: str | None,
    ) -> str:
        """Run Python code in a fresh process whose Hub is this server and whose token is that of `user`.

        Runs share one cache, `HF_HOME`, unless given another.

        Args:
            code (`str`): the code.
            timeout (`float`, defaults to 300): seconds.
            meanwhile (`Callable`, *optional*): called with the running process, as to kill it.
            env (`str`, *optional*): environment variables; `None` takes one away, as in `HF_TOKEN=None`.

        Returns:
            `str`: what the code printed.

        Raises:
            RuntimeError: if it fails; with what it wrote to standard error.
        """
        variables = {name: value for name, value in os.environ.items() if not _FOREIGN_VARIABLES.match(name)}
        variables |= {
            "NO_PROXY": "*",
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": str(self.root / "hf_home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        for name, value in env.items():
            variables.pop(name, None)
            if value is not None:
                variables[name] = value
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=variables,
            cwd=self.root / "work",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            try:
                if meanwhile is not None:
                    meanwhile(process)
                output, errors = process.communicate(timeout=timeout)
            except BaseException:
                process.kill()
                raise
        if process.returncode != 0:
            raise RuntimeError(f"The process failed with exit code {process.returncode}.\n{errors}")
        return output

    # What the handler needs

    def strike(self, method: str, path: str) -> Fault | None:
        """The fault that this request meets."""
        with self.lock:
            return next((fault for fault in self.faults if fault.strikes(method, path)), None)

    def blob(self, sha256: str) -> Path:
        """Where content is kept."""
        return self.root / "blobs" / sha256

    def put_blob(self, stream: IO[bytes]) -> tuple[str, int]:
        """Keep content; returns its sha256 and its size."""
        digest, size = hashlib.sha256(), 0
        descriptor, name = tempfile.mkstemp(dir=self.root / "blobs")
        with os.fdopen(descriptor, "wb") as target:
            while chunk := stream.read(_CHUNK):
                target.write(chunk)
                digest.update(chunk)
                size += len(chunk)
        os.replace(name, self.blob(digest.hexdigest()))
        return digest.hexdigest(), size

    def describe_blob(self, path: str, sha256: str, *, is_lfs: bool) -> StoredFile:
        """The file that kept content becomes under `path`."""
        size = self.blob(sha256).stat().st_size
        content = (
            _POINTER.format(sha256=sha256, size=size).encode() if is_lfs else self.blob(sha256).read_bytes()
        )
        blob_id = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return StoredFile(path, size, sha256, blob_id, is_lfs)

    def sign(self, path: str) -> str:
        """The signature without which the large-file server does not answer."""
        return hmac.new(self._secret, path.encode(), "sha256").hexdigest()

    def cdn_url(self, repo: Repo, commit: Commit, path: str) -> str:
        """Signed address of a large file."""
        url_path = f"/cdn/{repo.url_path}/{commit.id}/{quote(path)}"
        return f"{self._servers[1].url}{url_path}?Signature={self.sign(url_path)}"

    def write_changes(self, repo: Repo, branch: str, lines: list[dict]) -> Commit:
        """Apply the lines of a commit request.

        Raises:
            ValueError: if a large file of the commit has not been uploaded.
            KeyError: if a file to be deleted is not there.
        """
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.lock:
            files = dict(repo.commits[repo.branches[branch]].files)
            for line in lines:
                value = line["value"]
                path = value.get("path", "")
                if line["key"] == "file":
                    with tempfile.SpooledTemporaryFile() as stream:
                        stream.write(base64.b64decode(value["content"]))
                        stream.seek(0)
                        sha256, _ = self.put_blob(stream)
                    files[path] = self.describe_blob(path, sha256, is_lfs=False)
                elif line["key"] == "lfsFile":
                    if not self.blob(value["oid"]).is_file():
                        raise ValueError(f"{path} has not been uploaded")
                    files[path] = self.describe_blob(path, value["oid"], is_lfs=True)
                elif line["key"] == "deletedFile":
                    del files[path]
                elif line["key"] == "deletedFolder":
                    prefix = path.rstrip("/") + "/"
                    files = {name: file for name, file in files.items() if not name.startswith(prefix)}
            return self._write_commit(repo, branch, header["summary"], header.get("description", ""), files)

    def _store(self, path: str, stream: IO[bytes]) -> StoredFile:
        sha256, size = self.put_blob(stream)
        return self.describe_blob(path, sha256, is_lfs=is_large(path, size))

    def _write_commit(
        self, repo: Repo, branch: str, title: str, message: str, files: dict[str, StoredFile]
    ) -> Commit:
        parent = repo.commits.get(repo.branches.get(branch, ""))
        tree = "".join(f"{path} {files[path].blob_id}\n" for path in sorted(files))
        seed = f"{repo.url_path} {len(repo.commits)} {title}\n{tree}"
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), title, message, date, files, parent)
        repo.commits[commit.id] = commit
        repo.branches[branch] = commit.id
        return commit


def is_large(path: str, size: int) -> bool:
    """Whether a file goes to the large-file store: by its name, as `.gitattributes` rules, or by its size."""
    return size > 0 and (path.endswith(_LFS_SUFFIXES) or size > _LFS_SIZE)


class _Server(ThreadingHTTPServer):
    """One listening port: `role` is `hub` (the API, small files) or `cdn` (large files)."""

    daemon_threads = True
    # Clients keep idle connections open: the server must not wait for them.
    block_on_close = False

    def __init__(self, hub: HubServer, role: str):
        self.hub = hub
        self.role = role
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        # A client that hangs up is part of many tests; anything else is a mistake of this server.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _HttpError(Exception):
    """An answer with an error status; `code` is what the client reads to choose its exception."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None
    ):
        super().__init__(message)
        self.status = status
        self.headers = {
            "X-Error-Message": message,
            **({"X-Error-Code": code} if code else {}),
            **(headers or {}),
        }


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_API_REPO = rf"/api/(?P<kind>models|datasets|spaces)/{_REPO}"
_WEB_REPO = rf"(?:(?P<kind>datasets|spaces)/)?{_REPO}"
_ROUTES: list[tuple[str, str, re.Pattern, Callable]] = []


def _route(role: str, method: str, pattern: str) -> Callable[[Callable], Callable]:
    """Let a method of the handler answer requests to `pattern`; it is called with the groups, unquoted."""

    def register(answer: Callable) -> Callable:
        _ROUTES.append((role, method, re.compile(pattern), answer))
        return answer

    return register


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are written apart: with Nagle's algorithm every answer would wait for a delayed ACK.
    disable_nagle_algorithm = True
    server: _Server
    _headers_buffer: list[bytes]

    def do_HEAD(self) -> None:
        self._answer("GET")

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    def log_message(self, format: str, *args) -> None:
        """Silent: requests are recorded instead."""

    # Answering

    def _answer(self, method: str) -> None:
        """Record the request, meet its fault, find its route."""
        self.hub = self.server.hub
        url = urlsplit(self.path)
        self.url_path, self.query = url.path, parse_qs(url.query)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.request_record = Request(self.command, unquote(url.path), self.server.role, headers)
        with self.hub.lock:
            self.hub.requests.append(self.request_record)
        self.fault = self.hub.strike(self.command, unquote(url.path)) or Fault("")
        # Read to its end whatever the answer: what is left would be taken for the connection's next request.
        with tempfile.SpooledTemporaryFile(max_size=1 << 20) as self.body:
            for chunk in self._incoming():
                self.body.write(chunk)
            self.body.seek(0)
            self.hub.closing.wait(self.fault.delay)
            try:
                if self.fault.status is not None:
                    raise _HttpError(self.fault.status, "Injected fault", headers=self.fault.headers)
                self._dispatch(method)
            except _HttpError as error:
                self._send_json({"error": str(error)}, error.status, error.headers)

    def _dispatch(self, method: str) -> None:
        for old, new in self.hub.renamed.items() if self.server.role == "hub" else ():
            if f"/{old}/" in f"{self.url_path}/":
                where = self.path.replace(f"/{old}", f"/{new}", 1)
                return self._send_headers(307, {"Location": where, "Content-Length": "0"})
        for role, route_method, pattern, answer in _ROUTES:
            match = pattern.fullmatch(self.url_path)
            if match and role == self.server.role and route_method == method:
                groups = {name: value and unquote(value) for name, value in match.groupdict().items()}
                return answer(self, **groups)
        raise _HttpError(404, f"This server does not speak {method} {self.url_path}")

    def _incoming(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return
        left = int(self.headers.get("Content-Length", 0))
        while left and (chunk := self.rfile.read(min(left, _CHUNK))):
            left -= len(chunk)
            yield chunk

    def _send_headers(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.request_record.status = status
        self.request_record.sent_bytes += sum(len(line) for line in self._headers_buffer) + len(b"\r\n")
        self.end_headers()

    def _send_body(self, chunks: Iterator[bytes]) -> None:
        if self.command == "HEAD":
            return
        left = self.fault.cut_after
        for chunk in chunks:
            piece = chunk if left is None else chunk[:left]
            self.request_record.body_bytes += len(piece)
            self.request_record.sent_bytes += len(piece)
            self.wfile.write(piece)
            if left is not None:
                left -= len(piece)
                if left == 0:
                    self.close_connection = True
                    return

    def _send_json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        lengths = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        self._send_headers(status, lengths | (headers or {}))
        self._send_body(iter([body]))

    def _send_file(self, repo: Repo, file: StoredFile, headers: dict[str, str]) -> None:
        """A file's content, or the part of it that is asked for."""
        self.request_record.file = f"{repo.url_path}/{file.path}"
        headers |= {
            "ETag": f'"{file.etag}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        try:
            wanted = parse_range(self.headers.get("Range"), file.size)
        except RangeNotSatisfiableError:
            raise _HttpError(
                416, "Range not satisfiable", headers={"Content-Range": f"bytes */{file.size}"}
            ) from None
        if self.fault.ignore_range or self.command == "HEAD":
            wanted = None
        start, end = wanted or (0, file.size)
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
        self._send_headers(206 if wanted else 200, headers | {"Content-Length": str(end - start)})
        self._send_body(_read(self.hub.blob(file.sha256), start, end))

    def _json_body(self) -> dict:
        return json.loads(self.body.read() or b"{}")

    # Who may do what

    def _user(self) -> str | None:
        authorization = self.headers.get("Authorization")
        if authorization is None:
            return None
        user = self.hub.tokens.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise _HttpError(401, "Invalid credentials in Authorization header")
        return user

    def _signed_in(self) -> str:
        user = self._user()
        if user is None:
            raise _HttpError(401, "Invalid username or password.")
        return user

    def _repo(self, kind: str, repo: str) -> Repo:
        """The repository, for a user who may know of it; to others it does not exist."""
        user = self._user()
        found = self.hub.repos.get(repo if kind == "models" else f"{kind}/{repo}")
        if found is None or (found.private and user != found.owner and user not in found.readers):
            # As the Hub has it, which tells strangers nothing: 401 without a token, 404 with one.
            raise _HttpError(404 if user else 401, "Repository not found", "RepoNotFound")
        return found

    def _own_repo(self, kind: str, repo: str) -> Repo:
        found = self._repo(kind, repo)
        if self._signed_in() != found.owner:
            raise _HttpError(403, f"You don't have the rights to change {found.id}")
        return found

    def _commit(self, repo: Repo, revision: str | None) -> Commit:
        name = revision or "main"
        commit = repo.commits.get(repo.branches.get(name.removeprefix("refs/heads/"), name))
        if commit is None:
            raise _HttpError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return commit

    # The API

    @_route("hub", "GET", r"/api/whoami-v2")
    def whoami(self) -> None:
        name = self._signed_in()
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        self._send_json(
            {"type": "user", "id": name, "name": name, "fullname": name, "orgs": [], "auth": auth}
        )

    @_route("hub", "POST", r"/api/repos/create")
    def create_repo(self) -> None:
        user, wanted = self._signed_in(), self._json_body()
        owner = wanted.get("organization") or user
        if owner != user:
            raise _HttpError(403, f"You don't have the rights to create a repository under {owner}")
        private = wanted.get("private", wanted.get("visibility") == "private")
        repo = Repo(f"{wanted.get('type') or 'model'}s", f"{owner}/{wanted['name']}")
        exists = repo.url_path in self.hub.repos
        if not exists:
            self.hub.create_repo(repo.id, kind=repo.kind, private=bool(private))
        answer = {"url": f"{self.hub.endpoint}/{repo.url_path}", "name": repo.id, "id": repo.id}
        if exists:
            answer["error"] = "You already created this repo"
        self._send_json(answer, 409 if exists else 200)

    @_route("hub", "DELETE", r"/api/repos/delete")
    def delete_repo(self) -> None:
        wanted = self._json_body()
        owner = wanted.get("organization") or self._signed_in()
        repo = self._own_repo(f"{wanted.get('type') or 'model'}s", f"{owner}/{wanted['name']}")
        del self.hub.repos[repo.url_path]
        self._send_json({})

    @_route("hub", "POST", r"/api/validate-yaml")
    def validate_yaml(self) -> None:
        self._send_json({"errors": [], "warnings": []})

    @_route("hub", "GET", rf"{_API_REPO}(?:/revision/(?P<revision>[^/]+))?")
    def repo_info(self, kind: str, repo: str, revision: str | None) -> None:
        found = self._repo(kind, repo)
        commit = self._commit(found, revision)
        siblings = []
        for path, file in sorted(commit.files.items()):
            entry: dict[str, Any] = {"rfilename": path}
            if "blobs" in self.query:
                entry |= {"size": file.size, "blobId": file.blob_id}
                if file.is_lfs:
                    entry["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 0}
            siblings.append(entry)
        self._send_json(
            {
                "id": found.id,
                "author": found.owner,
                "sha": commit.id,
                "private": found.private,
                "gated": "manual" if found.gated else False,
                "disabled": False,
                "lastModified": commit.date,
                "createdAt": commit.date,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": siblings,
            }
        )

    @_route("hub", "GET", rf"{_API_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
    def tree(self, kind: str, repo: str, revision: str, path: str | None) -> None:
        files = self._commit(self._repo(kind, repo), revision).files
        prefix = f"{path}/" if path else ""
        below = {name: file for name, file in sorted(files.items()) if name.startswith(prefix)}
        if path and not below:
            raise _HttpError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries, folders = [], {}
        for name, file in below.items():
            parts = name.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                folder = prefix + "/".join(parts[:depth])
                folders[folder] = {
                    "type": "directory",
                    "path": folder,
                    "size": 0,
                    "oid": _folder_id(folder, files),
                }
            if recursive or len(parts) == 1:
                entries.append(file.describe())
        self._send_json([*folders.values(), *entries])

    @_route("hub", "POST", rf"{_API_REPO}/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, kind: str, repo: str, revision: str) -> None:
        files = self._commit(self._repo(kind, repo), revision).files
        body = self.body.read().decode()
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = json.loads(body)["paths"] if is_json else parse_qs(body).get("paths", [])
        entries = []
        for path in (path.rstrip("/") for path in paths):
            if path in files:
                entries.append(files[path].describe())
            elif any(name.startswith(f"{path}/") for name in files):
                entries.append({"type": "directory", "path": path, "size": 0, "oid": _folder_id(path, files)})
        self._send_json(entries)

    @_route("hub", "GET", rf"{_API_REPO}/refs")
    def refs(self, kind: str, repo: str) -> None:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
            for name, commit in self._repo(kind, repo).branches.items()
        ]
        self._send_json({"branches": branches, "converts": [], "tags": [], "pullRequests": []})

    @_route("hub", "GET", rf"{_API_REPO}/commits/(?P<revision>[^/]+)")
    def commits(self, kind: str, repo: str, revision: str) -> None:
        found = self._repo(kind, repo)
        commit: Commit | None = self._commit(found, revision)
        history = []
        while commit is not None:
            entry = {"id": commit.id, "title": commit.title, "message": commit.message, "date": commit.date}
            history.append(entry | {"authors": [{"user": found.owner}]})
            commit = commit.parent
        self._send_json(history)

    @_route("hub", "POST", rf"{_API_REPO}/branch/(?P<branch>[^/]+)")
    def create_branch(self, kind: str, repo: str, branch: str) -> None:
        found = self._own_repo(kind, repo)
        if branch in found.branches:
            raise _HttpError(409, "Reference already exists")
        found.branches[branch] = self._commit(found, self._json_body().get("startingPoint")).id
        self._send_json({})

    @_route("hub", "DELETE", rf"{_API_REPO}/branch/(?P<branch>[^/]+)")
    def delete_branch(self, kind: str, repo: str, branch: str) -> None:
        found = self._own_repo(kind, repo)
        if found.branches.pop(branch, None) is None:
            raise _HttpError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        self._send_json({})

    # Uploads: which files are large, their content, then the commit

    @_route("hub", "POST", rf"{_API_REPO}/preupload/(?P<revision>[^/]+)")
    def preupload(self, kind: str, repo: str, revision: str) -> None:
        present = self._commit(self._own_repo(kind, repo), revision).files
        answers = []
        for wanted in self._json_body()["files"]:
            path = wanted["path"]
            mode = "lfs" if is_large(path, wanted["size"]) else "regular"
            answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            if path in present:
                answer["oid"] = present[path].etag
            answers.append(answer)
        self._send_json({"files": answers})

    @_route("hub", "POST", rf"/{_WEB_REPO}\.git/info/lfs/objects/batch")
    def lfs_batch(self, kind: str | None, repo: str) -> None:
        self._own_repo(kind or "models", repo)
        objects = []
        for wanted in self._json_body()["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if not self.hub.blob(wanted["oid"]).is_file():
                path = f"/lfs/{wanted['oid']}"
                href = f"{self.hub.endpoint}{path}?Signature={self.hub.sign(path)}"
                answer["actions"] = {"upload": {"href": href}}
            objects.append(answer)
        self._send_json({"transfer": "basic", "objects": objects})

    @_route("hub", "PUT", r"/lfs/(?P<oid>[0-9a-f]{64})")
    def lfs_upload(self, oid: str) -> None:
        self._check_signature()
        sha256, _ = self.hub.put_blob(self.body)
        if sha256 != oid:
            raise _HttpError(400, f"The content's sha256 is {sha256}, not {oid}")
        self._send_json({}, headers={"ETag": f'"{sha256}"'})

    @_route("hub", "POST", rf"{_API_REPO}/commit/(?P<revision>[^/]+)")
    def commit(self, kind: str, repo: str, revision: str) -> None:
        found = self._own_repo(kind, repo)
        if "create_pr" in self.query or revision not in found.branches:
            raise _HttpError(400, "This server commits to branches only")
        try:
            lines = [json.loads(line) for line in self.body.read().splitlines() if line.strip()]
            parent = lines[0]["value"].get("parentCommit")
            if parent not in (None, found.branches[revision]):
                raise _HttpError(412, "A commit has happened since. Please refresh and try again.")
            commit = self.hub.write_changes(found, revision, lines)
        except KeyError as error:
            raise _HttpError(404, f"A file with this name doesn't exist: {error}", "EntryNotFound") from error
        except (ValueError, binascii.Error) as error:
            raise _HttpError(400, str(error)) from error
        url = f"{self.hub.endpoint}/{found.url_path}/commit/{commit.id}"
        self._send_json({"success": True, "commitOid": commit.id, "commitUrl": url, "hookOutput": ""})

    # Downloads

    @_route("hub", "GET", rf"/{_WEB_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, kind: str | None, repo: str, revision: str, path: str) -> None:
        found = self._repo(kind or "models", repo)
        user = self._user()
        if found.gated and user != found.owner and user not in found.readers:
            raise _HttpError(403 if user else 401, f"Access to {found.id} is restricted", "GatedRepo")
        commit = self._commit(found, revision)
        headers = {"X-Repo-Commit": commit.id}
        file = commit.files.get(path)
        if file is None:
            raise _HttpError(404, "Entry not found", "EntryNotFound", headers)
        if not file.is_lfs:
            return self._send_file(found, file, headers)
        self.request_record.file = f"{found.url_path}/{path}"
        headers |= {
            "Location": self.hub.cdn_url(found, commit, path),
            "X-Linked-Size": str(file.size),
            "X-Linked-ETag": f'"{file.etag}"',
            "Accept-Ranges": "bytes",
            "Content-Length": "0",
        }
        if found.xet:
            route = f"{self.hub.endpoint}/api/{found.kind}/{found.id}/xet-read-token/{commit.id}"
            headers |= {
                "X-Xet-Hash": file.sha256,
                "X-Xet-Refresh-Route": route,
                "Link": f'<{route}>; rel="xet-auth"',
            }
        self._send_headers(302, headers)

    @_route("cdn", "GET", rf"/cdn/{_WEB_REPO}/(?P<revision>[0-9a-f]{{40}})/(?P<path>.+)")
    def large_file(self, kind: str | None, repo: str, revision: str, path: str) -> None:
        self._check_signature()
        found = self.hub.repos[repo if kind is None else f"{kind}/{repo}"]
        self._send_file(found, found.commits[revision].files[path], {})

    def _check_signature(self) -> None:
        given = self.query.get("Signature", [""])[0]
        if not hmac.compare_digest(given, self.hub.sign(self.url_path)):
            raise _HttpError(403, "The signature does not fit this address")


def _folder_id(path: str, files: dict[str, StoredFile]) -> str:
    """An id that changes with the folder's contents."""
    below = (f"{name} {file.blob_id}" for name, file in sorted(files.items()) if name.startswith(f"{path}/"))
    return hashlib.sha1("\n".join(below).encode()).hexdigest()


def _read(path: Path, start: int, end: int) -> Iterator[bytes]:
    """The bytes of a file from `start` to `end`, in pieces."""
    with path.open("rb") as stream:
        stream.seek(start)
        while start < end and (chunk := stream.read(min(_CHUNK, end - start))):
            start += len(chunk)
            yield chunk
