"""Compiles the C++ kernels into the package: a plain shared library for each instruction set.

They are loaded by ctypes and need no header of Python or PyTorch, so one wheel of a platform serves every
version of Python. Without a compiler, or where it fails, the wheel is a pure one. Three variables of the
environment choose: `CXX` the compiler, `CXXFLAGS` and the like what else it is told, and `EMO_BUILD_KERNELS`
what is compiled: `0` nothing, `all` everything, names of instruction sets those and the portable one. What it
asks for must be possible.
"""

import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

NATIVE = Path("modeling_emo", "kernels", "native")
PACKAGE = "transformers_emo.modeling_emo.kernels.native"
RULES = runpy.run_path(str(Path("modeling_emo", "kernels", "instruction_sets.py")))
WISH = os.environ.get("EMO_BUILD_KERNELS", "").replace(",", " ").split()


def machine() -> str:
    """The processor to compile for; another than this one's in a cross build."""
    found = sysconfig.get_platform().rsplit("-", 1)[-1]
    return platform.machine() if found == "universal2" else found


def wanted_sets() -> list:
    """The instruction sets to compile for."""
    sets = RULES["instruction_sets"](machine())
    if WISH in ([], ["all"]):
        return list(sets)
    if WISH == ["0"]:
        return []
    unknown = set(WISH) - {each.name for each in sets}
    if unknown:
        raise SystemExit(
            f"EMO_BUILD_KERNELS: {', '.join(sorted(unknown))} cannot be compiled for {machine()}; expected "
            f"0, all or some of {', '.join(each.name for each in sets)}."
        )
    # The portable one, the last, is what is asked which of them the machine can run.
    return [each for each in sets if each.name in WISH or each is sets[-1]]


def find_compiler() -> list[str]:
    """The compiler's command; the error says why there is none."""
    if sys.platform not in ("linux", "darwin"):
        raise CompileError(f"they are not for {sys.platform}, only for Linux and macOS")
    chosen = shlex.split(os.environ.get("CXX", ""))
    names = chosen[:1] or ["g++", "c++", "clang++"]
    found = next(filter(shutil.which, names), None)
    if found is None:
        raise CompileError(
            f"no C++ compiler was found ({', '.join(names)}): install one (Debian: `apt install g++`), or "
            "set CXX to one"
        )
    macros = subprocess.run(
        [found, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=False
    )
    if sys.platform == "linux" and "__clang__" in macros.stdout:
        raise CompileError(
            f"{found} is clang, whose OpenMP is not the one that PyTorch brings on Linux: set CXX to g++"
        )
    return chosen or [found]


# Ends the compilers of its process group when this process ends or is killed: that closes its input.
GUARD = "import os, signal, sys; sys.stdin.read(); os.killpg(0, signal.SIGKILL)"


class BuildKernels(build_ext):
    """A library for each instruction set, instead of modules of Python."""

    def run(self) -> None:
        """Compile, and say in a line what was compiled."""
        self.stays_here = self.inplace  # the base class always builds elsewhere, and copies
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        """Without Python's version: these are no modules."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extensions(self) -> None:
        """Compile as many as can be; those that cannot be are left out of the package."""
        try:
            compiler = find_compiler()
        except CompileError as error:
            failed = {ext.name: str(error) for ext in self.extensions}
        else:
            pipe = subprocess.PIPE
            with (
                ThreadPoolExecutor(os.cpu_count() or 1) as pool,
                subprocess.Popen([sys.executable, "-c", GUARD], stdin=pipe, process_group=0) as self.guard,
            ):
                errors = list(pool.map(lambda ext: self.compile(compiler, ext), self.extensions))
            named = zip(self.extensions, errors, strict=True)
            failed = {ext.name: error for ext, error in named if error}
        if failed and WISH:
            reason = next(iter(failed.values()))
            raise CompileError(f"EMO_BUILD_KERNELS asks for what cannot be compiled: {reason}")
        if failed:
            self.say(failed)
        self.extensions = [ext for ext in self.extensions if ext.name not in failed]
        self.distribution.ext_modules = self.extensions
        if self.extensions:
            names = ", ".join(ext.set.name for ext in self.extensions)
            by = shlex.join(compiler)
            print(f"transformers-emo: kernels compiled by {by} for {machine()}: {names}.", flush=True)

    def say(self, failed: dict[str, str]) -> None:
        """One line; what fails for several fails for the first one's reason."""
        names = ", ".join(ext.set.name for ext in self.extensions if ext.name in failed)
        reason, line = next(iter(failed.values())), f"transformers-emo: no kernels compiled for {names}"
        rest = "" if len(failed) < len(self.extensions) else " Without, a CPU takes several times as long."
        print(f"{line}: {reason}.{rest}", flush=True)

    def compile(self, compiler: list[str], ext: Extension) -> str:
        """Compile a library; gives what went wrong, or nothing."""
        built, here = Path(self.get_ext_fullpath(ext.name)), NATIVE / f"{ext.name.rsplit('.')[-1]}.so"
        mark = RULES["fingerprint"](ext.set.flags).encode()
        built.parent.mkdir(parents=True, exist_ok=True)
        if self.stays_here and not self.force and here.exists() and mark in here.read_bytes():
            self.copy_file(str(here), str(built))
            return ""
        for path in (built, here) if self.stays_here else (built,):  # of earlier sources, perhaps
            path.unlink(missing_ok=True)
        temporary = Path(self.build_temp, built.name)
        temporary.parent.mkdir(parents=True, exist_ok=True)
        commands = RULES["compile_commands"](
            compiler, ext.set.flags, temporary, sources=NATIVE, system=sys.platform, environment=os.environ
        )
        for command in commands:
            group = self.guard.pid
            done = subprocess.run(command, capture_output=True, text=True, check=False, process_group=group)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
                reason = next((line for line in lines if "error" in line), lines[0])
                return f"`{shlex.join(command)}` failed: {reason}"
        shutil.copy(temporary, built)
        return ""


class BuildWheel(bdist_wheel):
    """For every version of Python; for every platform where nothing was compiled."""

    @property
    def root_is_pure(self) -> bool:
        """Known only when the libraries were compiled, which is after the options are final."""
        return not self.distribution.has_ext_modules()

    @root_is_pure.setter
    def root_is_pure(self, value: bool) -> None:
        pass

    def get_tag(self) -> tuple[str, str, str]:
        """Of the wheel's name."""
        python, abi, system = super().get_tag()
        return "py3", "none", system.replace("universal2", machine())


class Library(Extension):
    """The library of an instruction set."""

    def __init__(self, instruction_set):
        sources = [str(NATIVE / "emo_kernels.cpp")]
        name = RULES["library_name"](instruction_set.name).removesuffix(".so")
        headers = sorted(map(str, NATIVE.glob("*.h")))
        super().__init__(f"{PACKAGE}.{name}", sources, depends=headers, optional=True)
        self.set = instruction_set


setup(
    ext_modules=[Library(each) for each in wanted_sets()],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": BuildWheel},
)
