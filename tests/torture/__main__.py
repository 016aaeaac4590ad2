"""Repeat what can go wrong, many times, and tell how often it went how. `make torture`; see docs/security.md.

The commands are the real ones, on models of 4 MB. What is not as it should be is bold in the table, and the
exit status is 1.
"""

import argparse
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from hub_server import HubServer

from . import faults, hubs
from .coroutines import CODE
from .faults import Place, Row
from .forks import Worker
from .jobs import TOY, make_inputs

KINDS = ("kills", "sources", "disks", "power", "runs", "hubs", "coroutines")
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
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def coroutines(place: Place, seconds: float, seed: int) -> Row:
    """Eight coroutines on one model."""
    row = Row("eight coroutines, eight choices of experts", "`use_experts`, `generate`")
    code = f"TOY, SEED, SECONDS = {os.fspath(TOY)!r}, {seed}, {seconds}\n{CODE}"
    ended = place.worker.run(place.work, code=code)
    if ended.status:
        row.note(f"an error: {(ended.said.strip().splitlines() or ['?'])[-1][:160]}", False)
        return row
    facts = json.loads(ended.said.strip().splitlines()[-1])
    row.outcomes["the answer of the request alone"] = facts["calls"] - facts["wrong"]
    row.good.add("the answer of the request alone")
    if facts["wrong"]:
        row.outcomes["ANOTHER ANSWER than alone"] = facts["wrong"]
    if facts["masked for good"]:
        row.note("the model stays MASKED", False)
    if facts["grown"] > 16 << 20:
        row.note(f"memory GREW by {facts['grown'] >> 20} MB in {facts['rounds']} rounds", False)
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
                ("kills", faults.kills, times),
            ]
            for kind, fault, count in local:
                for job in jobs if kind in wanted else []:
                    if kind != "sources" or job.source:
                        yield fault(job, place, count if job.seconds < 2 else max(3, count // 5))
            if "kills" in wanted and not arguments.jobs:
                yield hubs.killed_pushes(hub, worker, place, times)
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
        lines.append(f"| {row.fault} | {row.what} | {row.tried} | {outcomes} |")
    return "\n".join(lines)


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
        before, begin, rest = arguments.write.read_text(encoding="utf-8").partition(_BEGIN)
        _, end, after = rest.partition(_END)
        if not begin or not end:
            raise SystemExit(f"{arguments.write} has no lines {_BEGIN} and {_END}: add them.")
        text = f"{before}{begin}\n\n{summary}\n\n{table(rows)}\n\n{end}{after}"
        arguments.write.write_text(text, encoding="utf-8")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
