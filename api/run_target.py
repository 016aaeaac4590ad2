"""What `emo run` starts: the Python program that a user means by the words of a command."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

_PYTHON = re.compile(r"(python|pypy)[\d.]*w?(\.exe)?")
# How installers write a first line that is too long for the system or has a space: a shell starts Python.
_EXEC_BY_SHELL = re.compile(r"#!/bin/sh\s*\n'''exec' (.+) \"\$0\" \"\$@\"")
_BINARIES = {b"\x7fELF": "a compiled program", b"\xcf\xfa\xed\xfe": "a compiled program", b"MZ": "a program"}
_WHAT = (
    "`emo run` starts Python programs (a console script, a .py file, or `-m` and a module); a shell script "
    "can call it for those it starts"
)


@dataclass(frozen=True)
class Target:
    """A program and how it is started.

    Args:
        arguments (`list[str]`): the program's file first.
        python (`str`): the interpreter that runs it.
        cut_off (`str`, *optional*): the option of this Python (`-I`, `-E` or `-S`) by which it ignores where
            EMO comes from.

    Example: see `find_target`.
    """

    arguments: list[str]
    python: str
    cut_off: str | None = None


def find_target(words: Sequence[str]) -> Target:
    """Find out what a command starts: looked for in this Python's environment first, then on the `PATH`.

    Args:
        words (`Sequence[str]`): the command; or `-m`, a module and its arguments.

    Raises:
        ValueError: if there is no such command, it is no Python program, or it runs in another environment.

    Example:

    ```python
    >>> from transformers_emo.run_target import find_target
    >>> find_target(["-m", "json.tool", "--help"]).arguments[1:]
    ['-m', 'json.tool', '--help']
    >>> try:
    ...     find_target(["/bin/sh", "script.sh"])
    ... except ValueError as error:
    ...     print(error)
    /bin/sh is a compiled program: `emo run` starts Python programs...

    ```
    """
    if not words:
        raise ValueError(f"No command: {_WHAT}. Such as `emo run -- lm_eval --model hf ...`.")
    name, *rest = words
    if name == "-m":
        if not rest:
            raise ValueError("-m needs the name of a module.")
        return Target([sys.executable, *words], sys.executable)
    if name.startswith("-"):
        raise ValueError(f"{name!r} is no command and no option of `emo run`: see `emo run --help`.")
    if _is_python_file(name):
        return Target([sys.executable, *words], sys.executable)
    found = _find(name)
    if isinstance(found, EntryPoint):
        start = f"import sys; from importlib.metadata import EntryPoint; sys.argv[0] = {name!r}; "
        start += f"sys.exit(EntryPoint({name!r}, {found.value!r}, 'console_scripts').load()())"
        return Target([sys.executable, "-c", start, *rest], sys.executable)
    if _PYTHON.fullmatch(os.path.basename(found)):
        interpreter, options = found, rest
    else:
        interpreter, options = _interpreter(found)
    _check_environment(name, interpreter)
    return Target([found, *rest], interpreter, _cut_off(options))


def _is_python_file(name: str) -> bool:
    path = Path(name)
    if path.is_dir():
        return (path / "__main__.py").is_file()
    if not path.is_file():
        return False
    return path.suffix in (".py", ".pyw", ".pyz") or (os.sep in name and zipfile.is_zipfile(path))


def _find(name: str) -> str | EntryPoint:
    """The file of a command, or its entry point where an environment has no file for it."""
    if os.sep in name or (os.altsep or os.sep) in name:
        if not os.path.isfile(name):
            raise ValueError(f"There is no file {name!r} (seen from {os.getcwd()}).")
        return name
    places = [os.path.dirname(sys.executable), sysconfig.get_path("scripts")]
    for path in (os.pathsep.join(places), None):
        found = shutil.which(name, path=path)
        if found is not None:
            return found
        if path is not None:
            commands = {entry.name: entry for entry in entry_points(group="console_scripts")}
            if name in commands:
                return commands[name]
    hints = [f"`emo run {near}`" for near in difflib.get_close_matches(name, commands, n=1, cutoff=0.7)]
    if name.isidentifier() and _has_module(name):
        hints.append(f"`emo run -m {name}`")
    if os.path.isfile(name):
        hints.append(f"`emo run ./{name}`")
    did_you_mean = f" Did you mean {' or '.join(hints)}?" if hints else ""
    raise ValueError(
        f"There is no command {name!r} in the environment of {sys.executable} or on the PATH.{did_you_mean}"
    )


def _has_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _interpreter(file: str) -> tuple[str, list[str]]:
    """The Python of a script and the options it is given, from the first line."""
    try:
        with open(file, "rb") as stream:
            head = stream.read(4096)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}.") from error
    for magic, kind in _BINARIES.items():
        if head.startswith(magic):
            raise ValueError(f"{file} is {kind}: {_WHAT}.")
    text = head.decode(errors="replace")
    by_shell = _EXEC_BY_SHELL.match(text)
    if by_shell and "$" in by_shell[1]:  # the Python beside the script, in environments that may be moved
        beside = os.path.dirname(os.path.realpath(file))
        return os.path.join(beside, by_shell[1].rpartition("/")[2].strip("'\"")), []
    if by_shell:
        python, *options = shlex.split(by_shell[1])
        return python, options
    line = text.split("\n", 1)[0].strip()
    if not line.startswith("#!"):
        raise ValueError(f"{file} does not say which program runs it (no first line with #!): {_WHAT}.")
    words = shlex.split(line[2:].replace("\\", "\\\\"))
    if words and os.path.basename(words[0]) == "env":
        words = [word for word in words[1:] if word != "-S" and "=" not in word]
        words[:1] = [shutil.which(word) or word for word in words[:1]]
    if not words or not _PYTHON.fullmatch(os.path.basename(words[0])):
        raise ValueError(f"{file} is a script for {words[0] if words else 'nothing'}: {_WHAT}.")
    return words[0], words[1:]


def _check_environment(name: str, interpreter: str) -> None:
    """See that another interpreter than this one has this very package."""
    here, there = os.path.abspath(sys.executable), os.path.abspath(interpreter)
    # Links in one folder are one environment; a virtual environment's Python links out of its own.
    if os.path.dirname(here) == os.path.dirname(there) and os.path.samefile(here, there):
        return
    code = (
        "from importlib.util import find_spec as f; s = f('transformers_emo'); print(s.origin if s else '')"
    )
    try:
        asked = subprocess.run(
            [interpreter, "-c", code], capture_output=True, text=True, timeout=60, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(f"{name} runs in {interpreter}, which does not start: {error}.") from error
    own = os.path.join(os.path.dirname(os.path.abspath(__file__)), "__init__.py")
    if not asked:
        raise ValueError(
            f"{name} runs in another environment, that of {interpreter}, which has no transformers-emo: "
            f"install it there and use that environment's own `emo`, or install {name} in this one."
        )
    if os.path.realpath(asked) != os.path.realpath(own):
        raise ValueError(
            f"{name} runs in another environment, that of {interpreter}, with a transformers-emo of its own "
            f"({os.path.dirname(asked)}): start it with that environment's own `emo`."
        )


def _cut_off(options: Sequence[str]) -> str | None:
    """The option by which a Python ignores PYTHONPATH or its start-up files, if it has one."""
    waiting = False  # for the value of an option
    for word in options:
        if waiting:
            waiting = False
            continue
        if word == "--check-hash-based-pycs":
            waiting = True
            continue
        if word.startswith("--") and word != "--":
            continue
        if not word.startswith("-") or word in ("-", "--"):
            return None
        for place, letter in enumerate(word[1:], 2):
            if letter in "cm":
                return None
            if letter in "XW":
                waiting = place == len(word)
                break
            if letter in "IES":
                return f"-{letter}"
    return None
