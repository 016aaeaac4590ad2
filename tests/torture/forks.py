"""Commands of `emo` in processes forked from one that has imported everything, so that a try costs no start.

Run as a script, this is the process that is forked. It computes nothing itself and has one thread.
"""

import json
import os
import resource
import signal
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
        said (`str`): what it wrote to stdout and stderr.
        seconds (`float`): how long it ran.
    """

    status: int
    said: str
    seconds: float

    @property
    def error(self) -> str | None:
        """What is wrong with how it failed: an error is told in one line, at the end, without a traceback."""
        lines = self.said.strip().splitlines()
        if "Traceback (most recent call last)" in self.said:
            return f"a traceback: {lines[-1][:150]}"
        if not lines or not lines[-1].startswith("emo "):
            return "no line that says what is wrong"
        return None


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
            wanted: `words` (`list[str]`) or `code` (`str`), and for a limit on the size of files `file_size`.

        Returns:
            `int`: the number of its process, which leads a group of its own.
        """
        assert self._process.stdin is not None
        wanted |= {"cwd": os.fspath(work), "file": os.fspath(self.folder / "said.txt")}
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        self._began = time.monotonic()
        return self._read("pid")

    def end(self) -> Ended:
        """Wait for the command that was started."""
        status = self._read("status")
        seconds = time.monotonic() - self._began
        return Ended(status, (self.folder / "said.txt").read_text(errors="replace"), seconds)

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
            raise RuntimeError(f"{wanted} ended with {ended.status}: {ended.said}")
        return ended

    def not_durable(self, work: Path) -> list[str]:
        """What a power cut would have taken, after `run(..., durable=names)`."""
        return json.loads((work / _DURABILITY).read_text())

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

    Args:
        names (`list[str]`): what a command promises to have written when it ends.
    """

    def __init__(self, names: list[str]):
        self.paths = [Path(name).absolute() for name in names]
        self.synced: dict[tuple[int, int], int] = {}
        self.early: list[str] = []
        for name in ("fsync", "fdatasync"):
            setattr(os, name, self._watched(getattr(os, name)))
        sys.addaudithook(self._event)

    def _watched(self, function: Any) -> Any:
        def sync(file: Any) -> None:
            function(file)
            self._note(os.fstat(file if isinstance(file, int) else file.fileno()))

        return sync

    def _note(self, status: os.stat_result) -> None:
        self.synced[status.st_dev, status.st_ino] = status.st_mtime_ns

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
        return self.synced.get((status.st_dev, status.st_ino), -1) >= status.st_mtime_ns

    def report(self) -> list[str]:
        """What is wrong, a line each."""
        lost = [f"{path.name} was not synced" for whole in self.paths for path in self._lost(whole)]
        parents = {path.parent for path in self.paths}
        lost += [
            f"the folder of {self.paths[0].name} was not synced"
            for each in parents
            if not self._is_synced(each)
        ]
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
    file: str,
    words: list[str] | None = None,
    code: str = "",
    file_size: int | None = None,
    durable: list[str] | None = None,
) -> None:
    """Be the command, and end."""
    with suppress(PermissionError):
        os.setpgid(0, 0)
    said = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, said), (2, said)):
        os.dup2(target, number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    os.chdir(cwd)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    watch = Durability(durable) if durable else None
    try:
        if words is None:
            exec(compile(code, "<torture>", "exec"), {"__name__": "__main__"})
            status = 0
        else:
            status = cli.main(words)
        if watch is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            Path(cwd, _DURABILITY).write_text(json.dumps(watch.report()))
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve()
