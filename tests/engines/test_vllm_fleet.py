"""A fleet of vLLM servers under Ray Serve, on this machine: one server of the full model, one of a popular
subset."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TOY
from engines import load_test
from engines.engine_models import TINY, TOKENS, greedy

pytestmark = pytest.mark.engines
EXAMPLE = TOY.parents[1] / "examples" / "serving"
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def fleet(engine_environment, tmp_path_factory):
    """The fleet's address and its messages."""
    home = tmp_path_factory.mktemp("fleet")
    port = free_port()
    environment = engine_environment | {
        "HOME": str(home),  # Ray keeps the token of the cluster there
        "RAY_AUTH_MODE": "token",
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    subprocess.run(
        [BIN / "ray", "get-auth-token", "--generate"], env=environment, check=True, capture_output=True
    )
    cluster = ["start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=4"]
    cluster += ["--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=100000000"]
    words = [
        "run",
        "--working-dir",
        EXAMPLE,
        "--app-dir",
        EXAMPLE,
        "fleet:build",
        f"model={TINY}",
        "subsets=coq",
    ]
    words += ["replicas=1-2", "cpus=0.5", "options=--dtype float32 --enforce-eager"]
    log = home / "log.txt"
    processes = []

    def start(*command) -> None:
        output = log.open("a")
        processes.append(
            subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        )

    try:
        start(BIN / "ray", *cluster)
        time.sleep(10)
        start(BIN / "serve", *words)
        address = None
        for _ in range(600):
            found = re.search(r"is ready at (http://127\.0\.0\.1:\d+)", log.read_text(errors="replace"))
            assert all(process.poll() is None for process in processes), log.read_text()[-5000:]
            if found:
                address = found.group(1)
                break
            time.sleep(1)
        assert address is not None, log.read_text()[-5000:]
        yield address, log
    finally:
        for process in reversed(processes):
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def test_each_request_goes_where_its_experts_are_and_gets_our_answer(fleet, tiny, prompts):
    address, log = fleet
    said = [None, {"expert_subset": "coq"}, {"expert_subset": "python"}, {"document_pool": 16}]
    said += [{"expert_subset": "coq", "document_pool": 8}, {"exclude_experts": "python"}]
    for words, ids in zip(said, prompts + prompts, strict=False):
        body = {"model": "emo", "prompt": ids, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        status, answer = load_test.ask(address, body | {"return_token_ids": True, "vllm_xargs": words})
        assert status == 200, answer
        assert load_test.text_ids(answer) == greedy(tiny, ids, **(words or {}))
    # The servers of the subset have read no other experts.
    read = [tuple(map(int, found)) for found in re.findall(r"read (\d+) of (\d+) bytes", log.read_text())]
    assert len(read) == 2
    assert min(read)[0] < 0.4 * max(read)[0]


def test_none_is_wrong_and_none_lost_under_load(fleet):
    address, _ = fleet
    choices = [{"expert_subset": name} for name in ("coq", "python", "c", "sql")]
    result = load_test.load(address, load_test.bodies("emo", 32, choices, 24))
    assert {key: result[key] for key in ("asked", "lost", "wrong")} == {"asked": 32, "lost": 0, "wrong": 0}


def test_what_a_server_refuses_comes_back(fleet):
    address, _ = fleet
    status, answer = load_test.ask(
        address, {"model": "emo", "prompt": "x", "vllm_xargs": {"expert_subset": "no"}}
    )
    assert (status, "There is no expert subset 'no'" in str(answer)) == (400, True)
    assert load_test.ask(address, {"model": "other", "prompt": "x"})[0] == 404
