"""What is for a GPU (`make test-gpu`), run once where there is none: every line of it, on small sizes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.mark.slow
def test_its_tests_pass_on_a_cpu():
    out = run("-m", "pytest", "-q", "-m", "gpu", "tests/gpu", EMO_TEST_DEVICE="cpu")
    assert " passed" in out and "failed" not in out


@pytest.mark.slow
def test_its_benchmark_gives_every_ratio_on_a_cpu():
    out = run("benchmarks/gpu.py", "--quick", "--device", "cpu")
    for part in (
        "emo / authors' loop",
        "pools / no pools",
        "compiled / plain",
        "pools of the prompt / no pools",
    ):
        assert f"time of {part}" in out


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.delenv("EMO_TEST_DEVICE", raising=False)  # a device that is named is taken without a word
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from device import find_device

    device, why = find_device()
    assert device == "cuda" or (device is None and "GPU" in why)


def test_a_pytorch_for_cpus_beside_a_gpu_is_named(monkeypatch):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import device
    import torch

    monkeypatch.delenv("EMO_TEST_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", None)
    found, why = device.find_device()
    assert found is None and "built for CPUs alone" in why and "\n" not in why
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "driver" in device.find_device()[1]
