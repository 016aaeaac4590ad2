"""A subset is loaded from the Hub: bytes are counted at the server, with the real client in its own process."""

import hashlib
import json
import random
import signal
import time

import pytest
from conftest import tiny_model
from hub_server import HubServer
from transformers_emo import EmoConfig, EmoForCausalLM
from transformers_emo.subsets import Checkpoint, wanted_ranges
from transformers_emo.subsets.loading import lazy_parameters

LAYERS, EXPERTS = 11, 128
FIRST = [[(7 * layer + 8 * i) % 127 for i in range(15)] + [127] for layer in range(LAYERS)]
# Half of it is that of the first.
SECOND = [ids[:8] + [(e + 1) % 127 for e in ids[8:15]] + [127] for ids in FIRST]

LOAD = """
import hashlib, json, sys
from transformers import AutoModelForCausalLM
import transformers_emo

def facts(model):
    tensors = {n: hashlib.sha256(t.numpy().tobytes()).hexdigest() for n, t in model.state_dict().items()}
    return {"tensors": tensors, "name": model.name_or_path, "dtype": str(model.dtype),
            "eos": model.generation_config.eos_token_id, "kept": model.config.retained_experts}
"""
SUBSET = (
    "\nprint(json.dumps(facts(AutoModelForCausalLM.from_pretrained({repo!r}, expert_subset={subset}))))\n"
)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A small model with as many experts as the released one, cut by layer into 11 files as that is."""
    folder = tmp_path_factory.mktemp("released")
    model = tiny_model(
        hidden_size=32,
        intermediate_size=64,
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


def needed_bytes(folder, subset, but=None):
    """Bytes of the kept tensors, and of the headers of all files."""
    config, checkpoint = EmoConfig.from_pretrained(folder), Checkpoint.from_folder(folder)
    kept = [sorted(ids) for ids in subset]
    parts = wanted_ranges(lazy_parameters(checkpoint, config, kept).values())
    tensors = {(file, start, end) for file, ranges in parts.items() for start, end in ranges}
    headers = sum(
        8 + int.from_bytes(path.open("rb").read(8), "little") for path in folder.glob("*.safetensors")
    )
    return sum(end - start for _, start, end in tensors) + headers


def weight_bytes(hub, repo):
    """Bytes of weights sent since the last `forget`."""
    return sum(
        request.body_bytes
        for request in hub.requests
        if (request.file or "").startswith(f"{repo}/") and request.file.endswith(".safetensors")
    )


def test_only_the_bytes_of_the_subset_come(hub, released):
    facts = load(hub, "user/released", FIRST)
    assert facts["tensors"] == local(released, FIRST)
    assert facts["name"] == "user/released" and facts["eos"] == 1
    assert facts["kept"] == [sorted(ids) for ids in FIRST]
    needed = needed_bytes(released, FIRST)
    assert needed * 0.99 < weight_bytes(hub, "user/released") <= 1.03 * needed

    # The same again: from the cache alone, online and offline.
    for env in ({}, {"HF_HUB_OFFLINE": "1"}):
        hub.forget()
        assert load(hub, "user/released", FIRST, **env) == facts
        assert weight_bytes(hub, "user/released") == 0
        assert not env or hub.requests == []

    # Offline, what is not there is an error that says so.
    with pytest.raises(RuntimeError, match=r"bytes of user/released are not in the cache"):
        load(hub, "user/released", SECOND, HF_HUB_OFFLINE="1")

    # Of another subset only what is new comes.
    hub.forget()
    assert load(hub, "user/released", SECOND)["tensors"] == local(released, SECOND)
    new = [sorted(set(second) - set(first)) for first, second in zip(FIRST, SECOND, strict=True)]
    per_expert = 3 * 32 * 64 * 4
    expected = sum(map(len, new)) * per_expert
    assert expected <= weight_bytes(hub, "user/released") <= 1.05 * expected


def test_a_private_repository_a_revision_and_a_subfolder(hub, released, make_checkpoint):
    inner = make_checkpoint(shards=True)
    files = {f"inner/{path.name}": path for path in inner.iterdir()}
    first = hub.commit("user/private", files | {"config.json": inner / "config.json"}, private=True)
    hub.commit("user/private", {"inner/model.safetensors.index.json": b"{}"})
    kept = [[0, 5, 11]] * 3
    code = (
        LOAD
        + f"""
model = AutoModelForCausalLM.from_pretrained(
    "user/private", expert_subset={kept}, revision={first!r}, subfolder="inner", token=TOKEN
)
print(json.dumps(facts(model)))
"""
    )
    facts = json.loads(hub.run(f"TOKEN = {hub.token!r}" + code, HF_TOKEN=None).splitlines()[-1])
    assert facts["tensors"] == local(inner, kept)
    for request in hub.requests:
        assert request.server == "hub" or "authorization" not in request.headers
    with pytest.raises(RuntimeError, match="token"):
        hub.run("TOKEN = None" + code, HF_TOKEN=None, HF_HOME=str(hub.root / "stranger"))


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


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_a_random_point_and_run_again_it_goes_on(hub, released, seed):
    needed = needed_bytes(released, FIRST)
    hub.inject("/cdn/*", delay=0.01, times=None)
    after = random.Random(seed).uniform(0.2, 0.8) * needed
    killed = False

    def kill(process):
        nonlocal killed
        while process.poll() is None:
            if weight_bytes(hub, "user/released") > after:
                process.send_signal(signal.SIGKILL)
                killed = True
                return
            time.sleep(0.005)

    code = LOAD + SUBSET.format(repo="user/released", subset=FIRST)
    with pytest.raises(RuntimeError, match="-9"):
        hub.run(code, meanwhile=kill)
    assert killed
    hub.faults.clear()
    before = weight_bytes(hub, "user/released")
    assert json.loads(hub.run(code).splitlines()[-1])["tensors"] == local(released, FIRST)
    assert before < weight_bytes(hub, "user/released") <= 1.1 * needed


def test_a_subset_is_found_by_its_name_in_the_repository(hub, released):
    hub.run(
        "from transformers_emo import ExpertSubset\n"
        f"ExpertSubset({FIRST}).push_to_hub('user/released', 'math')"
    )
    facts = json.loads(hub.run(LOAD + SUBSET.format(repo="user/released", subset="'math'")).splitlines()[-1])
    assert facts["tensors"] == local(released, FIRST)
