"""The driver in C++ that runs the kernels without Python: `make test-arm` trusts it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers_emo.modeling_emo.kernels.instruction_sets import SOURCES, compile_commands
from transformers_emo.modeling_emo.kernels.native_library import find_kernels

KERNELS = find_kernels()
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None or KERNELS is None,
    reason="builds by GCC on Linux, and compiled kernels",
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    program = tmp_path_factory.mktemp("driver") / "driver"
    source = Path(__file__).with_name("native_driver.cpp")
    subprocess.run(["g++", "-O1", "-std=c++17", "-fopenmp", source, "-o", program, "-ldl"], check=True)
    return program


def test_right_kernels_pass(driver):
    done = subprocess.run([driver, KERNELS.path], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and " 0 wrong" in done.stdout, done.stdout + done.stderr


def test_wrong_kernels_fail(driver, tmp_path):
    """Picks of other tokens; an activation a thousandth off; one bias for all; an angle's other number."""
    for file, right, wrong, said in (
        ("routing.h", "token[to] = p / s.K", "token[to] = p % s.T", "experts of"),
        ("vectors.h", "x / (1.0f + exponential(-x))", "x / (1.001f + exponential(-x))", "experts of"),
        ("linear.h", "to_float(bias[from + n])", "to_float(bias[from])", "with bias"),
        ("elementwise.h", "second * sine[i]", "second * cosine[i]", "rotation"),
    ):
        folder = shutil.copytree(SOURCES, tmp_path / file / "native", ignore=shutil.ignore_patterns("*.so"))
        text = (folder / file).read_text()
        assert right in text
        (folder / file).write_text(text.replace(right, wrong))
        library = tmp_path / file / "wrong.so"
        flags = {"CXXFLAGS": "-O0"}
        for command in compile_commands(["g++"], (), library, sources=folder, environment=flags):
            subprocess.run(command, check=True)
        done = subprocess.run([driver, library], capture_output=True, text=True, check=False)
        assert done.returncode == 1 and said in done.stdout, (file, done.stdout, done.stderr)
