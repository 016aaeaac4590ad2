"""A subset is loaded from the Hub: the server counts bytes, the real client runs in its own process."""

import hashlib
import json
import random
import signal
import time
from pathlib import Path

import pytest
from conftest import tiny_model
from hub_server import HubServer
from transformers_emo import EmoConfig, EmoForCausalLM, select_experts
from transformers_emo.checkpoints import Checkpoint, wanted_ranges
from transformers_emo.conversion import shard_experts
from transformers_emo.subsets.loading.wanted_tensors import lazy_parameters

LAYERS, EXPERTS = 11, 128
FIRST = [[(7 * layer + 8 * i) % 127 for i in range(15)] + [127] for layer in range(LAYERS)]
# Half of it is that of the first.
SECOND = [ids[:8] + [(e + 1) % 127 for e in ids[8:15]] + [127] for ids in FIRST]
# Of the experts of the second that are not in the first: three float32 matrices of 16 by 128 each.
NEW_BYTES = sum(len(set(b) - set(a)) for a, b in zip(FIRST, SECOND, strict=True)) * 3 * 16 * 128 * 4

LOAD = """
import hashlib, json, sys
from transformers import AutoModelForCausalLM
import transformers_emo

def facts(model):
    tensors = {n: hashlib.sha256(t.numpy().tobytes()).hexdigest() for n, t in model.state_dict().items()}
    return {"tensors": tensors, "name": model.name_or_path, "eos": model.generation_config.eos_token_id,
            "kept": model.config.retained_experts}

def load(repo, subset, **kwargs):
    return facts(AutoModelForCausalLM.from_pretrained(repo, expert_subset=subset, **kwargs))

def mark(name):
    # Note in the server's list of requests how far we are.
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session
    get_session().get(constants.ENDPOINT + "/mark/" + name)
"""
SUBSET = "\nprint(json.dumps(load({repo!r}, {subset})))\n"
SEVERAL = """
out = {}
out["first"] = load(REPO, FIRST)
mark("again")
out["again"] = load(REPO, FIRST)
mark("offline")
out["offline"] = load(REPO, FIRST, local_files_only=True)
try:
    load(REPO, SECOND, local_files_only=True)
except OSError as error:
    out["error"] = str(error)
mark("second")
out["second"] = load(REPO, SECOND)
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A small model with as many experts as the released one, cut by layer into 11 files as that is."""
    folder = tmp_path_factory.mktemp("released")
    model = tiny_model(
        hidden_size=16,  # narrow, so that the router's rows weigh little beside the experts, as they do there
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_experts=EXPERTS,
        num_experts_per_tok=8,
        vocab_size=512,
    )
    model.save_pretrained(folder, max_shard_size="3.3MB")
    assert len(list(folder.glob("*.safetensors"))) == 11
    return folder


@pytest.fixture
def hub(released):
    with HubServer() as server:
        server.commit("user/released", released)
        yield server


def load(hub, repo, subset, **env):
    return json.loads(hub.run(LOAD + SUBSET.format(repo=repo, subset=subset), **env).splitlines()[-1])


def local(folder, subset):
    """What the same subset of the folder itself holds."""
    tensors = EmoForCausalLM.from_pretrained(folder, expert_subset=subset).state_dict()
    return {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in tensors.items()}


def needed_bytes(folder, subset, headers=None):
    """Bytes of the kept tensors, and of the headers of all files."""
    config, checkpoint = EmoConfig.from_pretrained(folder), Checkpoint.from_folder(folder)
    kept = [sorted(ids) for ids in subset]
    ranges = wanted_ranges(lazy_parameters(checkpoint, config, kept).values())
    tensors = sum(end - start for parts in ranges.values() for start, end in parts)
    if headers is None:
        files = list(folder.glob("*.safetensors"))
        headers = sum(8 + int.from_bytes(path.open("rb").read(8), "little") for path in files)
    return tensors + headers


def weight_bytes(hub, repo, requests=None):
    """Bytes of weights sent."""
    return sum(
        request.body_bytes
        for request in (hub.requests if requests is None else requests)
        if (request.file or "").startswith(f"{repo}/") and request.file.endswith(".safetensors")
    )


def load_several(hub, repo):
    """What `SEVERAL` prints, and the requests of each of its steps."""
    settings = f"REPO, FIRST, SECOND = {repo!r}, {FIRST}, {SECOND}\n"
    out = json.loads(hub.run(LOAD + settings + SEVERAL).splitlines()[-1])
    return out, steps_of(hub)


def steps_of(hub):
    """The requests after each `mark`."""
    steps, step = {}, "first"
    for request in hub.requests:
        if request.path.startswith("/mark/"):
            step = request.path.removeprefix("/mark/")
        else:
            steps.setdefault(step, []).append(request)
    return steps


def check_several(out, steps, folder, repo):
    """Every load is right; each fetches only what is new, and offline nothing."""
    assert out["first"]["tensors"] == local(folder, FIRST)
    assert out["first"]["name"] == repo and out["first"]["eos"] == 1
    assert out["first"]["kept"] == [sorted(ids) for ids in FIRST]
    assert out["again"] == out["offline"] == out["first"]
    assert out["second"]["tensors"] == local(folder, SECOND)
    assert weight_bytes(None, repo, steps["again"]) == 0
    assert "offline" not in steps
    assert NEW_BYTES <= weight_bytes(None, repo, steps["second"]) <= 1.05 * NEW_BYTES


def test_only_the_bytes_of_the_subset_come(hub, released):
    out, steps = load_several(hub, "user/released")
    check_several(out, steps, released, "user/released")
    assert "bytes of user/released are not in the cache" in out["error"]
    needed = needed_bytes(released, FIRST)
    assert needed * 0.99 < weight_bytes(hub, "user/released", steps["first"]) <= 1.03 * needed
    assert any("range" in request.headers for request in steps["first"])


def test_only_the_expert_shards_of_the_subset_come(hub, released, tmp_path):
    shard_experts(released, tmp_path / "shards", progress=False)
    hub.commit("user/shards", tmp_path / "shards")
    out, steps = load_several(hub, "user/shards")
    check_several(out, steps, released, "user/shards")
    assert "files of user/shards are not in the cache" in out["error"]
    files = {request.file for request in steps["first"] if (request.file or "").endswith(".safetensors")}
    headers = sum(
        8 + int.from_bytes((tmp_path / "shards" / Path(file).name).open("rb").read(8), "little")
        for file in files
    )
    needed = needed_bytes(released, FIRST, headers)
    assert needed * 0.99 < weight_bytes(hub, "user/shards", steps["first"]) <= 1.03 * needed
    assert not any("range" in request.headers for request in hub.requests)
    assert not list(hub.root.rglob("emo-ranges"))


def test_a_private_repository_a_revision_and_a_subfolder(hub, released, make_checkpoint):
    inner = make_checkpoint(shards=True)
    files = {f"inner/{path.name}": path for path in inner.iterdir()}
    first = hub.commit("user/private", files | {"config.json": inner / "config.json"}, private=True)
    hub.commit("user/private", {"inner/model.safetensors.index.json": b"{}"})
    kept = [[0, 5, 11]] * 3
    code = (
        LOAD
        + f"""
where = dict(expert_subset={kept}, revision={first!r}, subfolder="inner")
try:
    AutoModelForCausalLM.from_pretrained("user/private", **where)
except OSError as error:
    print("token" in str(error))
model = AutoModelForCausalLM.from_pretrained("user/private", **where, token={hub.token!r})
print(json.dumps(facts(model)))
"""
    )
    refused, facts = hub.run(code, HF_TOKEN=None).splitlines()
    assert refused == "True"
    facts = json.loads(facts)
    assert facts["tensors"] == local(inner, kept)
    for request in hub.requests:
        assert request.server == "hub" or "authorization" not in request.headers


def test_a_server_that_ignores_ranges_sends_whole_files_with_a_warning(hub, released):
    hub.inject("/cdn/*", ignore_range=True, times=None)
    code = LOAD + SUBSET.format(repo="user/released", subset=FIRST)
    code = "import sys; sys.stderr = sys.stdout\n" + code
    *log, facts = hub.run(code).splitlines()
    assert json.loads(facts)["tensors"] == local(released, FIRST)
    assert sum("Downloading whole files instead" in line for line in log) >= 1


def test_connections_that_break_are_taken_up_where_they_broke(hub, released):
    hub.inject("/cdn/*", cut_after=5_000, nth=12, times=40)
    hub.inject("/cdn/*", status=403, nth=80)  # the signed address has expired
    hub.inject("/cdn/*", status=503, nth=90)
    assert load(hub, "user/released", FIRST)["tensors"] == local(released, FIRST)
    assert weight_bytes(hub, "user/released") <= 1.1 * needed_bytes(released, FIRST)


@pytest.mark.parametrize(
    ("repo", "seed"),
    [("user/released", 0), ("user/shards", 0), pytest.param("user/released", 1, marks=pytest.mark.slow)],
)
def test_killed_at_a_random_point_and_run_again_it_goes_on(repo, seed, hub, released, tmp_path):
    if repo == "user/shards":
        shard_experts(released, tmp_path / "shards", progress=False)
        hub.commit(repo, tmp_path / "shards")
    needed = needed_bytes(released, FIRST)
    hub.inject("/cdn/*", delay=0.01, times=None)
    after = random.Random(seed).uniform(0.2, 0.8) * needed
    killed = False

    def kill(process):
        nonlocal killed
        while process.poll() is None:
            if weight_bytes(hub, repo) > after:
                process.send_signal(signal.SIGKILL)
                killed = True
                return
            time.sleep(0.005)

    code = LOAD + SUBSET.format(repo=repo, subset=FIRST)
    with pytest.raises(RuntimeError, match="-9"):
        hub.run(code, meanwhile=kill)
    assert killed
    hub.faults.clear()
    before = weight_bytes(hub, repo)
    assert json.loads(hub.run(code).splitlines()[-1])["tensors"] == local(released, FIRST)
    assert before < weight_bytes(hub, repo) <= 1.1 * needed


def test_a_named_subset_is_extracted_swapped_and_written_back_and_the_cache_is_cleared(hub, released):
    output = hub.run(
        LOAD
        + f"""
from transformers_emo import ExpertSubset, SubsetError, extract_subset, write_back
from transformers_emo.cli import main
ExpertSubset({FIRST}).push_to_hub("user/released", "math")
model = AutoModelForCausalLM.from_pretrained("user/released", expert_subset="math")
print(json.dumps(facts(model)))
mark("named")
for _ in range(2):
    with model.use_experts("math"):
        pass
extract_subset("user/released", "math", "extracted", progress=False, local_files_only=True)
mark("pushed")
model.push_to_hub("user/emo-math")
try:
    extract_subset("user/released", "maths", "none", progress=False)
except SubsetError as error:
    print(error)
main(["cache"])
main(["cache", "clear", "user/other"])
main(["cache", "clear"])
main(["cache", "list"])
mark("extracted")
extract_subset("user/released", "math", "again", progress=False)
mark("swapped")
model.swap_experts({SECOND}, progress=False)
print(json.dumps(facts(model)))
mark("written-back")
write_back("user/released", model, out="full", progress=False)
"""
    )
    facts, unknown, *listed, swapped = output.splitlines()
    assert json.loads(facts)["tensors"] == local(released, FIRST)
    assert unknown.startswith("There is no expert subset 'maths'") and "user/released at " in unknown
    steps, work = steps_of(hub), hub.root / "work"
    assert "named" not in steps  # all of it was in the cache
    for name in ("extracted", "again"):
        assert local(work / name, None) == local(released, FIRST)
    assert any("range" in request.headers for request in steps["extracted"])
    assert json.loads(swapped)["tensors"] == local(released, SECOND)
    assert NEW_BYTES <= weight_bytes(None, "user/released", steps["swapped"]) <= 1.05 * NEW_BYTES
    for path in released.glob("*.safetensors"):
        assert (work / "full" / path.name).read_bytes() == path.read_bytes()
    needed = needed_bytes(released, FIRST) / 1e6
    assert len(listed) == 11 + 4 and listed[0].startswith("user/released  model-00001-of-00011.safetensors  ")
    total, kept, cleared, empty = (line.split() for line in listed[11:])
    assert needed < float(total[0]) < 1.03 * needed + 0.1
    assert kept[1] == "0.0" and cleared[1] == total[0] and empty[0] == "0.0"
    card = hub.repos["user/emo-math"]
    readme = hub.blob(card.commits[card.branches["main"]].files["README.md"].sha256).read_text()
    assert "base_model: user/released" in readme and "- expert-subset" in readme
    assert "16 of the 128 experts" in readme and 'from_pretrained("user/emo-math")' in readme


def test_experts_are_chosen_from_the_hub_without_reading_the_others(hub, released):
    code = """
from transformers_emo import select_experts
subset = select_experts("user/released", input_ids=[[5, 6, 7, 8]], num_experts=16, progress=False)
print(subset.experts)
"""
    chosen = json.loads(hub.run(code).splitlines()[-1])
    assert (
        chosen
        == select_experts(str(released), input_ids=[[5, 6, 7, 8]], num_experts=16, progress=False).experts
    )
    assert weight_bytes(hub, "user/released") <= 1.05 * needed_bytes(released, chosen)
