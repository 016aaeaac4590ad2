"""What goes wrong on this machine: kills, rewritten sources, full disks, power cuts."""

import os
import random
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from .forks import Ended, Worker, kill
from .jobs import Job, fresh

RIGHT = "right"


@dataclass
class Row:
    """A line of the table.

    Args:
        fault (`str`): what goes wrong.
        what (`str`): with which command.
        outcomes (`Counter`): how often each outcome was seen.
        good (`set[str]`): the outcomes that are as they should be.
    """

    fault: str
    what: str
    outcomes: Counter = field(default_factory=Counter)
    good: set[str] = field(default_factory=set)

    @property
    def tried(self) -> int:
        """How often it was tried."""
        return sum(self.outcomes.values())

    @property
    def bad(self) -> int:
        """How often the outcome was not as it should be."""
        return sum(count for outcome, count in self.outcomes.items() if outcome not in self.good)

    def note(self, outcome: str, good: bool) -> None:
        """Count an outcome."""
        self.outcomes[outcome] += 1
        if good:
            self.good.add(outcome)


class Place:
    """Where a job is run, over and over, by a worker."""

    def __init__(self, worker: Worker, inputs: Path, work: Path, random_numbers: random.Random):
        self.worker, self.inputs, self.work, self.random = worker, inputs, work, random_numbers

    @property
    def out(self) -> Path:
        """What the command makes."""
        return self.work / "out"

    def is_half(self, job: Job) -> bool:
        """Whether what stands under the final name is something, and not all of it."""
        found = job.digest(self.out)
        return (
            self.out.exists()
            and any(job.right.get(name) != digest for name, digest in found.items())
            or (not job.grows and self.out.exists() and found != job.right)
        )

    def go_on(self, job: Job) -> str | None:
        """Call again after a fault; gives what is wrong then."""
        ended = self.worker.run(self.work, words=[*job.command(self.inputs), *job.again])
        if ended.status:
            return f"the next call fails: {_last(ended)}"
        if job.digest(self.out) != job.right:
            return "the next call leaves other bytes"
        left = sorted(path.name for path in self.work.iterdir() if path.name not in ("out", "said.txt"))
        return f"{left[0]} is left behind" if left else None


def _last(ended: Ended) -> str:
    lines = ended.said.strip().splitlines()
    return lines[-1][:160] if lines else f"status {ended.status}"


def kills(job: Job, place: Place, times: int) -> Row:
    """Kill the command at random moments of its run; then call it again."""
    row = Row("killed (SIGKILL)", f"`emo {job.name}`")
    tries = 0
    while row.tried < times and tries < 20 * times:  # some end before they are killed
        tries += 1
        fresh(place.work)
        pid = place.worker.start(place.work, words=job.command(place.inputs))
        time.sleep(place.random.uniform(0, 1.02 * job.seconds))
        kill(pid)
        ended = place.worker.end()
        if ended.status >= 0:  # it was faster
            continue
        if place.is_half(job):
            row.note("HALF THERE under the final name", False)
        elif job.digest(place.out) == job.right and not job.again and not job.grows:
            row.note("whole before the kill", True)
        else:
            wrong = place.go_on(job)
            row.note(wrong or "nothing under the final name; the next call is right", not wrong)
    return row


def rewritten(job: Job, place: Place, times: int) -> Row:
    """Put another model in the place of the source while the command reads it."""
    row = Row("source rewritten meanwhile", f"`emo {job.name}`")
    other = place.inputs / ("other-step" if job.source == "step" else "other")
    own = place.work.parent / "own-inputs"
    for number in range(times):
        fresh(own)
        for path in place.inputs.iterdir():
            if path.name != job.source:
                (own / path.name).symlink_to(path)
        source = own / str(job.source)
        shutil.copytree(place.inputs / str(job.source), source)
        shutil.copytree(other, own / "coming")
        fresh(place.work)
        place.worker.start(place.work, words=job.command(own))
        time.sleep(place.random.uniform(0, 0.9 * job.seconds))
        in_place = number % 2 == 1
        for path in sorted((own / "coming").rglob("*")):
            target = source / path.relative_to(own / "coming")
            if path.is_dir() or not target.exists():
                continue
            if in_place:
                with open(target, "r+b") as stream:
                    stream.write(path.read_bytes())
                    stream.truncate()
            else:
                path.replace(target)
        ended = place.worker.end()
        row.note(*_of_two(job, place, ended, own))
    shutil.rmtree(own, ignore_errors=True)
    return row


_OTHERS: dict[str, dict[str, str]] = {}


def _of_two(job: Job, place: Place, ended: Ended, own: Path) -> tuple[str, bool]:
    if ended.status:
        if place.out.exists():
            return "an error, and something under the final name", False
        return (f"an error, but {ended.error}", False) if ended.error else ("refused, nothing is left", True)
    found = job.digest(place.out)
    if found == job.right:
        return "made of the first source alone", True
    if job.name not in _OTHERS:  # the source is the other model by now
        fresh(place.work)
        place.worker.must(place.work, words=job.command(own))
        _OTHERS[job.name] = job.digest(place.out)
    # A result may name its source's bytes: then it is compared file by file with what both would give.
    if found == _OTHERS[job.name]:
        return "made of the second source alone", True
    return "MIXED of two models, status 0", False


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A disk of some bytes in memory, mounted at a folder.

    Raises:
        PermissionError: where this user may not mount.
    """
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", os.fspath(folder)],
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise PermissionError(done.stderr.decode())
    try:
        yield
    finally:
        subprocess.run(["umount", os.fspath(folder)], check=False)


def full_disk(job: Job, place: Place, times: int) -> Row:
    """Disks that are too small, that others fill meanwhile, and limits on the size of a file."""
    row = Row("disk full", f"`emo {job.name}`")
    needed = sum(path.stat().st_size for path in place.inputs.rglob("*") if path.is_file())
    for number in range(times):
        fresh(place.work)
        largest = _largest(job, place)
        ways: list[Callable[[], tuple[Ended, str | None]]] = [
            lambda: _too_small(job, place, place.random.randint(1, max(2, largest // 4096)) * 4096),  # noqa: B023 (called at once)
            lambda: _filled(job, place, needed * 2),
            lambda: _limited(job, place, place.random.randint(1, max(2, largest - 1))),  # noqa: B023
        ]
        try:
            ended, wrong = ways[number % 3]()
        except PermissionError:
            ended, wrong = ways[2]()
        if wrong is not None:
            row.note(wrong, False)
        elif ended.status == 0:
            row.note("there was room, right", True)
        else:
            row.note("one line, nothing half there; the next call is right", True)
    return row


_LARGEST: dict[str, int] = {}


def _largest(job: Job, place: Place) -> int:
    if job.name not in _LARGEST:
        place.worker.must(place.work, words=job.command(place.inputs))
        files = [place.out] if place.out.is_file() else place.out.rglob("*")
        _LARGEST[job.name] = max(path.stat().st_size for path in files)
        fresh(place.work)
    return _LARGEST[job.name]


def _judge(job: Job, place: Place, ended: Ended) -> str | None:
    if place.is_half(job):
        return "HALF THERE under the final name"
    if ended.status == 0:
        return None if job.digest(place.out) == job.right else "OTHER BYTES, status 0"
    return ended.error


def _too_small(job: Job, place: Place, size: int) -> tuple[Ended, str | None]:
    with small_disk(place.work, size):
        ended = place.worker.run(place.work, words=job.command(place.inputs))
        wrong = _judge(job, place, ended)
        if wrong is None and ended.status:
            subprocess.run(["mount", "-o", "remount,size=1g", os.fspath(place.work)], check=True)
            wrong = place.go_on(job)
        return ended, wrong


def _filled(job: Job, place: Place, size: int) -> tuple[Ended, str | None]:
    """Another program fills the disk at a random moment."""
    with small_disk(place.work, size):

        def fill() -> None:
            with suppress(OSError), open(place.work / "said.txt", "wb") as stream:
                while True:
                    stream.write(b"x" * 65536)
                    stream.flush()

        filler = threading.Timer(place.random.uniform(0, 0.9 * job.seconds), fill)
        place.worker.start(place.work, words=job.command(place.inputs))
        filler.start()
        ended = place.worker.end()
        filler.cancel()
        filler.join()
        (place.work / "said.txt").unlink(missing_ok=True)
        wrong = _judge(job, place, ended)
        if wrong is None and ended.status:
            wrong = place.go_on(job)
        return ended, wrong


def _limited(job: Job, place: Place, size: int) -> tuple[Ended, str | None]:
    ended = place.worker.run(place.work, words=job.command(place.inputs), file_size=size)
    wrong = _judge(job, place, ended)
    if wrong is None and ended.status:
        wrong = place.go_on(job)
    return ended, wrong


def power_cut(job: Job, place: Place, times: int) -> Row:
    """See that files reach the disk before the result has its name, and the name before the command ends."""
    row = Row("power cut after success", f"`emo {job.name}`")
    for _ in range(times):
        fresh(place.work)
        names = ["out/" + name for name in job.right] if job.grows else ["out"]
        place.worker.must(place.work, words=job.command(place.inputs), durable=names)
        lost = place.worker.not_durable(place.work)
        row.note(
            f"LOST: {lost[0]}" if lost else "synced before the name, and the name before the end", not lost
        )
    return row


def two_runs(job: Job, place: Place, second: Worker, times: int) -> Row:
    """Start the same command twice at once, into one folder."""
    row = Row("two runs into one folder", f"`emo {job.name}`")
    for _ in range(times):
        fresh(place.work)
        place.worker.start(place.work, words=job.command(place.inputs))
        time.sleep(place.random.uniform(0, 0.9 * job.seconds))
        second.start(place.work, words=job.command(place.inputs))
        ended = [place.worker.end(), second.end()]
        failed = [each for each in ended if each.status]
        untold = [error for each in failed if (error := each.error)]
        if len(failed) == 2:
            row.note("both fail", False)
        elif job.digest(place.out) != job.right:
            row.note("OTHER BYTES", False)
        elif untold:
            row.note(f"one fails with {untold[0]}", False)
        else:
            row.note("one refused, the other right" if failed else "both right", True)
    return row
