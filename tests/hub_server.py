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
import hashlib
import hmac
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import quote

import fresh_processes
from hub_handler import CHUNK, Listener
from hub_repos import POINTER, Commit, Fault, Repo, Request, StoredFile, is_large

# Variables that would lead the client elsewhere than to this server, or to another cache.
_FOREIGN_VARIABLES = re.compile(r"(HF_|HUGGING|TRANSFORMERS_|(http|https|all|no)_proxy$)", re.IGNORECASE)


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
        self._servers: list[Listener] = []
        for name in ("blobs", "work"):
            (self.root / name).mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        for role in ("hub", "cdn"):
            server = Listener(self, role)
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
        meanwhile: Callable[[Any], None] | None = None,
        **env: str | None,
    ) -> str:
        """Run Python code in a fresh process whose Hub is this server and whose token is that of `user`.

        Runs share one cache, `HF_HOME`, unless given another.

        Args:
            code (`str`): the code.
            timeout (`float`, defaults to 300): seconds.
            meanwhile (`Callable`, *optional*): called with the running process, as to kill it; it has
                `poll` and `send_signal`.
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
        process = fresh_processes.start(code, env=variables, cwd=self.root / "work")
        try:
            if meanwhile is not None:
                meanwhile(process)
            output, errors = process.communicate(timeout)
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
            while chunk := stream.read(CHUNK):
                target.write(chunk)
                digest.update(chunk)
                size += len(chunk)
        os.replace(name, self.blob(digest.hexdigest()))
        return digest.hexdigest(), size

    def describe_blob(self, path: str, sha256: str, *, is_lfs: bool) -> StoredFile:
        """The file that kept content becomes under `path`."""
        size = self.blob(sha256).stat().st_size
        content = (
            POINTER.format(sha256=sha256, size=size).encode() if is_lfs else self.blob(sha256).read_bytes()
        )
        blob_id = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return StoredFile(path, size, sha256, blob_id, is_lfs)

    def sign(self, path: str) -> str:
        """The signature without which the large-file server does not answer."""
        return hmac.new(self._secret, path.encode(), "sha256").hexdigest()

    def cdn_url(self, repo: Repo, commit: Commit, path: str) -> str:
        """Signed address of a large file. It is on another host: within one, clients follow redirects."""
        url_path = f"/cdn/{repo.url_path}/{commit.id}/{quote(path)}"
        host = self._servers[1].url.replace("127.0.0.1", "localhost")
        return f"{host}{url_path}?Signature={self.sign(url_path)}"

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
