"""EMO on many machines with Ray Serve and vLLM: a group of servers for each popular subset, and one for
everything else.

    serve run fleet:build model=allenai/Emo_1b14b_1T subsets=coq,python gpus=1

A request says which experts it wants, as to a single server: `"vllm_xargs": {"expert_subset": "coq"}`. The
router sends it to the group of that subset, whose servers have read no other experts. Requests for other
subsets, for document pools or without a choice go to the group with the full model. Each group grows and
shrinks with its load.

Needs `ray[serve]`, vLLM and `transformers-emo-vllm` on every machine.
"""

import asyncio
import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

NAME = "emo"  # what requests call the model
START_SECONDS = 1800  # a first start downloads the model
api = FastAPI()


@dataclass(frozen=True)
class Fleet:
    """What the fleet is made of; each field is an argument of `serve run`.

    Args:
        model (`str`): folder or Hub repository.
        subsets (`str`): the popular ones, by name, with commas.
        replicas (`str`): for each group the fewest and the most servers, such as `1-4`. `GROUP=1-8` for one
            of them, with commas: `1-4,full=2-8`.
        waiting (`int`): requests under way on a server, above which the group grows.
        gpus (`float`), cpus (`float`): of a server.
        options (`str`): further options of `vllm serve`.
    """

    model: str
    subsets: str = ""
    replicas: str = "1-4"
    waiting: int = 16
    gpus: float = 0
    cpus: float = 1
    options: str = ""

    def groups(self) -> list[str | None]:
        """The subset of each group; `None` for that of the full model."""
        return [None, *filter(None, self.subsets.split(","))]

    def sizes(self, subset: str | None) -> tuple[int, int]:
        """The fewest and the most servers of a group."""
        said = dict(word.split("=") if "=" in word else ("", word) for word in self.replicas.split(","))
        least, _, most = said.get(subset or "full", said.get("", "1-4")).partition("-")
        return int(least), int(most or least)


def _end_with_parent() -> None:
    """On Linux, have a process end with the one that started it: no vLLM is left behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@serve.deployment
class Server:
    """One `vllm serve`, on this machine's loopback."""

    def __init__(self, fleet: Fleet, subset: str | None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        words = ["--host", "127.0.0.1", "--port", self.url.rsplit(":", 1)[1], "--served-model-name", NAME]
        if subset is None:  # requests bring their experts
            words += ["--no-enable-prefix-caching", "--no-enable-chunked-prefill"]
        else:
            words += ["--hf-overrides", json.dumps({"expert_subset": subset})]
        vllm = Path(sys.executable).with_name("vllm")
        path = {"PATH": f"{vllm.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
        command = [str(vllm), "serve", fleet.model, *words, *shlex.split(fleet.options)]
        self.process = subprocess.Popen(command, env=os.environ | path, preexec_fn=_end_with_parent)
        self.client = httpx.AsyncClient(base_url=self.url, timeout=None)
        self.started = asyncio.get_running_loop().create_task(self._start())

    async def _start(self) -> None:
        for _ in range(START_SECONDS):
            self._check_process()
            try:
                if (await self.client.get("/health")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(1)
        raise RuntimeError(f"vLLM did not start within {START_SECONDS} seconds.")

    def _check_process(self) -> None:
        if self.process.poll() is not None:
            raise RuntimeError(
                f"vLLM has ended with status {self.process.returncode}: see its messages above."
            )

    async def check_health(self) -> None:
        """Ray asks from time to time, and replaces a server that raises."""
        self._check_process()
        if self.started.done():
            self.started.result()

    async def answer(self, path: str, body: bytes) -> tuple[int, str, bytes]:
        """The status, the kind and the text of vLLM's answer."""
        await self.started
        answer = await self.client.post(path, content=body, headers={"Content-Type": "application/json"})
        return answer.status_code, answer.headers.get("content-type", "application/json"), answer.content

    async def stream(self, path: str, body: bytes) -> AsyncIterator[bytes]:
        """The same in parts; the first is the status."""
        await self.started
        headers = {"Content-Type": "application/json"}
        async with self.client.stream("POST", path, content=body, headers=headers) as answer:
            yield str(answer.status_code).encode()
            async for part in answer.aiter_raw():
                yield part

    def __del__(self):
        if process := getattr(self, "process", None):
            process.terminate()


@serve.deployment
@serve.ingress(api)
class Router:
    """Sends each request to the group that has its experts."""

    def __init__(self, full: DeploymentHandle, groups: dict[str, DeploymentHandle]):
        self.full, self.groups = full, groups

    @api.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """What can be asked for."""
        return {"object": "list", "data": [{"id": NAME, "object": "model", "subsets": list(self.groups)}]}

    @api.post("/v1/{path:path}")
    async def ask(self, path: str, request: Request) -> Response:
        """Any request of OpenAI's interface."""
        raw = await request.body()
        try:
            body = json.loads(raw)
            said = body.get("vllm_xargs") or {}
            subset = said.get("expert_subset")
        except (ValueError, AttributeError):  # vLLM says what is wrong with it
            body, said, subset = {}, {}, None
        server = self.full
        # A group's servers hold only their experts. What else a request may ask for, the full model can do.
        if isinstance(subset, str) and subset in self.groups and set(said) == {"expert_subset"}:
            server = self.groups[subset]
            del body["vllm_xargs"]
            raw = json.dumps(body).encode()
        if not body.get("stream"):
            status, kind, text = await server.answer.remote(f"/v1/{path}", raw)
            return Response(text, status, media_type=kind)
        parts = server.options(stream=True).stream.remote(f"/v1/{path}", raw)
        status = int(await anext(parts))
        return StreamingResponse(parts, status, media_type="text/event-stream")


def build(arguments: dict[str, str]) -> serve.Application:
    """The fleet, for `serve run fleet:build NAME=VALUE ...`; the names are those of `Fleet`."""
    kinds = {"waiting": int, "gpus": float, "cpus": float}
    fleet = Fleet(**{name: kinds.get(name, str)(value) for name, value in arguments.items()})
    groups = {}
    for subset in fleet.groups():
        least, most = fleet.sizes(subset)
        scaling = {
            "min_replicas": least,
            "max_replicas": most,
            "target_ongoing_requests": fleet.waiting,
        }
        groups[subset] = Server.options(
            name=subset or "full",
            autoscaling_config=scaling,
            max_ongoing_requests=4 * fleet.waiting,
            ray_actor_options={"num_cpus": fleet.cpus, "num_gpus": fleet.gpus},
        ).bind(fleet, subset)
    full = groups.pop(None)
    return Router.options(max_ongoing_requests=1024, ray_actor_options={"num_cpus": 0}).bind(full, groups)
