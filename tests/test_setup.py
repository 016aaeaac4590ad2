"""What is compiled when the package is installed: real builds, of a copy of what they need."""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from pathlib import Path

import psutil
import pytest
from transformers_emo.modeling_emo.kernels.instruction_sets import instruction_sets, library_name
from transformers_emo.modeling_emo.kernels.native_calls import Kernels

ROOT = Path(__file__).parents[1]
GCC = shutil.which("g++")
WITH_GCC = pytest.mark.skipif(sys.platform != "linux" or GCC is None, reason="builds by GCC on Linux")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The files that a build reads."""
    folder = tmp_path_factory.mktemp("checkout")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    left_out = shutil.ignore_patterns("__pycache__", "*.so", "*.o")
    for room in settings["tool"]["setuptools"]["package-dir"].values():
        shutil.copytree(ROOT / room, folder / room, ignore=left_out, dirs_exist_ok=True)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    (folder / "tests").mkdir()
    (folder / "tests" / "test_setup.py").touch()
    return folder


@pytest.fixture
def build(checkout, tmp_path):
    """Builds a wheel with these variables of the environment; gives it and what was printed."""

    def run(fails: bool = False, **environment):
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-v", "."]
        options = ["--no-index", "--no-build-isolation", "--no-deps", "--wheel-dir", str(tmp_path)]
        unset = ("CXX", "EMO_BUILD_KERNELS")
        clean = {name: value for name, value in os.environ.items() if name not in unset}
        done = subprocess.run(
            [*command, *options],
            cwd=checkout,
            env=clean | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        shutil.rmtree(checkout / "build", ignore_errors=True)
        assert bool(done.returncode) == fails, done.stdout
        return next(tmp_path.glob("*.whl"), None), done.stdout

    return run


def libraries(wheel: Path) -> set[str]:
    return {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")}


def said(printed: str) -> list[str]:
    return [line.strip() for line in printed.splitlines() if line.strip().startswith("transformers-emo: ")]


def test_without_a_compiler_the_wheel_is_for_every_platform(build, tmp_path):
    wheel, printed = build(PATH=str(tmp_path))
    assert wheel.name.endswith("-py3-none-any.whl") and not libraries(wheel)
    page = {f"transformers_emo/analysis/page/page.{ending}" for ending in ("html", "css", "js")}
    assert page <= set(zipfile.ZipFile(wheel).namelist())
    (line,) = said(printed)
    assert "no C++ compiler was found" in line and "several times as long" in line


@WITH_GCC
def test_what_an_old_compiler_does_not_know_is_left_out(build, tmp_path):
    """A wheel with all others, which can be loaded."""
    old = tmp_path / "old"
    refusal = 'echo "error: -mamx: what is it?" >&2; exit 1'
    old.write_text(f'#!/bin/sh\ncase "$*" in *-mamx*) {refusal};; esac\n{GCC} "$@"\n')
    old.chmod(0o755)
    sets = instruction_sets(os.uname().machine)
    wheel, printed = build(CXX=str(old), CXXFLAGS="-O0")
    assert "-py3-none-linux_" in wheel.name
    assert libraries(wheel) == {library_name(each.name) for each in sets if each.name != "amx"}
    lines = said(printed)
    assert all(each.name in lines[-1] for each in sets if each.name != "amx")
    if sets[0].name == "amx":
        assert "no kernels compiled for amx" in lines[0] and "what is it?" in lines[0]
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path / "installed")
    folder = tmp_path / "installed" / "transformers_emo" / "modeling_emo" / "kernels" / "native"
    assert Kernels(folder / library_name("portable"), sets[-1].flags).has_tiles is False


@pytest.mark.slow  # optimises: a minute
@WITH_GCC
def test_a_wheel_has_all_instruction_sets(build):
    wheel, printed = build(EMO_BUILD_KERNELS="all")
    sets = instruction_sets(os.uname().machine)
    assert libraries(wheel) == {library_name(each.name) for each in sets}
    (line,) = said(printed)
    assert line.endswith(", ".join(each.name for each in sets) + ".")


@WITH_GCC
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_build_that_is_stopped_leaves_no_compilers(checkout, tmp_path, number):
    compiler = tmp_path / "slow"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *-dM*) exec {GCC} "$@";; esac\n'
        f"sleep 300 & echo $! >> {tmp_path}/pids\nwait\n"
    )
    compiler.chmod(0o755)
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        tmp_path / "b",
        "--build-temp",
        tmp_path / "t",
    ]
    environment = os.environ | {"CXX": str(compiler), "EMO_BUILD_KERNELS": "all"}
    with subprocess.Popen(
        command,
        cwd=checkout,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # What a shell runs in the background ignores Ctrl-C, and so does what that starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as build:
        while not (tmp_path / "pids").exists() or not (tmp_path / "pids").read_text().strip():
            assert build.poll() is None
            time.sleep(0.05)
        build.send_signal(number)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    for _ in range(200):
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
            return
        time.sleep(0.1)
    raise AssertionError(f"{pids} still run")


def test_nothing_is_compiled_if_so_wished(build):
    wheel, printed = build(EMO_BUILD_KERNELS="0")
    assert wheel.name.endswith("-py3-none-any.whl") and not libraries(wheel) and not said(printed)


@pytest.mark.parametrize(
    ("wish", "words"), [("all", "no C++ compiler was found"), ("avx3", "avx3 cannot be compiled for")]
)
def test_a_wish_that_cannot_be_fulfilled_fails(build, tmp_path, wish, words):
    _, printed = build(fails=True, EMO_BUILD_KERNELS=wish, PATH=str(tmp_path))
    assert words in printed


@WITH_GCC
@pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang")
def test_clang_is_refused_on_linux(build):
    """Its OpenMP would be a second one beside PyTorch's."""
    wheel, printed = build(CXX="clang++")
    assert not libraries(wheel) and "is clang" in said(printed)[0]


def test_a_source_distribution_can_be_compiled(checkout, tmp_path):
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=checkout, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    sources = {
        f"modeling_emo/kernels/native/{file.name}"
        for file in (ROOT / "modeling_emo/kernels/native").glob("*.[ch]*")
    }
    assert {"setup.py", "pyproject.toml", "modeling_emo/kernels/instruction_sets.py"} | sources <= names
    # Tests need files that no distribution carries.
    assert not [name for name in names if name.startswith("tests")]
