"""A server that makes us wait: for how long, and what the error says."""

import pytest
from hub_server import HubServer

LOAD = """
import time
from transformers import AutoModelForCausalLM
import transformers_emo
from transformers_emo.checkpoints.hub import ranges
ranges._WINDOW, ranges._LEAST, ranges._RETRIES = 0.5, 1 << 20, 1
try:
    AutoModelForCausalLM.from_pretrained("user/model", expert_subset=[[0, 3, 11]] * 3)
except OSError as error:
    print(error)
else:
    print("loaded")
"""


@pytest.fixture
def hub(make_checkpoint):
    with HubServer() as server:
        server.commit("user/model", make_checkpoint())
        yield server


@pytest.mark.parametrize("path", ["/cdn/*.safetensors", "/user/model/resolve/*/model.safetensors"])
@pytest.mark.parametrize("header", [{"Retry-After": "86400"}, {"ratelimit": '"api";r=0;t=86400'}], ids=str)
def test_a_wait_of_a_day_is_refused(path, header, hub):
    hub.inject(path, status=429, headers=header, times=None)
    said = hub.run(LOAD, timeout=60)
    assert "asks to wait 86400 seconds for model.safetensors, more than 60, the limit" in said


@pytest.mark.parametrize("path", ["/cdn/*.safetensors", "/user/model/resolve/*/model.safetensors"])
def test_a_short_wait_is_waited(path, hub):
    fault = hub.inject(path, status=429, headers={"Retry-After": "0"}, times=1)
    assert hub.run(LOAD, timeout=60) == "loaded\n"
    assert fault.hits == 1


def test_a_server_that_sends_next_to_nothing_is_given_up(hub):
    hub.inject("/cdn/*.safetensors", trickle=0.1, times=None)
    said = hub.run(LOAD, timeout=60)
    assert "its server sent" in said and "expected at least 1048576 in" in said
