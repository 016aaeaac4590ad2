"""Loads the C++ kernels: the best of the package's libraries that this machine can run.

The libraries are compiled when the package is installed (`setup.py`), one for each of several instruction
sets (`instruction_sets.py`). They have a plain C interface, without headers of Python or PyTorch. Nothing is
compiled here. Without a library everything runs too, but slower. `EMO_KERNELS` chooses another instruction
set by its name, or none with `0`.

`python -m transformers_emo.modeling_emo.kernels.native_library` prints which library runs here.
"""

import os
import platform
import sys
from collections.abc import Collection, Sequence
from functools import cache

from transformers.utils import logging

from .instruction_sets import (
    NAMES,
    SOURCES,
    Feature,
    InstructionSet,
    instruction_sets,
    library_name,
)
from .native_calls import AGAIN, Kernels, KernelsError, open_library

logger = logging.get_logger(__name__)

_CHOICE = "EMO_KERNELS"
_OFF = ("0", "off", "false", "no")
_NONE = (
    "none were compiled when this package was installed. Install a C++ compiler (Debian: `apt install g++`; "
    f"macOS: `xcode-select --install`), then the package again: {AGAIN} (`-v` shows how it went)"
)


@cache
def machine_features() -> Feature:
    """What the processor and the operating system can run, as the portable library finds.

    Returns:
        `Feature`: the same for every call.

    Raises:
        KernelsError: if there is no such library, or it cannot be loaded or is not of this version.

    Example:

    ```python
    >>> from transformers_emo.modeling_emo.kernels.native_library import machine_features
    >>> features = machine_features()

    ```
    """
    sets = instruction_sets(platform.machine())
    path = SOURCES / library_name(sets[-1].name)
    if not path.exists():
        raise KernelsError(_NONE)
    return Feature(open_library(path, sets[-1].flags).emo_processor_features())


def choose_set(
    sets: Sequence[InstructionSet], features: Feature, compiled: Collection[str], wish: str = ""
) -> InstructionSet:
    """The instruction set to run.

    Args:
        sets (`Sequence[InstructionSet]`): all for machines of this kind, the best first.
        features (`Feature`): what this machine can run.
        compiled (`Collection[str]`): the names of those with a library.
        wish (`str`, *optional*): the name of the one to run.

    Returns:
        `InstructionSet`: the one named by `wish`, or else the best.

    Raises:
        KernelsError: if the one named by `wish` is unknown, not compiled, or not for this machine.

    Example:

    ```python
    >>> from transformers_emo.modeling_emo.kernels.instruction_sets import Feature, instruction_sets
    >>> from transformers_emo.modeling_emo.kernels.native_library import choose_set
    >>> sets = instruction_sets("x86_64")
    >>> choose_set(sets, Feature.AVX2, ["avx512", "avx2", "portable"]).name
    'avx2'

    ```
    """
    running = [each for each in sets if each.needs in features and each.name in compiled]
    if not running:
        raise KernelsError(_NONE)
    if not wish:
        return running[0]
    names = ", ".join(each.name for each in running)
    found = next((each for each in sets if each.name == wish), None)
    if found in running:
        return found
    if wish not in NAMES:
        reason = "is no instruction set"
        if wish in ("1", "on", "true", "yes"):
            reason = f"is no instruction set; the kernels are on without {_CHOICE}"
    elif found is None:
        reason = "is for other processors"
    elif found.needs not in features:
        missing = " and ".join(str(each.name) for each in found.needs & ~features)
        reason = f"cannot run on this machine, which lacks {missing}"
    else:
        reason = f"was not compiled when this package was installed; to compile it: {AGAIN}"
    raise KernelsError(
        f"{_CHOICE}={wish}: {wish} {reason}. Choose one that runs here: {names}; or 0 for none."
    )


def runnable_sets() -> list[str]:
    """The names of the instruction sets that have a library and that this machine can run, the best first.

    Returns:
        `list[str]`: each is a valid argument of `load_kernels` and a valid value of `EMO_KERNELS`.

    Raises:
        KernelsError: as `machine_features`.

    Example:

    ```python
    >>> from transformers_emo.modeling_emo.kernels.native_library import runnable_sets
    >>> runnable_sets()[-1]
    'portable'

    ```
    """
    features, sets = machine_features(), instruction_sets(platform.machine())
    return [each.name for each in sets if each.needs in features and each.name in _compiled()]


def _compiled() -> set[str]:
    return {name for name in NAMES if (SOURCES / library_name(name)).exists()}


@cache
def load_kernels(name: str = "") -> Kernels:
    """The kernels of an instruction set.

    Args:
        name (`str`, *optional*): the name of the instruction set; by default the best one of this machine.

    Returns:
        `Kernels`: the same object for every call.

    Raises:
        KernelsError: if the package has no library for it, the machine cannot run it, or the library is not
            of this version.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.kernels.native_library import load_kernels
    >>> load_kernels().linear(torch.ones(1, 3), torch.ones(2, 3), None)
    tensor([[3., 3.]])

    ```
    """
    features = machine_features()
    chosen = choose_set(instruction_sets(platform.machine()), features, _compiled(), name)
    if chosen.name != name:
        return load_kernels(chosen.name)
    return Kernels(SOURCES / library_name(name), chosen.flags)


@cache
def find_kernels() -> Kernels | None:
    """The kernels that run here: the best, or those that `EMO_KERNELS` names.

    Returns:
        `Kernels` or `None`: the same for every call. `None` if `EMO_KERNELS=0` switches them off, or if none
        can be used. One warning says why.

    Raises:
        KernelsError: if `EMO_KERNELS` names an instruction set that cannot be used.

    Example:

    ```python
    >>> from transformers_emo.modeling_emo.kernels.native_library import find_kernels
    >>> kernels = find_kernels()

    ```
    """
    wish = os.environ.get(_CHOICE, "").strip().lower()
    if wish in _OFF:
        return None
    try:
        return load_kernels(wish)
    except KernelsError as error:
        if wish:
            raise
        logger.warning(
            f"EMO runs without its compiled kernels, several times slower on a CPU: {error}. "
            f"`{_CHOICE}=0` switches them off, and this warning too."
        )
        return None


def _report() -> str:
    """Which library runs here, as text for people."""
    kernels = find_kernels()
    if kernels is None:
        return "No compiled kernels: experts run with PyTorch's own products."
    running = runnable_sets()
    lines = [f"Runs {kernels.path}", f"Can run here: {', '.join(running)}"]
    others = [each.name for each in instruction_sets(platform.machine()) if each.name not in running]
    return "\n".join([*lines, *([f"Cannot: {', '.join(others)}"] if others else [])])


if __name__ == "__main__":
    try:
        print(_report())
    except KernelsError as error:
        sys.exit(str(error))
