"""Commands of `emo` in processes forked from one that has imported everything, so that a try costs no start.

Run as a script, this is the process that is forked. It computes nothing itself and has one thread.
"""

import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_DURABILITY = "emo-torture-durability.json"


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Args:
        status (`int`): its exit status; below 0 the signal that killed it.
        said (`str`): what it wrote to stdout.
        told (`str`): what it wrote to stderr.
        seconds (`float`): how long it ran.
    """

    status: int
    said: str
    told: str
    seconds: float

    @property
    def error(self) -> str | None:
        """What is wrong with how it failed: an error is told in one line, at the end, without a traceback."""
        lines = self.told.strip().splitlines()
        if "Traceback (most recent call last)" in self.told:
            return f"a traceback: {lines[-1][:150]}"
        if not lines or not lines[-1].startswith("emo "):
            return f"no line that says what is wrong (status {self.status}): {self.last}"
        return None

    @property
    def last(self) -> str:
        """The last line that it told, shortened."""
        lines = (self.told.strip() or self.said.strip()).splitlines()
        return lines[-1][:160] if lines else f"status {self.status}"


class Worker:
    """The process to fork from, with the environment that every command has.

    Args:
        environment (`dict[str, str]`): its variables.
        folder (`Path`): where commands write what they say.
    """

    def __init__(self, environment: dict[str, str], folder: Path):
        self.folder, self._began = folder, 0.0
        pipe = subprocess.PIPE
        self._notes = open(folder / "notes.txt", "w+")  # noqa: SIM115  what others warn of when they are imported
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=pipe,
            stdout=pipe,
            stderr=self._notes,
            env=environment,
            text=True,
        )
        self._read("ready")

    def _read(self, name: str) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._notes.seek(0)
            raise RuntimeError(f"The process that commands are forked from has ended: {self._notes.read()}")
        return json.loads(line)[name]

    def start(self, work: Path, **wanted: Any) -> int:
        """Start a command; `words` of `emo`, or Python `code`.

        Args:
            work (`Path`): its working directory.
            wanted: `words` (`list[str]`) or `code` (`str`). For a limit on the size of files `file_size`. To
                have the system fail `fails`: the number of a call that brings a file to the disk or renames
                it, from 1, and the number of the error.

        Returns:
            `int`: the number of its process, which leads a group of its own.
        """
        assert self._process.stdin is not None
        files = [os.fspath(self.folder / name) for name in ("said.txt", "told.txt")]
        wanted |= {"cwd": os.fspath(work), "files": files}
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        self._began = time.monotonic()
        return self._read("pid")

    def end(self) -> Ended:
        """Wait for the command that was started."""
        status = self._read("status")
        seconds = time.monotonic() - self._began
        texts = [(self.folder / name).read_text(errors="replace") for name in ("said.txt", "told.txt")]
        return Ended(status, *texts, seconds)

    def run(self, work: Path, **wanted: Any) -> Ended:
        """Run a command to its end; the arguments are those of `start`."""
        self.start(work, **wanted)
        return self.end()

    def must(self, work: Path, **wanted: Any) -> Ended:
        """Run a command that has to succeed.

        Raises:
            RuntimeError: if it does not, with what it said.
        """
        ended = self.run(work, **wanted)
        if ended.status:
            raise RuntimeError(f"{wanted} ended with {ended.status}: {ended.said}{ended.told}")
        return ended

    def not_durable(self, work: Path) -> list[str]:
        """What a power cut would have taken, after `run(..., durable=names)`."""
        return json.loads((work / _DURABILITY).read_text())["lost"]

    def calls_that_can_fail(self, work: Path) -> int:
        """How many files were brought to the disk or renamed, after `run(..., durable=names)`."""
        return json.loads((work / _DURABILITY).read_text())["calls"]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._notes.close()


def kill(pid: int) -> None:
    """Kill a command and what it has started, as `kill -9` does."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


class Durability:
    """Which files and folders have reached the disk: those that were synced after their last change.

    A folder has a name on the disk if it was synced when it had that name.

    Args:
        names (`list[str]`): what a command promises to have written when it ends.
        fails (`tuple[int, int]`, *optional*): which call to let fail, counted from 1, and its error.
    """

    def __init__(self, names: list[str], fails: tuple[int, int] | None = None):
        self.paths = [Path(name).absolute() for name in names]
        self.top = Path.cwd()
        self.synced: dict[tuple[int, int], int] = {}
        self.names: dict[tuple[int, int], set[tuple[str, int]]] = {}
        self.early: list[str] = []
        self.calls, self._fails = 0, fails
        for name in ("fsync", "fdatasync", "replace", "rename"):
            setattr(os, name, self._watched(getattr(os, name), name))
        sys.addaudithook(self._event)

    def _watched(self, function: Any, name: str) -> Any:
        def call(first: Any, *others: Any, **options: Any) -> None:
            self.calls += 1
            if self._fails is not None and self.calls == self._fails[0]:
                raise OSError(self._fails[1], os.strerror(self._fails[1]))
            function(first, *others, **options)
            if name in ("fsync", "fdatasync"):
                self._note(first if isinstance(first, int) else first.fileno())

        return call

    def _note(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        place = status.st_dev, status.st_ino
        self.synced[place] = status.st_mtime_ns
        if stat.S_ISDIR(status.st_mode):
            with os.scandir(descriptor) as entries:
                self.names[place] = {(entry.name, entry.inode()) for entry in entries}

    def _event(self, event: str, arguments: tuple) -> None:
        """A result gets its name only when its files are on the disk. Systems may reorder the two."""
        if event == "os.rename" and Path(os.fsdecode(arguments[1])).absolute() in self.paths:
            source = Path(os.fsdecode(arguments[0])).absolute()
            self.early += [f"{path.name} was renamed before it was synced" for path in self._lost(source)]

    def _lost(self, path: Path) -> list[Path]:
        found = [path, *path.rglob("*")] if path.is_dir() else [path]
        return [each for each in found if not self._is_synced(each)]

    def _is_synced(self, path: Path) -> bool:
        status = path.lstat()
        place = status.st_dev, status.st_ino
        if path.is_dir():
            inside = {(each.name, each.lstat().st_ino) for each in path.iterdir()}
            return inside <= self.names.get(place, set()) and place in self.synced
        return self.synced.get(place, -1) >= status.st_mtime_ns

    def _has_name(self, path: Path) -> bool:
        status = path.parent.stat()
        names = self.names.get((status.st_dev, status.st_ino), set())
        return (path.name, path.lstat().st_ino) in names

    def report(self) -> list[str]:
        """What is wrong, a line each."""
        lost = [f"{path.name} was not synced" for whole in self.paths for path in self._lost(whole)]
        for path in self.paths:
            while path != self.top:
                if not self._has_name(path):
                    lost.append(f"the name of {path.name} was not synced")
                path = path.parent
        return sorted({*self.early, *lost})


def _serve() -> None:
    import datasets
    import transformers
    import transformers_emo
    from transformers_emo import cli, training
    from transformers_emo.analysis import measure_retention
    from transformers_emo.conversion import (
        convert_olmo_core,
        convert_to_olmo_core,
        shard_experts,
        upgrade_checkpoint,
    )
    from transformers_emo.subsets import extract_subset, push_folder, select_experts, write_back

    del datasets, transformers, transformers_emo, training, measure_retention, convert_olmo_core
    del convert_to_olmo_core, shard_experts, upgrade_checkpoint, extract_subset, push_folder
    del select_experts, write_back
    _answer(ready=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        child = os.fork()
        if child == 0:
            _be(cli, **wanted)
        with suppress(PermissionError, ProcessLookupError):  # the child does so too: one of them is first
            os.setpgid(child, child)
        _answer(pid=child)
        _answer(status=os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _answer(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def _be(
    cli: Any,
    cwd: str,
    files: list[str],
    words: list[str] | None = None,
    code: str = "",
    file_size: int | None = None,
    durable: list[str] | None = None,
    fails: tuple[int, int] | None = None,
) -> None:
    """Be the command, and end."""
    with suppress(PermissionError):
        os.setpgid(0, 0)
    writers = []
    for number, file in enumerate(files, start=1):
        if file_size is None:
            target = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        else:  # the limit would hold for this file too
            writer, target = _writer(file)
            writers.append(writer)
        os.dup2(target, number)
        os.close(target)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    os.chdir(cwd)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    watch = Durability(durable or [], fails) if durable or fails else None
    try:
        if words is None:
            exec(compile(code, "<torture>", "exec"), {"__name__": "__main__"})
            status = 0
        else:
            status = cli.main(words)
        if watch is not None and durable:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            Path(cwd, _DURABILITY).write_text(json.dumps({"lost": watch.report(), "calls": watch.calls}))
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os.close(1)
    os.close(2)
    for writer in writers:
        os.waitpid(writer, 0)
    os._exit(status)


def _writer(file: str) -> tuple[int, int]:
    """A process that writes what comes through a pipe to a file, and the pipe's end to write to."""
    source, target = os.pipe()
    writer = os.fork()
    if writer == 0:
        os.close(target)
        with open(file, "wb") as stream:
            while data := os.read(source, 1 << 16):
                stream.write(data)
        os._exit(0)
    os.close(source)
    return writer, target


if __name__ == "__main__":
    _serve()
