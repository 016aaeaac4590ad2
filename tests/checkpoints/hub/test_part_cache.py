"""Several processes at one cache: none spoils what another keeps or has been told is there."""

import os
import subprocess
import sys
import threading

import pytest
from transformers_emo.checkpoints.hub import part_cache
from transformers_emo.checkpoints.hub.part_cache import (
    PartialFile,
    cached_parts,
    clear_parts,
    part_folder,
    write_about,
)

DATA = bytes(range(1, 61))


@pytest.fixture
def folder(tmp_path):
    folder = part_folder(tmp_path / "models--user--model", "0" * 64)
    write_about(folder, "model.safetensors", "c" * 40, 100)
    return folder


def test_opening_a_file_does_not_erase_bytes_written_meanwhile(folder, monkeypatch):
    fstat, others = os.fstat, []

    def overtaken(descriptor):
        found = fstat(descriptor)
        if not others:  # between seeing an empty file and acting upon it
            others.append(None)
            others[0] = PartialFile(folder, 100)
            others[0].write(20, DATA)
            others[0].record(20, 80)
        return found

    monkeypatch.setattr(part_cache.os, "fstat", overtaken)
    with PartialFile(folder, 100) as late:
        late.write(0, b"abc")
        late.record(0, 3)
    read = bytearray(60)
    others[0].read_into(20, memoryview(read))
    others[0].close()
    assert others[0].missing([(20, 80)]) == [] and read == DATA
    with PartialFile(folder, 100) as again:  # what is said to be there is
        for start, end in again.ranges:
            part = bytearray(end - start)
            again.read_into(start, memoryview(part))
            assert 0 not in part


def test_a_model_being_loaded_keeps_its_bytes_when_the_cache_is_cleared(folder, tmp_path):
    with PartialFile(folder, 100) as loading:
        loading.write(20, DATA)
        loading.record(20, 80)
        assert [part.present for part in cached_parts(tmp_path)] == [60]
        assert clear_parts(cache_dir=tmp_path) == 60
        assert cached_parts(tmp_path) == []
        loading.write(80, b"more")
        loading.record(80, 84)
        read = bytearray(60)
        loading.read_into(20, memoryview(read))
        assert read == DATA
        with PartialFile(folder, 100) as begun_anew:
            assert begun_anew.ranges == []


def test_the_cache_is_listed_and_cleared_while_parts_come_and_go(folder, tmp_path):
    errors, stop = [], threading.Event()

    def again_and_again(action):
        try:
            while not stop.wait(0.001):
                action()
        except Exception as error:
            errors.append(error)

    actions = [lambda: cached_parts(tmp_path), lambda: clear_parts(cache_dir=tmp_path)]
    threads = [threading.Thread(target=again_and_again, args=[action]) for action in actions * 2]
    for thread in threads:
        thread.start()
    try:
        for number in range(300):
            write_about(folder.with_name(f"{number % 3:064d}"), "model.safetensors", "c" * 40, 100)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []


# The user has no home: as in a container whose user is not in /etc/passwd.
WITHOUT_HOME = """
import os, pwd, sys
def unknown(number):
    raise KeyError(number)
pwd.getpwuid = unknown
from transformers_emo import EmoForCausalLM
from transformers_emo.checkpoints.hub.part_cache import cache_root, cached_parts, clear_parts
EmoForCausalLM.from_pretrained(sys.argv[1], expert_subset=[[0, 3, 11]] * 3)
before = cache_root()
assert before.is_absolute() and cached_parts() == [] and clear_parts() == 0
try:
    EmoForCausalLM.from_pretrained("user/model", expert_subset=[[0, 3, 11]] * 3)
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "environment",
    [{}, {"HF_HOME": "relative"}, {"XDG_CACHE_HOME": "relative"}, {"HF_HUB_CACHE": "relative"}],
    ids=str,
)
def test_without_a_home_and_with_relative_caches_nothing_dies(make_checkpoint, tmp_path, environment):
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "HF_HUB_CACHE")
    }
    environment = kept | {"HF_HUB_OFFLINE": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_HOME, make_checkpoint()],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "as a Hub repository it cannot be read" in done.stdout
