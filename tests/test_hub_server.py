"""The loopback Hub itself: what other tests rest on."""

import http.client
import json
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hub_server import HubServer

LARGE = bytes(range(256)) * 4
LARGE_FILE = "user/model/weights.safetensors"


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def client(hub, code, **env):
    """What the real client says: the value of `out` after `code`, run with an `api`."""
    prelude = "import json\nfrom huggingface_hub import HfApi\napi = HfApi()\n"
    return json.loads(hub.run(f"{prelude}{code}\nprint(json.dumps(out))", **env).splitlines()[-1])


def request(url, method="GET", **headers):
    """One plain request, redirects not followed: status, headers (small letters), body as far as it came."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=10)
    connection.request(method, f"{parts.path}?{parts.query}", headers=headers)
    response = connection.getresponse()
    try:
        body = response.read()
    except http.client.IncompleteRead as error:
        body = error.partial
    connection.close()
    return response.status, {name.lower(): value for name, value in response.getheaders()}, body


def large_file_url(hub):
    hub.commit("user/model", {"weights.safetensors": LARGE, "config.json": b"{}"})
    return request(f"{hub.endpoint}/user/model/resolve/main/weights.safetensors")[1]["location"]


def test_a_small_file_is_served_at_once_and_a_large_one_by_redirect(hub):
    commit = hub.commit("user/model", {"weights.safetensors": LARGE, "config.json": b"{}"})

    status, headers, body = request(f"{hub.endpoint}/user/model/resolve/main/config.json")
    assert (status, headers["x-repo-commit"], body) == (200, commit, b"{}")

    status, headers, body = request(f"{hub.endpoint}/user/model/resolve/main/weights.safetensors")
    assert (status, headers["x-repo-commit"], headers["x-linked-size"], body) == (302, commit, "1024", b"")
    status, linked, body = request(headers["location"])
    assert (status, body, linked["etag"]) == (200, LARGE, headers["x-linked-etag"])


def test_a_large_file_needs_its_signature(hub):
    assert request(large_file_url(hub).split("?")[0])[0] == 403


@pytest.mark.parametrize(
    ("asked", "answered", "content_range"),
    [
        ("bytes=10-19", LARGE[10:20], "bytes 10-19/1024"),
        ("bytes=1000-", LARGE[1000:], "bytes 1000-1023/1024"),
        ("bytes=-5", LARGE[-5:], "bytes 1019-1023/1024"),
        ("bytes=1020-9999", LARGE[1020:], "bytes 1020-1023/1024"),
    ],
)
def test_a_range_is_answered_with_those_bytes(hub, asked, answered, content_range):
    status, headers, body = request(large_file_url(hub), Range=asked)
    assert (status, body, headers["content-range"]) == (206, answered, content_range)


@pytest.mark.parametrize("asked", ["bytes=5-2", "bytes=0-1,4-5", "lines=1-2", "bytes=-"])
def test_what_is_not_one_range_is_answered_with_the_whole_file(hub, asked):
    status, headers, body = request(large_file_url(hub), Range=asked)
    assert (status, body) == (200, LARGE)


@pytest.mark.parametrize("asked", ["bytes=1024-", "bytes=2000-3000", "bytes=-0"])
def test_a_range_beyond_the_end_is_refused(hub, asked):
    status, headers, _ = request(large_file_url(hub), Range=asked)
    assert (status, headers["content-range"]) == (416, "bytes */1024")


def test_bytes_are_counted_per_file_and_with_headers(hub):
    url = large_file_url(hub)
    hub.forget()
    request(url, Range="bytes=0-99")
    request(url, Range="bytes=500-509")
    request(url, method="HEAD")
    request(f"{hub.endpoint}/user/model/resolve/main/config.json")

    assert hub.bytes_served(LARGE_FILE) == 110
    assert hub.bytes_served() == 112
    with_headers = hub.bytes_served(LARGE_FILE, with_headers=True)
    assert 110 + 3 * 100 < with_headers < 110 + 3 * 400
    assert [r.headers.get("range") for r in hub.requests] == ["bytes=0-99", "bytes=500-509", None, None]
    assert [(r.server, r.method, r.status) for r in hub.requests] == [
        ("cdn", "GET", 206),
        ("cdn", "GET", 206),
        ("cdn", "HEAD", 200),
        ("hub", "GET", 200),
    ]


def test_the_headers_are_counted_to_the_byte(hub):
    """Read from a plain socket, so that nothing between counts for us."""
    hub.commit("user/model", {"config.json": b"{}"})
    with socket.create_connection(("127.0.0.1", urlsplit(hub.endpoint).port), timeout=10) as connection:
        connection.sendall(b"GET /user/model/resolve/main/config.json HTTP/1.1\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert hub.bytes_served(with_headers=True) == len(answer)


def test_faults_strike_the_requests_they_name(hub):
    url = large_file_url(hub)
    fault = hub.inject("/cdn/*.safetensors", method="GET", nth=2, status=503, headers={"Retry-After": "0"})
    assert [request(url)[0] for _ in range(4)] == [200, 503, 200, 200]
    assert (fault.seen, fault.hits) == (4, 1)


def test_a_body_can_be_cut_a_range_ignored_and_an_answer_delayed(hub):
    url = large_file_url(hub)
    hub.inject("/cdn/*", cut_after=100)
    status, headers, body = request(url)
    assert (status, headers["content-length"], body) == (200, "1024", LARGE[:100])

    hub.inject("/cdn/*", ignore_range=True)
    status, headers, body = request(url, Range="bytes=0-1")
    assert (status, body) == (200, LARGE)
    assert "content-range" not in headers

    hub.inject("/cdn/*", delay=0.2)
    start = time.monotonic()
    request(url)
    assert time.monotonic() - start >= 0.2


def test_the_client_pushes_lists_and_deletes(hub, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "part.bin").write_bytes(LARGE)
    (tmp_path / "notes.txt").write_text("notes")
    code = f"""
repo = dict(repo_id="user/set", repo_type="dataset")
api.create_repo(**repo)
first = api.upload_folder(**repo, folder_path={str(tmp_path)!r})
info = api.dataset_info("user/set", files_metadata=True)
branch = api.list_repo_refs(**repo).branches[0]
out = {{
    "whoami": api.whoami()["name"],
    "siblings": {{s.rfilename: s.size for s in info.siblings}},
    "tree": [entry.path for entry in api.list_repo_tree(**repo)],
    "folder": [(f.path, f.lfs.size) for f in api.list_repo_tree(**repo, path_in_repo="data", recursive=True)],
    "head": [first.oid, info.sha, branch.target_commit, api.list_repo_commits(**repo)[0].commit_id],
    "branch": branch.name,
    "paths": [info.size for info in api.get_paths_info(**repo, paths=["notes.txt", "gone"])],
    "again": api.upload_file(**repo, path_or_fileobj=b"notes", path_in_repo="notes.txt").oid,
}}
api.delete_file(**repo, path_in_repo="notes.txt")
out["left"] = api.list_repo_files(**repo)
"""
    out = client(hub, code)
    head = out["head"][0]
    assert out == {
        "whoami": "user",
        "siblings": {"data/part.bin": 1024, "notes.txt": 5},
        "tree": ["data", "notes.txt"],
        "folder": [["data/part.bin", 1024]],
        "head": [head] * 4,
        "branch": "main",
        "paths": [5],
        "again": head,  # nothing has changed: no commit is made
        "left": ["data/part.bin"],
    }


def test_who_may_read_what(hub):
    hub.commit("user/secret", {"config.json": b"{}"}, private=True)
    hub.commit("user/gated", {"config.json": b"{}"})
    hub.create_repo("user/gated").gated = True
    guest = hub.add_user("guest")
    code = """
def outcome(call, *args):
    try:
        call(*args)
        return "read"
    except Exception as error:
        return type(error).__name__

out = [
    outcome(api.model_info, "user/secret"),
    outcome(api.model_info, "user/gated"),
    outcome(api.hf_hub_download, "user/gated", "config.json"),
]
"""
    assert client(hub, code, HF_TOKEN=None) == ["RepositoryNotFoundError", "read", "GatedRepoError"]
    assert client(hub, code, HF_TOKEN=guest) == ["RepositoryNotFoundError", "read", "GatedRepoError"]
    hub.create_repo("user/gated").readers.add("guest")
    assert client(hub, code, HF_TOKEN=guest) == ["RepositoryNotFoundError", "read", "read"]
    assert client(hub, code) == ["read", "read", "read"]


def test_what_is_not_there_is_named(hub):
    hub.commit("user/model", {"config.json": b"{}"})
    resolve = f"{hub.endpoint}/user/model/resolve"
    assert request(f"{resolve}/nowhere/config.json")[1]["x-error-code"] == "RevisionNotFound"
    assert request(f"{resolve}/main/absent.json")[1]["x-error-code"] == "EntryNotFound"
    assert request(f"{hub.endpoint}/nobody/model/resolve/main/config.json")[0] == 401
    with pytest.raises(RuntimeError, match="the reason why"):
        hub.run("raise SystemExit('the reason why')")


def test_the_client_tries_a_cut_download_again_and_keeps_the_token_on_the_hub(hub):
    large_file_url(hub)
    hub.forget()
    hub.inject("/cdn/*", method="GET", cut_after=1000)
    code = "import huggingface_hub as h; print(h.hf_hub_download('user/model', 'weights.safetensors'))"
    assert Path(hub.run(code).strip()).read_bytes() == LARGE

    # The client drops what has come of its current piece of 10 MB, and so begins anew.
    assert hub.bytes_served(LARGE_FILE) == 1000 + len(LARGE)
    cdn = [r for r in hub.requests if r.server == "cdn"]
    assert len(cdn) == 2
    assert not any("authorization" in r.headers for r in cdn)
    assert all(r.headers["authorization"] == f"Bearer {hub.token}" for r in hub.requests if r.server == "hub")


def test_branches_and_commits_are_revisions(hub):
    first = hub.commit("user/model", {"config.json": b'{"a": 1}'})
    client(hub, f'out = api.create_branch("user/model", branch="dev/one", revision={first!r})')
    hub.commit("user/model", {"config.json": b'{"a": 2}'})
    hub.commit("user/model", {"config.json": b'{"a": 3}'}, branch="dev/one")

    def read(revision):
        return json.loads(request(f"{hub.endpoint}/user/model/resolve/{revision}/config.json")[2])["a"]

    assert [read(revision) for revision in (first, "main", "dev%2Fone")] == [1, 2, 3]
