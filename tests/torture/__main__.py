"""Repeat what can go wrong, many times, and tell how often it went how. `make torture`; see docs/security.md.

The commands are the real ones, on models of 4 MB. What is not as it should be is bold in the table, and the
exit status is 1.
"""

import argparse
import json
import os
import platform
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from hub_server import HubServer

from . import faults, hubs
from .coroutines import CODE
from .faults import Place, Row
from .forks import Worker
from .jobs import TOY, make_inputs

KINDS = ("kills", "sources", "disks", "power", "runs", "planted", "hubs", "coroutines")
_FOREIGN = re.compile(r"(HF_|HUGGING|TRANSFORMERS_|EMO_|(http|https|all|no)_proxy$)", re.IGNORECASE)
_BEGIN, _END = "<!-- torture -->", "<!-- end of torture -->"


def environment(hub: HubServer, home: Path) -> dict[str, str]:
    """That of every command: this Hub, a cache of its own, one thread."""
    kept = {name: value for name, value in os.environ.items() if not _FOREIGN.match(name)}
    return kept | {
        "NO_PROXY": "*",
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": hub.token,
        "HF_HOME": str(home),
        "HF_HUB_DOWNLOAD_TIMEOUT": "3",  # of one read: the rest is the library's own
        "HF_HUB_ETAG_TIMEOUT": "3",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def coroutines(place: Place, seconds: float, seed: int) -> Row:
    """Eight coroutines on one model."""
    row = Row(
        "eight coroutines, eight choices of experts",
        "`use_experts`, exclusion, `generate`, pools, streams, threads, `swap_experts`, copies",
    )
    code = f"TOY, SEED, SECONDS = {os.fspath(TOY)!r}, {seed}, {seconds}\n{CODE}"
    ended = place.worker.run(place.work, code=code)
    if ended.status:
        row.note(f"an error: {ended.last}", False)
        return row
    facts = json.loads(ended.said.strip().splitlines()[-1])
    wrong = sum(facts["wrong"].values())
    row.outcomes["the answer of the request alone"] = facts["calls"] - wrong
    row.good.add("the answer of the request alone")
    for way, count in facts["wrong"].items():
        row.outcomes[f"ANOTHER ANSWER than alone ({way})"] = count
    for error in facts["errors"]:
        print(error)
    if facts["masked for good"]:
        row.note("the model stays MASKED", False)
    grown = facts["grown"] / (1 << 20)
    memory = f"{facts['memory'] >> 20} MB of memory, {grown:+.0f} MB from the second quarter to the last"
    if grown > 16:
        row.note(f"memory GREW: {memory}", False)
    else:
        row.remarks.append(memory)
    return row


def all_rows(arguments: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Every fault, one after the other."""
    wanted = set(arguments.only or KINDS)
    times = arguments.times
    with HubServer(folder / "hub") as hub:
        variables = environment(hub, folder / "home")
        worker = Worker(variables, folder)
        (folder / "second").mkdir()
        try:
            jobs = make_inputs(worker, folder / "inputs")
            if arguments.jobs:
                jobs = [job for job in jobs if job.name in arguments.jobs]
            place = Place(worker, folder / "inputs", folder / "work", random.Random(arguments.seed))
            for job in jobs:
                job.learn(worker, place.inputs, place.work)
            local: list[tuple[str, Callable[..., Row], int]] = [
                ("power", faults.power_cut, min(times, 2)),
                ("sources", faults.rewritten, times),
                ("disks", faults.full_disk, times),
                ("disks", faults.failing_disk, times),
                ("kills", faults.kills, times),
            ]
            for kind, fault, count in local:
                for job in jobs if kind in wanted else []:
                    if kind != "sources" or job.source:
                        yield fault(job, place, count if job.seconds < 2 else max(3, count // 5))
            if "kills" in wanted and not arguments.jobs:
                yield hubs.killed_pushes(hub, worker, place, times)
            if "planted" in wanted:
                for job in jobs:
                    yield from faults.planted(job, place)
            if "runs" in wanted:
                second = Worker(variables, folder / "second")
                for job in jobs:
                    yield faults.two_runs(job, place, second, max(3, times // 5))
                second.close()
            if "hubs" in wanted:
                network, thief = hubs.Network(hub, place.inputs), hubs.Thief()
                readers = [job for job in jobs if job.name in ("extract", "shard")]
                for lie in hubs.lies(thief) if readers else []:
                    slow = lie.pause or "Retry" in lie.name
                    yield hubs.lying(lie, thief, network, place, readers, 3 if slow else max(6, times // 2))
                thief.close()
            if "coroutines" in wanted:
                yield coroutines(place, arguments.minutes * 60, arguments.seed)
        finally:
            worker.close()


def table(rows: list[Row]) -> str:
    """As Markdown: fault, times tried, outcome."""
    lines = ["| fault | where | times tried | outcome |", "|---|---|---|---|"]
    for row in rows:
        outcomes = "; ".join(
            f"{'' if outcome in row.good else '**'}{count} {outcome}{'' if outcome in row.good else '**'}"
            for outcome, count in row.outcomes.most_common()
        ).replace("|", "\\|")
        outcomes = "; ".join([outcomes, *row.remarks])
        lines.append(f"| {row.fault} | {row.what} | {row.tried} | {outcomes} |")
    return "\n".join(lines)


def write(rows: list[Row], file: Path) -> None:
    """Put a table into a file. Of the table that is there, rows about other faults and commands stay."""
    before, begin, rest = file.read_text(encoding="utf-8").partition(_BEGIN)
    old, end, after = rest.partition(_END)
    if not begin or not end:
        raise SystemExit(f"{file} has no lines {_BEGIN} and {_END}: add them.")
    lines = [line for line in old.splitlines() if line.startswith("| ") and not line.startswith("| fault |")]
    found = {tuple(line.split(" | ")[:2]): line for line in lines}
    for row in rows:
        line = table([row]).splitlines()[-1]
        found[tuple(line.split(" | ")[:2])] = line
    tried = sum(int(line.split(" | ")[2]) for line in found.values())
    text = "\n".join([*table([]).splitlines(), *found.values()])
    said = f"{tried} tries, on {processor()}:"
    file.write_text(f"{before}{begin}\n\n{said}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def processor() -> str:
    """What this machine computes with."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{os.cpu_count()} cores of an {line.partition(':')[2].strip()}"
    return f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}"


def main() -> int:
    """Run it; the exit status is 1 if something was not as it should be."""
    parser = argparse.ArgumentParser(prog="make torture", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few minutes: each fault a few times")
    parser.add_argument("--times", type=int, help="how often each fault is tried (50; 4 with --quick)")
    parser.add_argument("--minutes", type=float, help="of coroutines (120; 0.2 with --quick)")
    parser.add_argument("--only", nargs="+", choices=KINDS, help="these kinds of faults")
    parser.add_argument("--jobs", nargs="+", help="these commands, such as extract")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help=f"put the table between the lines {_BEGIN} and {_END}"
    )
    arguments = parser.parse_args()
    if arguments.times is None:
        arguments.times = 4 if arguments.quick else 50
    if arguments.minutes is None:
        arguments.minutes = 0.2 if arguments.quick else 120
    folder = Path(tempfile.mkdtemp(prefix="emo-torture-"))
    rows, began = [], time.monotonic()
    try:
        for row in all_rows(arguments, folder):
            rows.append(row)
            print(table([row]).splitlines()[-1], flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    tried, bad = sum(row.tried for row in rows), sum(row.bad for row in rows)
    summary = f"{tried} tries, {bad} not as they should be, in {(time.monotonic() - began) / 60:.0f} minutes."
    print(f"\n{table(rows)}\n\n{summary}")
    if arguments.write:
        write(rows, arguments.write)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
