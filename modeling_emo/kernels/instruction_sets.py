"""The instruction sets for which the C++ kernels are compiled, one library each, and how to compile them.

`setup.py` runs this file too, so it imports nothing that must be installed first.
"""

import enum
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).parent / "native"
_FLAGS = ("-O3", "-std=c++17", "-ffp-contract=fast", "-fPIC", "-pthread", "-g0", "-w")


class Feature(enum.IntFlag):
    """What a processor and its operating system can run, numbered as in `native/processor.h`.

    Example:

    ```python
    >>> from transformers_emo.modeling_emo.kernels.instruction_sets import Feature
    >>> Feature.AVX2 in Feature(3)
    True

    ```
    """

    AVX2 = 1  # and the rest of x86-64-v3
    AVX512 = 2  # and the rest of x86-64-v4
    BF16 = 4  # AVX-512's products of bfloat16, and of bytes: VNNI, which a processor with these has
    AMX = 8  # tiles of bfloat16; Linux allows them to a process that asks


class InstructionSet(NamedTuple):
    """An instruction set, and how its library is compiled.

    Attributes:
        name (`str`): part of the library's file name, and a value of `EMO_KERNELS`.
        flags (`tuple[str, ...]`): the compiler's flags for it.
        needs (`Feature`): the features that a machine must have to run it.

    Example: see `instruction_sets`.
    """

    name: str
    flags: tuple[str, ...]
    needs: Feature


# This is the fastest of GCC's tunings on an AMD EPYC too. In places it takes a quarter less time than
# `-march=native`.
_TUNED = "-mtune=icelake-server"
_PRODUCTS = ("-mavx512bf16", "-mavx512vnni")
_V4 = Feature.AVX2 | Feature.AVX512
_PORTABLE = InstructionSet("portable", (), Feature(0))
_X86 = (
    InstructionSet(
        "amx",
        ("-march=x86-64-v4", *_PRODUCTS, "-mamx-tile", "-mamx-bf16", "-mtune=sapphirerapids"),
        _V4 | Feature.BF16 | Feature.AMX,
    ),
    InstructionSet("avx512_bf16", ("-march=x86-64-v4", *_PRODUCTS, _TUNED), _V4 | Feature.BF16),
    InstructionSet("avx512", ("-march=x86-64-v4", _TUNED), _V4),
    InstructionSet("avx2", ("-march=x86-64-v3", _TUNED), Feature.AVX2),
    _PORTABLE,
)
NAMES = tuple(each.name for each in _X86)


def instruction_sets(machine: str) -> tuple[InstructionSet, ...]:
    """The instruction sets of a kind of machine, the best first. The last one runs on all of its kind.

    Args:
        machine (`str`): as `platform.machine()` names it.

    Returns:
        `tuple[InstructionSet, ...]`: several for x86-64. For other processors one, the compiler's default.

    Example:

    ```python
    >>> from transformers_emo.modeling_emo.kernels.instruction_sets import instruction_sets
    >>> [each.name for each in instruction_sets("x86_64")]
    ['amx', 'avx512_bf16', 'avx512', 'avx2', 'portable']
    >>> [each.name for each in instruction_sets("aarch64")]
    ['portable']

    ```
    """
    return _X86 if machine.lower() in ("x86_64", "amd64") else (_PORTABLE,)


def library_name(name: str) -> str:
    """The file of an instruction set's library, in the folder of the sources.

    Example:

    ```python
    >>> from transformers_emo.modeling_emo.kernels.instruction_sets import library_name
    >>> library_name("avx2")
    'emo_kernels_avx2.so'

    ```
    """
    return f"emo_kernels_{name}.so"


def fingerprint(flags: Sequence[str], sources: Path = SOURCES) -> str:
    """A hash of the sources and flags of a library. It is built into the library, and shows its version.

    Args:
        flags (`Sequence[str]`): an instruction set's.
        sources (`Path`, *optional*): the folder of the sources.

    Returns:
        `str`: 32 hexadecimal digits.

    Example:

    ```python
    >>> from transformers_emo.modeling_emo.kernels.instruction_sets import fingerprint
    >>> len(fingerprint(["-march=x86-64-v3"]))
    32

    ```
    """
    files = sorted([*sources.glob("*.cpp"), *sources.glob("*.h")])
    parts = [*(f"{file.name}\n{file.read_text(encoding='utf-8')}" for file in files), *_FLAGS, *flags]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def compile_commands(
    compiler: Sequence[str],
    flags: Sequence[str],
    library: Path,
    *,
    sources: Path = SOURCES,
    system: str = "linux",
    environment: Mapping[str, str] | None = None,
) -> list[list[str]]:
    """The two commands that compile one library.

    The library uses OpenMP but does not link it. The process that loads it has PyTorch's OpenMP already. A
    second one would bring a second pool of threads.

    Args:
        compiler (`Sequence[str]`): a C++ compiler's command: GCC's, or on macOS clang's.
        flags (`Sequence[str]`): an instruction set's.
        library (`Path`): the file to write; an object file stays beside it.
        sources (`Path`, *optional*): the folder of the sources.
        system (`str`, defaults to `"linux"`): as `sys.platform` names it.
        environment (`Mapping[str, str]`, *optional*): environment variables. `CPPFLAGS`, `CXXFLAGS`,
            `LDFLAGS` and, on macOS, `ARCHFLAGS` are added, as is usual.

    Returns:
        `list[list[str]]`: to be run in this order.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from transformers_emo.modeling_emo.kernels.instruction_sets import compile_commands
    >>> compile, link = compile_commands(["g++"], ["-mavx2"], Path("x.so"))
    >>> link
    ['g++', '-shared', '-pthread', 'x.o', '-o', 'x.so']

    ```
    """

    def given(*names: str) -> list[str]:
        return [word for name in names for word in shlex.split((environment or {}).get(name, ""))]

    is_macos = system == "darwin"
    architecture = given("ARCHFLAGS") if is_macos else []
    openmp = ["-Xpreprocessor", "-fopenmp"] if is_macos else ["-fopenmp"]
    built_in = f'-DEMO_FINGERPRINT="{fingerprint(flags, sources)}"'
    source, object_file = str(sources / "emo_kernels.cpp"), str(library.with_suffix(".o"))
    found_later = ["-undefined", "dynamic_lookup"] if is_macos else []
    return [
        [*compiler, *architecture, *_FLAGS, *given("CPPFLAGS", "CXXFLAGS"), *openmp, *flags, built_in]
        + ["-c", source, "-o", object_file],
        [*compiler, *architecture, "-shared", "-pthread", object_file, "-o", str(library)]
        + [*found_later, *given("LDFLAGS")],
    ]
