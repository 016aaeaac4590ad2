"""The commands of `docs/tutorials/engines.md`, as they stand there."""

import os
import re
import shlex
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from engines.environments import ROOT
from transformers_emo import cli

PAGE = ROOT / "docs" / "tutorials" / "engines.md"
BLOCK = re.compile(r"^(?:<!-- test: (?P<mark>[\w .]+) -->\n)?```bash\n(?P<code>.*?)^```", re.M | re.S)


def run_commands(mark: str, folder: Path, programs: Path, environment: dict[str, str]) -> str:
    """Run the page's commands from its top to the block of an engine, and give what that block prints.

    Args:
        mark (`str`): the engine, as in the comment above its block.
        folder (`Path`): an empty folder, which must be the current one.
        programs (`Path`): the folder of the engine's programs.
        environment (`dict[str, str]`): the variables of the engine's processes.
    """
    (folder / "model_cards").symlink_to(ROOT / "model_cards")
    blocks = [match.group("mark", "code") for match in BLOCK.finditer(PAGE.read_text(encoding="utf-8"))]
    assert mark in [found for found, _ in blocks]
    for found, code in blocks:
        if found == mark:
            return _printed(code, programs, environment)
        for line in code.splitlines() if found is None else ():
            assert cli.main(shlex.split(line)[1:]) == 0, line
    raise AssertionError


def _printed(code: str, programs: Path, environment: dict[str, str]) -> str:
    """What a block prints. What it leaves running is stopped."""
    environment = environment | {"PATH": f"{programs}{os.pathsep}{environment['PATH']}"}
    with open("errors.txt", "w+", encoding="utf-8") as errors:
        started = subprocess.Popen(
            ["bash", "-e", "-c", code.replace(" &\n", " > server.txt &\n")],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        try:
            printed, _ = started.communicate(timeout=900)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGTERM)
        errors.seek(0)
        assert started.returncode == 0, printed + errors.read()[-3000:]
    return printed
