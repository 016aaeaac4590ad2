"""What goes wrong on this machine: kills, rewritten sources, full disks, power cuts."""

import errno
import os
import random
import shutil
import signal
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
        remarks (`list[str]`): what else was measured.
    """

    fault: str
    what: str
    outcomes: Counter = field(default_factory=Counter)
    good: set[str] = field(default_factory=set)
    remarks: list[str] = field(default_factory=list)

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
            return f"the next call fails: {ended.last}"
        if job.digest(self.out) != job.right:
            return "the next call leaves other bytes"
        left = sorted(path.name for path in self.work.iterdir() if path.name not in ("out", "said.txt"))
        return f"{left[0]} is left behind" if left else None


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
    """Put another model in the place of the source while the command reads it.

    Files are replaced, or written to in place, or written to so that size and time stay the same.
    """
    row = Row("source rewritten meanwhile", f"`emo {job.name}`")
    other = place.inputs / ("other" if job.source == "model" else f"other-{job.source}")
    own = place.work.parent / "own-inputs"
    for number in range(times):
        source = _own_inputs(job, place, own)
        shutil.copytree(other, own / "coming")
        fresh(place.work)
        pid = place.worker.start(place.work, words=job.command(own))
        time.sleep(place.random.uniform(0, 0.8 * job.seconds))
        paths = sorted((own / "coming").rglob("*"))
        pause = place.random.uniform(0, 0.3 * job.seconds) / len(paths)
        for path in paths:
            time.sleep(pause)
            target = source / path.relative_to(own / "coming")
            if path.is_dir() or not target.exists():
                continue
            if number % 3 == 0:
                path.replace(target)
                continue
            before = target.stat()
            with open(target, "r+b") as stream:
                stream.write(path.read_bytes())
                stream.truncate()
            if number % 3 == 2:
                os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
        was_faster = not os.path.exists(f"/proc/{pid}")
        ended = place.worker.end()
        outcome, good = _of_two(job, place, ended, own)
        # Begun and ended amid the rewriting: then the source did not change, but was a mix all the time.
        if good or not was_faster:
            row.note(outcome, good)
    shutil.rmtree(own, ignore_errors=True)
    return row


def _own_inputs(job: Job, place: Place, own: Path) -> Path:
    """Inputs with a source that may be changed, and links to all others."""
    fresh(own)
    for path in place.inputs.iterdir():
        if path.name == "recipe.yaml":  # it names the folder
            (own / path.name).write_text(path.read_text().replace(os.fspath(place.inputs), os.fspath(own)))
        elif path.name != job.source:
            (own / path.name).symlink_to(path)
    source = own / str(job.source)
    shutil.copytree(place.inputs / str(job.source), source)
    return source


_OTHERS: dict[str, dict[str, str]] = {}


def _of_two(job: Job, place: Place, ended: Ended, own: Path) -> tuple[str, bool]:
    if ended.status:
        if place.is_half(job):
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


def planted(job: Job, place: Place) -> Iterator[Row]:
    """What others may have put where the command reads or writes."""
    out, partial = place.work / "out", place.work / ".out.partial"
    precious = place.work.parent / "precious"

    def no_folder(path: Path) -> None:
        path.symlink_to(precious)

    def writable(path: Path) -> None:
        path.mkdir()
        (path / "model.safetensors").write_text("planted")
        path.chmod(0o777)

    row = Row("planted where the result is made", f"`emo {job.name}`")
    for plant in (no_folder, writable) if not job.grows and job.name != "select" else ():
        for path in (partial, out):
            fresh(place.work)
            fresh(precious)
            (precious / "file").write_text("keep me")
            plant(path)
            before = _everything(place.work) | _everything(precious)
            ended = _within_a_minute(place, job.command(place.inputs))
            if ended.status == 0:
                row.note("TAKEN, status 0", False)
            elif _everything(place.work) | _everything(precious) != before:
                row.note("an error, and what was planted is changed", False)
            else:
                row.note(ended.error or "refused in one line, and left as it is", not ended.error)
    if row.tried:
        yield row
    own = place.work.parent / "own-inputs"
    pipes = Row("a pipe in place of a file of the source", f"`emo {job.name}`")
    links = Row("a link out of the source, to a file of the user", f"`emo {job.name}`")
    for fault, names in ((pipes, _files_of(place.inputs / str(job.source))), (links, ["README.md", "NOTES"])):
        for name in names:
            source = _own_inputs(job, place, own)
            secret = place.work.parent / "secret"
            secret.write_text("SECRET of the user")
            (source / name).unlink(missing_ok=True)
            if fault is pipes:
                os.mkfifo(source / name)
            else:
                (source / name).symlink_to(secret)
            fresh(place.work)
            ended = _within_a_minute(place, job.command(own))
            copied = [path for path in _everything(place.work).values() if b"SECRET" in path]
            if ended.status == -signal.SIGKILL:
                fault.note(f"HANGS ({name})", False)
            elif copied:
                fault.note(f"COPIED ({name})", False)
            elif ended.status == 0:
                fault.note("left out, and the result is that of the other files", True)
            elif place.is_half(job):
                fault.note("an error, and something under the final name", False)
            else:
                fault.note(ended.error or "refused in one line", not ended.error)
        yield fault
    shutil.rmtree(own, ignore_errors=True)


def _files_of(source: Path) -> list[str]:
    """One file of each kind."""
    found: dict[str, str] = {}
    for path in sorted(source.rglob("*")):
        if path.is_file():
            kind = path.suffix if path.suffix in (".safetensors", ".distcp") else path.name
            found.setdefault(kind, os.path.relpath(path, source))
    return list(found.values())


def _everything(folder: Path) -> dict[str, bytes]:
    """What a folder holds; links are not followed."""
    return {
        os.fspath(path): b"-> " + os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def _within_a_minute(place: Place, words: list[str]) -> Ended:
    pid = place.worker.start(place.work, words=words)
    timer = threading.Timer(60, kill, [pid])
    timer.start()
    ended = place.worker.end()
    timer.cancel()
    return ended


def failing_disk(job: Job, place: Place, times: int) -> Row:
    """A disk that fails or is full at the very moment when a file is brought to it, or gets its name."""
    row = Row("disk fails at `fsync` or rename (EIO, ENOSPC)", f"`emo {job.name}`")
    fresh(place.work)
    names = ["out/" + name for name in job.right] if job.grows else ["out"]
    place.worker.must(place.work, words=job.command(place.inputs), durable=names)
    calls = place.worker.calls_that_can_fail(place.work)
    for number in range(times):
        fresh(place.work)
        # The last ones are those with which the result gets its name.
        which = calls - number // 2 if number % 2 else place.random.randint(1, calls)
        fails = [max(1, which), (errno.EIO, errno.ENOSPC)[number % 4 // 2]]
        ended = place.worker.run(place.work, words=job.command(place.inputs), fails=fails)
        wrong = None
        if ended.status and job.digest(place.out) == job.right and not job.grows:
            # It has its name, and the folder that holds the name could not be brought to the disk.
            wrong = ended.error
            row.note(wrong or "one line; the result is whole, and may not survive a power cut", not wrong)
            continue
        wrong = _judge(job, place, ended)
        if wrong is None and ended.status:
            wrong = place.go_on(job)
        if wrong is not None:
            row.note(wrong, False)
        elif ended.status:
            row.note("one line, nothing half there; the next call is right", True)
        else:
            row.note("right: the file did not matter", True)
    return row


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
    for number in range(times):
        fresh(place.work)
        largest = _largest(job, place)
        small = job.spare + place.random.randint(1, max(2, largest // 4096)) * 4096
        ways: list[Callable[[], tuple[Ended, str | None]]] = [
            lambda: _too_small(job, place, small),  # noqa: B023 (called at once)
            lambda: _filled(job, place, 160 << 20),
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
