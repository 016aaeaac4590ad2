"""The device that the GPU's tests and benchmark run on, and the few calls that a GPU has and a CPU has not.

It needs no package.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def find_device() -> tuple[str | None, str]:
    """The device to test, and in one line what it is, or why there is none.

    `EMO_TEST_DEVICE` names another than the GPU, so that all of it can be run once without one.
    """
    named = os.environ.get("EMO_TEST_DEVICE")
    if named:
        return named, f"EMO_TEST_DEVICE={named}"
    if torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_name()
    if shutil.which("nvidia-smi") is None and shutil.which("rocm-smi") is None:
        return None, "no GPU here"
    built_for = torch.version.cuda or torch.version.hip
    if built_for is None:
        return None, (
            f"this machine has a GPU, but PyTorch {torch.__version__} is built for CPUs alone: install "
            "the build for your GPU (https://pytorch.org/get-started) into this environment, or give "
            "another as VENV="
        )
    return None, (
        f"this machine has a GPU, but PyTorch {torch.__version__}, built for {built_for}, cannot use it: is "
        "the driver as new as that, and CUDA_VISIBLE_DEVICES unset?"
    )


def is_cuda(device: str) -> bool:
    """Whether the calls below have something to ask."""
    return torch.device(device).type == "cuda"


def forget_peak(device: str) -> None:
    """Begin to look for the largest memory anew."""
    if is_cuda(device):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes_on(device: str) -> int | None:
    """The most memory of the device that tensors had at once; `None` on a CPU, where `processes` knows."""
    return torch.cuda.max_memory_allocated() if is_cuda(device) else None


@contextmanager
def no_waits(device: str) -> Iterator[None]:
    """Whatever makes the host wait for the GPU is an error inside."""
    if not is_cuda(device):
        yield
        return
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def milliseconds(call: Callable[[], object], device: str) -> float:
    """How long a call takes, by the GPU's own clock where there is one."""
    if not is_cuda(device):
        begin = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begin)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
