"""Which library of compiled kernels runs, and what is said where none does."""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from itertools import chain, combinations, product
from pathlib import Path

import pytest
import torch
from transformers_emo import EmoForCausalLM
from transformers_emo.modeling_emo.kernels import native_calls, native_library
from transformers_emo.modeling_emo.kernels.instruction_sets import (
    NAMES,
    SOURCES,
    Feature,
    instruction_sets,
    library_name,
)
from transformers_emo.modeling_emo.kernels.native_library import (
    KernelsError,
    choose_set,
    find_kernels,
    load_kernels,
)

ROOT = Path(__file__).parents[3]
CACHED = find_kernels, load_kernels, native_library.machine_features
WITH_LIBRARIES = pytest.mark.skipif(find_kernels() is None, reason="no compiled kernels")


@pytest.fixture
def fresh():
    """As in a process that has not asked for kernels yet."""
    for function in CACHED:
        function.cache_clear()
    yield
    for function in CACHED:
        function.cache_clear()


@pytest.fixture
def package(fresh, tmp_path, monkeypatch):
    """A folder of the sources and libraries, to be changed."""
    folder = shutil.copytree(SOURCES, tmp_path / "native")
    monkeypatch.setattr(native_library, "SOURCES", folder)
    return folder


@pytest.fixture
def warnings(monkeypatch):
    """What is said."""
    said: list[str] = []
    monkeypatch.setattr(native_library.logger, "warning", said.append)
    return said


def every_case(machine):
    """Every set of features with every set of libraries."""
    sets = instruction_sets(machine)
    names = [each.name for each in sets]
    features = [Feature(bits) for bits in range(1 << len(Feature))]
    libraries = chain.from_iterable(combinations(names, count) for count in range(len(names) + 1))
    return product([sets], features, libraries)


@pytest.mark.parametrize("machine", ["x86_64", "AMD64", "aarch64", "arm64", "ppc64le"])
def test_the_best_that_is_there_and_can_run_is_chosen(machine):
    for sets, features, compiled in every_case(machine):
        can = [each for each in sets if each.name in compiled and not each.needs & ~features]
        if can:
            assert choose_set(sets, features, compiled) == can[0]
        else:
            with pytest.raises(KernelsError, match="none were compiled"):
                choose_set(sets, features, compiled)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_a_named_set_is_chosen_or_refused(machine):
    for sets, features, compiled in every_case(machine):
        if sets[-1].name not in compiled:
            continue
        for name in NAMES:
            here = next((each for each in sets if each.name == name), None)
            if here is None:
                expected = "for other processors"
            elif here.needs & ~features:
                expected = "cannot run on this machine, which lacks"
            elif name not in compiled:
                expected = "was not compiled"
            else:
                assert choose_set(sets, features, compiled, name) == here
                continue
            with pytest.raises(KernelsError, match=f"^EMO_KERNELS={name}: {name} .*{expected}"):
                choose_set(sets, features, compiled, name)


def test_what_a_machine_lacks_is_named():
    sets = instruction_sets("x86_64")
    with pytest.raises(
        KernelsError, match="lacks AVX512 and BF16 and AMX. Choose one that runs here: avx2, portable;"
    ):
        choose_set(sets, Feature.AVX2, NAMES, "amx")


def test_later_sets_need_less():
    """So the best that can run is the first."""
    sets = instruction_sets("x86_64")
    assert all(after.needs in before.needs for before, after in zip(sets, sets[1:], strict=False))
    assert not sets[-1].needs


@WITH_LIBRARIES
@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="Linux's list of an x86-64"
)
def test_the_processor_is_what_linux_says_it_is():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).split(":")[1].split())
    needed = [
        {"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"},
        {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
        {"avx512_bf16"},
        {"amx_bf16", "amx_tile"},
    ]
    expected = Feature(0)
    for feature, names in zip(Feature, needed, strict=True):
        if not names <= flags:
            break
        expected |= feature
    # Linux lists tiles also where it refuses them to a process.
    assert native_library.machine_features() | Feature.AMX == expected | Feature.AMX
    assert native_library.machine_features() in expected


@WITH_LIBRARIES
class TestTheVariable:
    def test_names_an_instruction_set(self, fresh, monkeypatch):
        for name in native_library.runnable_sets():
            monkeypatch.setenv("EMO_KERNELS", name.upper())
            find_kernels.cache_clear()
            assert find_kernels().path.name == library_name(name)

    def test_may_not_name_what_there_is_not(self, fresh, monkeypatch):
        monkeypatch.setenv("EMO_KERNELS", "avx3")
        model = EmoForCausalLM.from_pretrained(ROOT / "model_cards" / "toy-emo")
        for _ in range(2):  # not once only
            with pytest.raises(
                KernelsError, match="EMO_KERNELS=avx3: avx3 is no instruction set. Choose one"
            ):
                model(torch.tensor([[5, 6]]))

    @pytest.mark.parametrize("off", ["0", "off", "False", " no "])
    def test_switches_them_off(self, fresh, monkeypatch, warnings, off):
        monkeypatch.setenv("EMO_KERNELS", off)
        monkeypatch.setattr(native_library, "Kernels", lambda *_: pytest.fail("loaded"))
        assert find_kernels() is None and not warnings

    def test_is_reported_with_what_else_runs(self, fresh, monkeypatch):
        running = native_library.runnable_sets()
        monkeypatch.setenv("EMO_KERNELS", running[-1])
        first, second, *_ = native_library._report().splitlines()
        assert first.endswith(library_name(running[-1])) and second.endswith(", ".join(running))

    def test_is_refused_by_the_command_in_a_line(self):
        command = [sys.executable, "-m", "transformers_emo.modeling_emo.kernels.native_library"]
        environment = os.environ | {"EMO_KERNELS": "avx3"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 1 and run.stderr.splitlines()[-1].startswith("EMO_KERNELS=avx3")


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch's files have other names elsewhere")
def test_openmp_is_the_one_that_pytorch_brings(monkeypatch):
    """Also where PyTorch does not show its own to all: a hash in its name, or not among the dependencies."""

    class Loader:
        RTLD_GLOBAL, opened = ctypes.RTLD_GLOBAL, []

        def CDLL(self, name, mode=0):  # noqa: N802
            if name is not None:
                self.opened.append((name, mode))
            return object()

    monkeypatch.setattr(native_calls, "ctypes", Loader())
    native_calls._show_openmp.__wrapped__()
    own = sorted(Path(torch.__file__).parent.glob("lib/libgomp*"))
    expected = str(own[0]) if own else "libgomp.so.1"
    assert Loader.opened == [(expected, ctypes.RTLD_GLOBAL)]


class TestLibrariesThatCannotBeUsed:
    """One warning, and PyTorch's products run; an error if `EMO_KERNELS` asked for them."""

    @pytest.fixture(autouse=True)
    def best(self, monkeypatch):
        monkeypatch.delenv("EMO_KERNELS", raising=False)

    def assert_runs_without(self, warnings, *words):
        model = EmoForCausalLM.from_pretrained(ROOT / "model_cards" / "toy-emo")
        ids = torch.tensor([[5, 6, 7]])
        output = model(ids, labels=ids)
        output.loss.backward()
        assert len(warnings) == 1 and all(word in warnings[0] for word in words), warnings
        model.set_experts_implementation("eager")
        torch.testing.assert_close(output.logits, model(ids).logits, atol=1e-4, rtol=1e-4)

    def test_none_were_compiled(self, package, warnings):
        for file in package.glob("*.so"):
            file.unlink()
        self.assert_runs_without(warnings, "apt install g++", "pip install", "EMO_KERNELS=0")

    @WITH_LIBRARIES
    def test_sources_have_changed_since(self, package, warnings, monkeypatch):
        (package / "routing.h").write_text((package / "routing.h").read_text() + "\n")
        remedy = "`pip install -e .` in a checkout"
        self.assert_runs_without(warnings, "was not compiled from the sources beside it", remedy)
        find_kernels.cache_clear()
        monkeypatch.setenv("EMO_KERNELS", "portable")
        with pytest.raises(KernelsError, match="was not compiled from the sources beside it"):
            find_kernels()

    @WITH_LIBRARIES
    def test_one_bears_the_name_of_another(self, package, warnings):
        """It would be run by machines that cannot."""
        running = native_library.runnable_sets()
        # As on ARM: there is no other library whose name this one could bear.
        if len(running) == 1:
            pytest.skip("one instruction set alone")
        chosen = library_name(running[0])
        (package / chosen).unlink()
        shutil.copy(package / library_name(running[-1]), package / chosen)
        self.assert_runs_without(warnings, chosen, "was not compiled from the sources beside it")

    @WITH_LIBRARIES
    def test_one_is_no_library(self, package, warnings):
        for file in package.glob("*.so"):
            file.unlink()
            file.write_text("not a library")
        self.assert_runs_without(warnings, "cannot be loaded", "compile it anew")
