"""A server that makes us wait: for how long, and what the error says."""

import pytest
from hub_server import HubServer

LOAD = """
import time
from transformers import AutoModelForCausalLM
import transformers_emo
from transformers_emo.checkpoints import patience
from transformers_emo.checkpoints.hub import ranges
ranges._WINDOW, ranges._LEAST, ranges._RETRIES = 0.5, 1 << 20, 1
patience._WINDOW, patience._LEAST = 0.5, 1 << 20
try:
    AutoModelForCausalLM.from_pretrained("user/model", expert_subset=[[0, 3, 11]] * 3)
except OSError as error:
    print(error)
else:
    print("loaded")
"""
# `AutoModel` reads the config before the package is asked: with the patience of huggingface_hub.
LOAD_EMO = LOAD.replace("AutoModelForCausalLM", "EmoForCausalLM").replace(
    "from transformers import", "from transformers_emo import"
)


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


@pytest.mark.parametrize("header", [{"Retry-After": "86400"}, {"ratelimit": '"api";r=0;t=86400'}], ids=str)
def test_a_wait_of_a_day_for_a_small_file_is_refused(header, hub):
    hub.inject("/user/model/resolve/*/config.json", status=429, headers=header, times=None)
    said = hub.run(LOAD_EMO, timeout=60)
    assert "asks to wait 86400 seconds for config.json, more than 60, the limit" in said


def test_a_wait_of_a_day_for_an_optional_file_is_not_waited(hub):
    hub.inject(
        "/user/model/resolve/*/generation_config.json",
        status=429,
        headers={"Retry-After": "86400"},
        times=None,
    )
    assert hub.run(LOAD_EMO, timeout=60) == "loaded\n"  # with the default, as without such a file


def test_a_small_file_that_comes_byte_by_byte_is_given_up(hub):
    hub.inject("/user/model/resolve/*/config.json", trickle=0.2, times=None)
    said = hub.run(LOAD_EMO, timeout=60)
    assert "bytes of config.json in" in said and "expected at least" in said


def test_a_whole_file_is_downloaded_with_the_same_patience(hub):
    hub.inject("/cdn/*.safetensors", trickle=0.05, times=None)
    said = hub.run(LOAD_EMO.replace("[[0, 3, 11]] * 3", "[list(range(12))] * 3"), timeout=60)
    assert "server sent" in said and "expected at least" in said
