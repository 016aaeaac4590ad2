"""Fresh processes, quickly: forked from one that has imported PyTorch, which takes most of the time.

Neither Transformers nor the client of the Hub nor this package is imported before the fork: those read
environment variables when they are imported, and are what the tests look at. Tests of imports themselves
start Python anew.

Run as a script, this is the process that is forked.
"""

import atexit
import contextlib
import functools
import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from pathlib import Path

BEFORE_THE_FORK = (
    "torch",
    "torch._dynamo",
    "torch._inductor.decomposition",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torchao.quantization",
    "numpy",
    "yaml",
    "jinja2",
    "PIL.Image",
    "psutil",
    "safetensors.torch",
)
NEVER_BEFORE = ("accelerate", "datasets", "huggingface_hub", "transformers", "transformers_emo")
_NUMBER = struct.Struct("q")


class _Forked:
    """A process of the server; has of `subprocess.Popen` what tests need."""

    def __init__(self, code: str, arguments: tuple[str, ...], env: dict[str, str], cwd: str):
        self.returncode: int | None = None
        self._folder = tempfile.TemporaryDirectory()
        self._files = [str(Path(self._folder.name, name)) for name in ("output", "errors")]
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(_server())
        wanted = {"code": code, "arguments": arguments, "env": env, "cwd": cwd, "files": self._files}
        self._socket.sendall(json.dumps(wanted).encode() + b"\n")
        self.pid = self._number()

    def _number(self) -> int:
        return _NUMBER.unpack(self._socket.recv(_NUMBER.size, socket.MSG_WAITALL))[0]

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._socket], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("python -c", timeout or 0)
            self.returncode = self._number()
            self._socket.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        output, errors = (Path(file).read_text() for file in self._files)
        return output, errors


def start(code: str, *arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None):
    """Start a process that runs Python code.

    Args:
        code (`str`): as for `python -c`.
        arguments (`str`): what stands in `sys.argv[1:]`.
        env (`dict`, *optional*): its environment variables, if not those of this process.
        cwd (`Path`, *optional*): its working directory, if not that of this process.

    Returns: with `poll`, `wait`, `kill`, `send_signal`, `communicate`, `pid` and `returncode`, as of
    `subprocess.Popen`.
    """
    env, cwd = dict(os.environ if env is None else env), os.fspath(cwd or Path.cwd())
    if sys.platform == "linux":
        return _Forked(code, arguments, env, cwd)
    command, pipe = [sys.executable, "-c", code, *arguments], subprocess.PIPE
    return subprocess.Popen(command, env=env, cwd=cwd, stdout=pipe, stderr=pipe, text=True)


def run(code: str, *arguments: str, timeout: float = 300, check: bool = False, **settings):
    """Run Python code to its end; the same arguments as of `start`, and those of `subprocess.run`.

    Returns:
        `subprocess.CompletedProcess`: with `stdout` and `stderr` as text.

    Raises:
        subprocess.TimeoutExpired: if it runs for longer than `timeout` seconds. It is killed.
        subprocess.CalledProcessError: if it fails and `check` is true.
    """
    process = start(code, *arguments, **settings)
    try:
        output, errors = process.communicate(timeout)
    except BaseException:
        process.kill()
        raise
    done = subprocess.CompletedProcess(["python", "-c", code], process.returncode, output, errors)
    if check and done.returncode:
        raise subprocess.CalledProcessError(done.returncode, done.args, output, errors)
    return done


@functools.cache
def _server() -> str:
    """The address of the process to fork from, one for each process that runs tests. It ends with that."""
    path, pipe = os.path.join(tempfile.mkdtemp(), "socket"), subprocess.PIPE
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen([sys.executable, __file__, path], stdin=pipe, stdout=pipe, stderr=errors)
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            errors.seek(0)
            raise RuntimeError(f"No process to fork from: {errors.read().decode()}")
    atexit.register(process.communicate)
    return path


def _serve(path: str) -> None:
    # Programs that import the package do it themselves; others must not get it at this point.
    os.environ["EMO_AUTOLOAD"] = "0"
    for name in BEFORE_THE_FORK:
        with contextlib.suppress(ImportError):  # not all are required
            importlib.import_module(name)
    assert not set(NEVER_BEFORE) & sys.modules.keys(), set(NEVER_BEFORE) & sys.modules.keys()
    assert threading.active_count() == 1  # others would be missing in a fork
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # watchers leave nothing behind
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    print("ready", flush=True)
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _watch(connection)
        connection.close()
    os.remove(path)
    os.rmdir(os.path.dirname(path))


def _watch(connection: socket.socket) -> None:
    """Start what is asked for; say its number, and in the end its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    wanted = json.loads(connection.makefile().readline())
    child = os.fork()
    if child == 0:
        connection.close()
        _execute(**wanted)
    with contextlib.suppress(BrokenPipeError):  # nobody waits any more
        connection.sendall(_NUMBER.pack(child))
        connection.sendall(_NUMBER.pack(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
    os._exit(0)


def _execute(code: str, arguments: list[str], env: dict[str, str], cwd: str, files: list[str]) -> None:
    """Be `python -c code`."""
    for number, file in enumerate([os.devnull, *files]):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = ["-c", *arguments]
    sys.path[0] = ""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    status = 0
    try:
        exec(compile(code, "<string>", "exec"), main.__dict__)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve(sys.argv[1])
