"""Hubs that lie, cut off and stall; and uploads that are killed."""

import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import hub_handler
from hub_server import HubServer

from .faults import Place, Row
from .forks import Ended, Worker, kill
from .jobs import Job, fresh, tree

_REPO = "user/model"
LIMIT = 150.0  # seconds after which a command is taken to hang


@dataclass
class Lie:
    """What a Hub answers instead of the truth.

    Args:
        name (`str`): what tables call it.
        change (`Callable`): of status and headers of an answer.
        body (`Callable`, *optional*): of the body's pieces.
        cut (`int`, *optional*): after how many bytes of the body the connection is closed.
        pause (`float`): seconds before each byte.
        whole (`bool`): the whole file, whatever part of it was asked for.
        undetectable (`bool`, defaults to `False`): no reader of a part can see it; the row says so.
    """

    name: str
    change: Callable[[int, dict[str, str]], tuple[int, dict[str, str]]] = lambda status, headers: (
        status,
        headers,
    )
    body: Callable[[bytes], bytes] | None = None
    cut: int | None = None
    pause: float = 0.0
    whole: bool = False
    undetectable: bool = False


class _LyingHandler(hub_handler._Handler):
    """Answers of the Hub of the tests, changed for what is asked for under `/resolve/` or on the CDN."""

    def _lie(self) -> Lie | None:
        lie, part = self.server.lie  # type: ignore[attr-defined]
        return lie if lie is not None and self.path.split("?")[0].endswith(part) else None

    def _send_file(self, *arguments: Any) -> None:
        lie = self._lie()
        if lie is not None and lie.whole:
            self.fault = replace(self.fault, ignore_range=True)
        super()._send_file(*arguments)

    def _send_headers(self, status: int, headers: dict[str, str]) -> None:
        lie = self._lie()
        if lie is not None and status < 400:
            status, headers = lie.change(status, dict(headers))
        super()._send_headers(status, headers)

    def _send_body(self, chunks: Any) -> None:
        lie = self._lie()
        if lie is None or self.command == "HEAD":
            return super()._send_body(chunks)
        sent = 0
        for chunk in chunks:
            piece = lie.body(chunk) if lie.body else chunk
            if lie.cut is not None:
                piece = piece[: max(0, lie.cut - sent)]
            if lie.pause:
                for byte in piece:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    if self.hub.closing.wait(lie.pause) or self._lie() is not lie:
                        self.close_connection = True
                        return
            else:
                self.wfile.write(piece)
            sent += len(piece)
            if lie.cut is not None and sent >= lie.cut:
                self.close_connection = True
                return


class Thief:
    """Another server, which remembers the tokens that it is sent."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        thief = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if "authorization" in {name.lower() for name in self.headers}:
                    thief.tokens.append(self.headers["Authorization"])
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                """Silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """On another host: within one, clients send the token along."""
        return f"http://localhost:{self._server.server_address[1]}/stolen"

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()


def _longer(status: int, headers: dict[str, str], by: int) -> tuple[int, dict[str, str]]:
    return status, headers | {"Content-Length": str(max(0, int(headers.get("Content-Length", "0")) + by))}


def _flipped(piece: bytes) -> bytes:
    return bytes(byte ^ 0x55 for byte in piece)


def _last_changed(piece: bytes) -> bytes:
    return piece[:-1] + _flipped(piece[-1:])


def lies(thief: Thief) -> list[Lie]:
    """All of them."""
    return [
        Lie("a length that is too long", lambda status, headers: _longer(status, headers, 1000)),
        Lie("a length that is too short", lambda status, headers: _longer(status, headers, -7)),
        Lie("cut after 100 bytes, each time", cut=100),
        Lie("nothing but errors (503)", lambda _, headers: (503, {"Content-Length": "0"})),
        Lie(
            "`Retry-After: 86400`",
            lambda _, headers: (429, {"Content-Length": "0", "Retry-After": "86400"}),
        ),
        Lie(
            "another etag with each answer",
            lambda status, headers: (status, headers | {"ETag": f'"{time.time_ns()}"'}),
        ),
        Lie(
            "another range than asked for",
            lambda status, headers: (status, headers | {"Content-Range": "bytes 0-9/10"}),
        ),
        Lie("the whole file for a range (200)", whole=True),
        Lie(
            "`Content-Encoding: gzip`, which was not asked for",
            lambda status, headers: (status, headers | {"Content-Encoding": "gzip"}),
        ),
        Lie("nothing, and closes", cut=0),
        Lie("a byte every 0.25 s", pause=0.25),
        Lie(
            "a redirect to another host",
            lambda _, headers: (302, {"Location": thief.url, "Content-Length": "0"}),
        ),
        Lie("other bytes of the right length", body=_flipped, undetectable=True),
        Lie("another byte at the end of each 64 KiB", body=_last_changed, undetectable=True),
    ]


PARTS = ("config.json", "model.safetensors.index.json", ".safetensors")


class Network:
    """A Hub with the small model, read with `emo extract` and `emo shard`."""

    def __init__(self, hub: HubServer, inputs: Path):
        self.hub, self.inputs = hub, inputs
        hub.commit(_REPO, inputs / "model")
        for server in hub._servers:
            server.lie = (None, "")  # type: ignore[attr-defined]
            server.RequestHandlerClass = _LyingHandler

    def tell(self, lie: Lie | None, part: str = "") -> None:
        """Lie from now on about files whose names end so; `None` for the truth."""
        for server in self.hub._servers:
            server.lie = (lie, part)  # type: ignore[attr-defined]


def lying(lie: Lie, thief: Thief, network: Network, place: Place, jobs: list[Job], times: int) -> Row:
    """Read from a Hub that lies about one kind of its files; then from one that tells the truth."""
    row = Row("the Hub sends " + lie.name, ", ".join(f"`emo {job.name}`" for job in jobs))
    for number in range(times):
        part, job = PARTS[number % len(PARTS)], jobs[(number // len(PARTS)) % len(jobs)]
        fresh(place.work)
        words = [*job.command(place.inputs), "--cache-dir", os.fspath(place.work / "cache")]
        words = [_REPO if word == f"{place.inputs}/model" else word for word in words]
        network.tell(lie, part)
        thief.tokens.clear()
        pid = place.worker.start(place.work, words=words)
        timer = threading.Timer(LIMIT, kill, [pid])
        timer.start()
        ended = place.worker.end()
        timer.cancel()
        network.tell(None)
        found = tree(place.out) if place.out.exists() else {}
        if thief.tokens:
            row.note("THE TOKEN WENT ALONG", False)
        elif ended.status < 0:
            row.note(f"given up by nobody within {LIMIT:.0f} s", False)
        elif ended.status == 0 and _weights(found) != _weights(job.right):
            what = (
                "wrong bytes are taken: nothing tells them" if lie.undetectable else "WRONG BYTES, status 0"
            )
            row.note(what, lie.undetectable)
        elif ended.status == 0:
            row.note("right bytes all the same", True)
        elif found:
            row.note("an error, and something under the final name", False)
        elif ended.error:
            row.note(f"an error, but {ended.error}", False)
        else:
            row.note(*_with_an_honest_hub(place, job, words, ended))
    return row


def _with_an_honest_hub(place: Place, job: Job, words: list[str], refused: Ended) -> tuple[str, bool]:
    again = place.worker.run(place.work, words=words)
    if again.status == 0 and _weights(tree(place.out)) == _weights(job.right):
        return "one line; right as soon as the Hub is honest", True
    # huggingface_hub keeps a file that has the length the Hub said, damaged or not.
    named = [path for path in (place.inputs / "model").iterdir() if path.name in again.told]
    shutil.rmtree(place.work / "cache")
    third = place.worker.run(place.work, words=words)
    if named and third.status == 0 and _weights(tree(place.out)) == _weights(job.right):
        return "one line names the damaged file; right when it is deleted from the cache", True
    return f"refused, and with an honest Hub: {again.last}", False


def _weights(found: dict[str, str]) -> dict[str, str]:
    """Without the files that say where a model comes from."""
    return {name: digest for name, digest in found.items() if name.endswith((".safetensors", ".index.json"))}


def killed_pushes(hub: HubServer, worker: Worker, place: Place, times: int) -> Row:
    """Kill `emo push` at random moments; then push again."""
    row = Row("killed (SIGKILL)", "`emo push`")
    folder = place.inputs / "small"
    worker.must(place.work, words=["push", str(folder), "user/first"])
    began = time.monotonic()
    worker.must(place.work, words=["push", str(folder), "user/second"])
    seconds = time.monotonic() - began
    right = _head(hub, "user/second")
    tries = 0
    while row.tried < times and tries < 3 * times:
        tries += 1
        name = f"user/pushed{tries}"
        pid = worker.start(place.work, words=["push", str(folder), name])
        time.sleep(place.random.uniform(0, seconds))
        kill(pid)
        if worker.end().status >= 0:
            continue
        time.sleep(0.05)  # the server ends what it was at
        before = _head(hub, name)
        weights = {file for file in right if file != "README.md"}
        if before and {file for file in before if file != "README.md"} not in (set(), weights):
            row.note("HALF A MODEL on the branch", False)
            continue
        ended = worker.run(place.work, words=["push", str(folder), name])
        after = _head(hub, name)
        same = {f: d for f, d in after.items() if f in weights} == {
            f: d for f, d in right.items() if f in weights
        }
        if ended.status or not same or set(after) != set(right):
            row.note(f"the next push: {ended.last}", False)
        else:
            row.note("no half commit; the next push is right", True)
    return row


def _head(hub: HubServer, name: str) -> dict[str, str]:
    repo = hub.repos.get(name)
    if repo is None:
        return {}
    return {path: file.sha256 for path, file in repo.commits[repo.branches["main"]].files.items()}
