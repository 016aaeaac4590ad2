"""How the small Hub of the tests answers: its routes, each as the Hub's own API has it."""

import binascii
import hmac
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_repos import (
    Commit,
    Fault,
    RangeNotSatisfiableError,
    Repo,
    Request,
    StoredFile,
    folder_id,
    is_large,
    parse_range,
)

if TYPE_CHECKING:
    from hub_server import HubServer

CHUNK = 1 << 16


class Listener(ThreadingHTTPServer):
    """One listening port: `role` is `hub` (the API, small files) or `cdn` (large files)."""

    daemon_threads = True
    # Clients keep idle connections open: the server must not wait for them.
    block_on_close = False

    def __init__(self, hub: "HubServer", role: str):
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
    server: Listener
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
        while left and (chunk := self.rfile.read(min(left, CHUNK))):
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
        if self.fault.trickle:
            chunks = (chunk[at : at + 100] for chunk in chunks for at in range(0, len(chunk), 100))
        for chunk in chunks:
            if self.fault.trickle and self.hub.closing.wait(self.fault.trickle):
                self.close_connection = True
                return
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
                    "oid": folder_id(folder, files),
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
                entries.append({"type": "directory", "path": path, "size": 0, "oid": folder_id(path, files)})
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


def _read(path: Path, start: int, end: int) -> Iterator[bytes]:
    """The bytes of a file from `start` to `end`, in pieces."""
    with path.open("rb") as stream:
        stream.seek(start)
        while start < end and (chunk := stream.read(min(CHUNK, end - start))):
            start += len(chunk)
            yield chunk
