"""Parts of files where the way is not straight: proxies, Xet, new names, moved branches, forcing."""

import hashlib
import http.client
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from hub_server import HubServer
from transformers_emo import EmoForCausalLM

FACTS = """
import hashlib, json
from transformers import AutoModelForCausalLM
import transformers_emo

def facts(model):
    return {n: hashlib.sha256(t.numpy().tobytes()).hexdigest() for n, t in model.state_dict().items()}

def load(**kwargs):
    return AutoModelForCausalLM.from_pretrained("user/model", **kwargs)

def mark(name):
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session
    get_session().get(constants.ENDPOINT + "/mark/" + name)

FIRST, SECOND = [[0, 3, 11]] * 3, [[0, 4, 11]] * 3
out = {}
"""


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


class _Forward(BaseHTTPRequestHandler):
    """Sends a request on as it is, with a note that it came this way."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        onward = http.client.HTTPConnection(address.netloc, timeout=60)
        headers = {
            name: value for name, value in self.headers.items() if not name.lower().startswith("proxy")
        }
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
        path = address.path + (f"?{address.query}" if address.query else "")
        onward.request(self.command, path, body=body, headers=headers | {"Via": "1.1 the-proxy"})
        response = onward.getresponse()
        content = response.read()
        self.send_response_only(response.status)
        for name, value in response.getheaders():
            if name.lower() != "transfer-encoding":
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        onward.close()

    do_HEAD = do_POST = do_GET

    def log_message(self, format: str, *args) -> None:
        """Silent."""


@pytest.fixture
def proxy():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Forward)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def local(folder, subset):
    tensors = EmoForCausalLM.from_pretrained(folder, expert_subset=subset).state_dict()
    return {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in tensors.items()}


def run(hub, code, **env):
    return json.loads(hub.run(FACTS + code + "\nprint(json.dumps(out))", **env).splitlines()[-1])


def ranges(hub):
    """Requests for parts of weights that were answered with parts."""
    return [r for r in hub.requests if r.status == 206 and (r.file or "").endswith(".safetensors")]


def test_ranges_come_through_a_proxy_from_xet_storage_under_an_old_name(hub, proxy, make_checkpoint):
    """All of it is huggingface_hub's business: its session, its headers, its metadata."""
    folder = make_checkpoint()
    hub.commit("user/new", folder)
    hub.repos["user/new"].xet = True
    hub.rename("user/new", "user/newest")
    hub.renamed["user/model"] = "user/newest"
    no_detour = {"NO_PROXY": None, "HF_HUB_DISABLE_XET": None}
    out = run(
        hub,
        "out = facts(load(expert_subset=FIRST))",
        HTTP_PROXY=proxy,
        **no_detour,
    )
    assert out == local(folder, [[0, 3, 11]] * 3)
    assert len(ranges(hub)) > 2 and all(request.server == "cdn" for request in ranges(hub))
    assert all(request.headers.get("via") == "1.1 the-proxy" for request in hub.requests)
    assert any(request.status == 307 for request in hub.requests)
    assert not any("xet-read-token" in request.path for request in hub.requests)
    assert not any("authorization" in request.headers for request in ranges(hub))


def test_what_is_loaded_later_is_of_the_commit_that_was_loaded(hub, make_checkpoint):
    """The branch moves between `from_pretrained` and `swap_experts`, for a subset and for the whole model."""
    old, new = make_checkpoint(0), make_checkpoint(1)
    hub.commit("user/model", old)
    (hub.root / "work" / "go").mkdir()

    def move(process):
        while process.poll() is None:
            if any(request.path == "/mark/loaded" for request in list(hub.requests)):
                hub.commit("user/model", new)
                (hub.root / "work" / "go" / "on").touch()
                return
            time.sleep(0.01)

    output = hub.run(
        FACTS
        + """
import os, time
subset, whole = load(expert_subset=FIRST), load()
mark("loaded")
while not os.path.exists("go/on"):
    time.sleep(0.01)
from transformers import AutoConfig
AutoConfig.from_pretrained("user/model")  # the cache knows the new commit
subset.swap_experts(SECOND, progress=False)
out["subset"] = facts(subset)
whole.swap_experts(FIRST, progress=False)
whole.swap_experts(SECOND, progress=False)
out["whole"] = facts(whole)
out["again"] = facts(load(expert_subset=SECOND))
subset.swap_experts(FIRST, source="user/model", progress=False)
out["mixed"] = facts(subset)
subset.save_pretrained("saved")
out["saved"] = "commit" in open("saved/config.json").read()
print(json.dumps(out))
""",
        meanwhile=move,
    )
    out = json.loads(output.splitlines()[-1])
    second = [[0, 4, 11]] * 3
    assert out["subset"] == out["whole"] == local(old, second)
    assert out["again"] == local(new, second) != local(old, second)
    # A source that is named is read as it is now.
    name = "model.layers.0.mlp.experts.down_proj"
    assert out["mixed"][name] not in (local(old, [[0, 3, 11]] * 3)[name], out["subset"][name])
    assert not out["saved"]


@pytest.mark.parametrize("loader", ["AutoModelForCausalLM", "EmoForCausalLM"])
def test_a_branch_that_moves_while_a_subset_is_loaded_gives_one_commit(loader, hub, make_checkpoint):
    old, new = make_checkpoint(0), make_checkpoint(1)
    hub.commit("user/model", old)
    (hub.root / "work" / "go").mkdir()

    def move(process):
        while process.poll() is None:
            if any(request.path == "/mark/config" for request in list(hub.requests)):
                hub.commit("user/model", new)
                (hub.root / "work" / "go" / "on").touch()
                return
            time.sleep(0.01)

    code = f"""
import os, time
from transformers_emo import EmoConfig, EmoForCausalLM
from transformers_emo.subsets.loading import model_source
resolve = model_source.library_of

def then_it_moves(*args, **kwargs):
    mark("config")
    while not os.path.exists("go/on"):
        time.sleep(0.01)
    return resolve(*args, **kwargs)

model_source.library_of = then_it_moves  # once the config is there
model = {loader}.from_pretrained("user/model", expert_subset=FIRST)
out["facts"] = facts(model)
print(json.dumps(out))
"""
    out = json.loads(hub.run(FACTS + code, meanwhile=move).splitlines()[-1])
    assert out["facts"] == local(old, [[0, 3, 11]] * 3) != local(new, [[0, 3, 11]] * 3)


def test_force_download_fetches_a_file_that_the_cache_has_as_a_whole(hub, make_checkpoint):
    folder = make_checkpoint()
    hub.commit("user/model", folder)
    out = run(
        hub,
        """
from pathlib import Path
from huggingface_hub import hf_hub_download
cached = Path(hf_hub_download("user/model", "model.safetensors")).resolve()
cached.write_bytes(cached.read_bytes()[:-4] + b"bad!")
mark("damaged")
out["damaged"] = facts(load(expert_subset=FIRST))
mark("forced")
out["forced"] = facts(load(expert_subset=FIRST, force_download=True))
""",
    )
    expected = local(folder, [[0, 3, 11]] * 3)
    assert out["forced"] == expected != out["damaged"]
    marks = [number for number, request in enumerate(hub.requests) if request.path.startswith("/mark/")]
    weights = [number for number, r in enumerate(hub.requests) if (r.file or "").endswith(".safetensors")]
    assert not any(marks[0] < number < marks[1] for number in weights)
    assert any(number > marks[1] for number in weights)


def test_what_is_in_the_cache_loads_while_the_hub_is_out_of_reach(hub, make_checkpoint):
    """As all of a repository does: nobody has said that there is no network."""
    folder = make_checkpoint(shards=True)
    hub.commit("user/model", folder)
    code = "out = facts(load(expert_subset=FIRST))"
    first = run(hub, code)
    assert run(hub, code, HF_ENDPOINT="http://127.0.0.1:9") == first == local(folder, [[0, 3, 11]] * 3)


def test_parts_of_a_file_that_changed_under_its_commit_are_never_mixed(hub, make_checkpoint):
    """No Hub does so; a mirror may. The two files are of one size and have one header."""
    old, new = make_checkpoint(0), make_checkpoint(1)
    hub.commit("user/model", old)
    (hub.root / "work" / "go").mkdir()

    def replace(process):
        while process.poll() is None:
            if any(request.path == "/mark/loaded" for request in list(hub.requests)):
                hub.commit("user/other", new)
                files, others = (repo.commits[repo.branches["main"]].files for repo in hub.repos.values())
                files["model.safetensors"] = others["model.safetensors"]
                (hub.root / "work" / "go" / "on").touch()
                return
            time.sleep(0.01)

    code = """
import os, time
from transformers_emo import cli
out["first"] = facts(load(expert_subset=FIRST))
mark("loaded")
while not os.path.exists("go/on"):
    time.sleep(0.01)
try:
    out["mixed"] = facts(load(expert_subset=SECOND))
except OSError as error:
    out["error"] = str(error)
out["kept"] = facts(load(expert_subset=FIRST))
cli.main(["cache", "clear", "user/model"])
out["second"] = facts(load(expert_subset=SECOND))
print(json.dumps(out))
"""
    out = json.loads(hub.run(FACTS + code, meanwhile=replace).splitlines()[-1])
    assert out["first"] == out["kept"] == local(old, [[0, 3, 11]] * 3)
    assert "has another model.safetensors than the one" in out["error"] and "mixed" not in out
    assert "emo cache clear user/model" in out["error"]
    assert out["second"] == local(new, [[0, 4, 11]] * 3)
