"""Forked processes are as fresh as those of `python -c`."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import fresh_processes
import pytest

CODE = """
import os, sys
before = set(sys.modules)
print(__name__, sys.argv, sys.path[0], os.getcwd(), os.environ.get("HF_HOME"), len(os.environ))
print("error", file=sys.stderr)
print([name for name in ("huggingface_hub", "transformers", "transformers_emo") if name in before])
from huggingface_hub import constants
print(constants.HF_HOME)
sys.exit(3)
"""


def test_they_say_what_a_new_interpreter_says(tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_HOME": str(tmp_path / "home"), "LC_ALL": "C.UTF-8"}
    done = fresh_processes.run(CODE, "a", "b", env=env, cwd=tmp_path)
    command = [sys.executable, "-c", CODE, "a", "b"]
    expected = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, expected.stdout, expected.stderr)
    assert str(tmp_path / "home") in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("", 0),
        ("raise SystemExit", 0),
        ("raise SystemExit('no')", 1),
        ("1 / 0", 1),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("import atexit; atexit.register(print, 'end')", 0),
        ("import threading as t; t.Thread(target=lambda: print('thread')).start()", 0),
    ],
)
def test_they_end_as_a_new_interpreter_does(code, status):
    expected = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    done = fresh_processes.run(code)
    assert done.returncode == expected.returncode == status and done.stdout == expected.stdout
    assert done.stderr.splitlines()[-1:] == expected.stderr.splitlines()[-1:]


def test_one_that_fails_is_an_error_where_that_is_asked_for():
    with pytest.raises(subprocess.CalledProcessError, match="exit status 1"):
        fresh_processes.run("1 / 0", check=True)


def test_they_can_be_stopped():
    process = fresh_processes.start("import time; print('on', flush=True); time.sleep(1000)")
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == -signal.SIGTERM
    with pytest.raises(subprocess.TimeoutExpired):
        fresh_processes.run("import time; time.sleep(1000)", timeout=0.5)


def test_several_run_at_once():
    with ThreadPoolExecutor(3) as threads:
        done = threads.map(fresh_processes.run, [f"print({number})" for number in range(6)])
        assert [one.stdout for one in done] == [f"{number}\n" for number in range(6)]
