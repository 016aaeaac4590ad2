"""The kernels compiled for the very machine (`-march=native`), to take turns with those of the package."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers_emo.modeling_emo.kernels import expert_kernels, layer_kernels
from transformers_emo.modeling_emo.kernels.instruction_sets import compile_commands
from transformers_emo.modeling_emo.kernels.native_calls import Kernels

FLAGS = ("-march=native",)


def native_kernels() -> Kernels:
    """Compile and load them, which takes half a minute; by `CXX` or g++."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "native.so")
        for command in compile_commands([os.environ.get("CXX", "g++")], FLAGS, library):
            subprocess.run(command, check=True)
        return Kernels(library)


@contextmanager
def running(kernels: Kernels) -> Iterator[None]:
    """Within it, these are the kernels that experts and layers use."""
    modules = expert_kernels, layer_kernels
    before = [module.find_kernels for module in modules]
    for module in modules:
        module.find_kernels = lambda: kernels
    try:
        yield
    finally:
        for module, found in zip(modules, before, strict=True):
            module.find_kernels = found
