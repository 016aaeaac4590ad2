"""All benchmarks, one after the other, into `benchmarks/RESULTS.md`.

    python benchmarks/run.py [NAME ...] [--quick] [--folder DIR] [--pass NAME="ARGUMENTS"] [--out FILE]

Every script beside this one that has a `main` runs in a process of its own. What it prints goes to the
terminal and, when it has ended, into a section of the results, written at once: nothing is lost by an
interruption. With names, only their sections are replaced. A script that fails has a section that says so,
and the others go on; the exit status then is 1.

A script says in its docstring what it shows (`Claim: ...`) and what must hold (`Bar: ...`). Scripts that take
`--folder` share one synthetic checkpoint (7.4 GB), in a temporary folder or in the one given.
"""

import argparse
import ast
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).parent
# What the products of matrices on a CPU depend on, as Linux names it.
INSTRUCTION_SETS = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "bf16", "i8mm", "sve"),
)
# A line of a script that begins with a ratio, or with one and another in brackets, is a row of a table.
ROW = re.compile(r"(?P<ratio>-?\d+\.\d+( \([^)]*\))?) {2,}(?P<what>\S.*)")


@dataclass(frozen=True)
class Script:
    """A benchmark: its file, what it shows, what must hold, and the options of all benchmarks it takes."""

    path: Path
    claim: str
    bar: str | None
    options: frozenset[str]

    @property
    def name(self) -> str:
        """What it is called on the command line."""
        return self.path.stem


@dataclass(frozen=True)
class Outcome:
    """What a run of a script gave."""

    lines: tuple[str, ...]
    status: int
    seconds: float
    command: str


def find_scripts(folder: Path) -> dict[str, Script]:
    """The benchmarks of a folder by name: files with a function `main`, but for this one."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        has_main = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
        if has_main and path.name != Path(__file__).name:
            claim, bar = read_docstring(ast.get_docstring(tree) or path.stem)
            options = frozenset(option for option in ("--quick", "--folder") if f'"{option}"' in source)
            found[path.stem] = Script(path, claim, bar, options)
    return found


def read_docstring(text: str) -> tuple[str, str | None]:
    """The claim and the bar of a docstring; its first paragraph is the claim where none is called so."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    said = {}
    for paragraph in paragraphs:
        kind, _, rest = paragraph.partition(": ")
        if kind in ("Claim", "Bar"):
            said[kind] = rest
    return said.get("Claim", paragraphs[0]), said.get("Bar")


def command_of(script: Script, *, quick: bool, folder: Path, extra: Sequence[str] = ()) -> list[str]:
    """How a script is called."""
    command = [sys.executable, str(script.path)]
    if quick and "--quick" in script.options:
        command.append("--quick")
    if "--folder" in script.options and "--folder" not in extra:
        command += ["--folder", str(folder)]
    return [*command, *extra]


def run(command: Sequence[str]) -> Outcome:
    """Run a script to its end; its output goes to the terminal as it comes."""
    start = time.perf_counter()
    lines = []
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, errors="replace", env=environment
    ) as child:
        try:
            for line in child.stdout or ():
                print(line, end="", flush=True)
                lines.append(line.rstrip())
        except BaseException:  # interrupted: nothing must go on running
            child.kill()
            raise
    script, *arguments = command[1:]
    # Where things lie on this machine is nobody's business.
    names = [Path(part).name if os.path.isabs(part) else part for part in arguments]
    shown = ["python", f"{HERE.name}/{Path(script).name}", *names]
    return Outcome(tuple(lines), child.returncode, time.perf_counter() - start, shlex.join(shown))


def render_lines(lines: Iterable[str]) -> str:
    """Output as Markdown: rows that begin with a ratio as tables, all else as blocks of text."""
    parts: list[str] = []
    kind = None
    for line in lines:
        row = ROW.fullmatch(line.strip())
        if not line.strip():
            kind = None
            continue
        if kind != bool(row):
            kind = bool(row)
            parts += ["", "| ratio | |", "|---|---|"] if row else [""]
        if row:
            parts.append(f"| {row['ratio']} | {row['what'].replace('|', chr(92) + '|')} |")
        else:
            parts.append(f"    {line}")
    return "\n".join(parts).strip("\n")


def render_section(script: Script, outcome: Outcome, circumstances: str) -> str:
    """The section of a script in the results, without its heading."""
    bar = f" **Bar:** {script.bar}" if script.bar else ""
    parts = [script.claim[:1].upper() + script.claim[1:] + bar]
    if outcome.status:
        parts.append(
            f"**Failed** with status {outcome.status} after {outcome.seconds:.0f} s; what it printed before:"
        )
    parts.append(render_lines(outcome.lines) or "(no output)")
    parts.append(f"*{circumstances}; `{outcome.command}`, {outcome.seconds:.0f} s*")
    return "\n\n".join(parts)


def split_sections(text: str) -> dict[str, str]:
    """The sections of a file of results, by name."""
    pieces = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return {
        name.strip(): section.strip("\n")
        for name, section in zip(pieces[1::2], pieces[2::2], strict=True)
        if name.strip() != "Machine"
    }


def join_sections(machine: str, sections: dict[str, str]) -> str:
    """A file of results."""
    head = (
        "# Results\n\nWritten by `make bench`. A ratio comes first, and is read with the words behind it: "
        "0.50 times the time of X is half of its time. In brackets stand the two values, and with "
        "some ratios the ratio of the fastest runs. Each section says when and with what it was measured."
    )
    parts = [head, f"## Machine\n\n{machine}"]
    parts += [f"## {name}\n\n{section}" for name, section in sorted(sections.items())]
    return "\n\n".join(parts) + "\n"


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is the old or the new one at any moment."""
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
    ) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def processor() -> tuple[str, list[str]]:
    """The name of the processor, and which of the instruction sets that matter here it has."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), []
    name = re.search(r"^model name\s*: (.+)$", text, flags=re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.+)$", text, flags=re.MULTILINE)
    has = set(flags[1].split()) if flags else set()
    return name[1] if name else platform.machine(), [one for one in INSTRUCTION_SETS if one in has]


def describe_machine() -> str:
    """The machine in a few lines of Markdown."""
    import torch

    name, sets = processor()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return "\n".join(
        [
            f"- processor: {name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of PyTorch",
            f"- instruction sets: {', '.join(sets) or 'unknown'}",
            f"- memory: {memory / 2**30:.1f} GiB",
            f"- system: {platform.system()} {platform.release()}",
            f"- versions: {describe_versions()}",
        ]
    )


def describe_versions() -> str:
    """The versions that numbers depend on."""
    names = {"PyTorch": "torch", "Transformers": "transformers", "transformers-emo": "transformers-emo"}
    found = [f"Python {platform.python_version()}"]
    for shown, name in names.items():
        try:
            found.append(f"{shown} {version(name)}")
        except PackageNotFoundError:
            from transformers_emo import __version__  # not installed, but on the path

            found.append(f"{shown} {__version__}")
    return ", ".join(found)


def passed_on(given: Iterable[str], scripts: dict[str, Script]) -> dict[str, list[str]]:
    """Arguments for single scripts, from `NAME=ARGUMENTS`."""
    found = {}
    for one in given:
        name, equals, arguments = one.partition("=")
        if not equals or name not in scripts:
            raise ValueError(f"{one!r}: expected NAME=ARGUMENTS, NAME one of {', '.join(scripts)}.")
        found[name] = shlex.split(arguments)
    return found


def main(arguments: Sequence[str] | None = None, here: Path = HERE) -> int:
    """Run the benchmarks asked for; 1 if one failed."""
    scripts = find_scripts(here)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(scripts)}; all by default")
    parser.add_argument("--quick", action="store_true", help="each script's own quick settings")
    parser.add_argument("--folder", type=Path, help="keep the synthetic checkpoint here")
    parser.add_argument("--pass", dest="passed", action="append", default=[], metavar="NAME=ARGUMENTS")
    parser.add_argument("--out", type=Path, default=here / "RESULTS.md")
    args = parser.parse_args(arguments)
    unknown = sorted(set(args.names) - set(scripts))
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}: there are {', '.join(scripts)}")
    try:
        extra = passed_on(args.passed, scripts)
    except ValueError as error:
        parser.error(str(error))
    machine = describe_machine()
    circumstances = f"{date.today()}; {describe_versions()}; {processor()[0]}, {os.cpu_count()} cores"
    failed = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary, "model")
        for name in args.names or scripts:
            print(f"\n== {name}", flush=True)
            command = command_of(scripts[name], quick=args.quick, folder=folder, extra=extra.get(name, ()))
            outcome = run(command)
            if outcome.status:
                failed.append(name)
                print(f"{name} failed with status {outcome.status}", flush=True)
            # Read anew: sections of scripts that are gone go too.
            old = split_sections(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
            sections = {known: text for known, text in old.items() if known in scripts}
            sections[name] = render_section(scripts[name], outcome, circumstances)
            write_whole(args.out, join_sections(machine, sections))
    print(f"\n{args.out} is written." + (f" Failed: {', '.join(failed)}." if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
