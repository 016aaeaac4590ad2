"""Knows upstream's marks, and lets no test slip away as skipped."""

import pytest
import torch
from transformers.testing_utils import torch_device

collect_ignore = ["upstream"]

_UPSTREAM_MARKS = [
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "is_expert_parallel_test",
    "is_fsdp_test",
    "is_tensor_parallel_test",
    "is_training_test",
    "torch_compile_test",
]


def pytest_configure(config):
    for mark in _UPSTREAM_MARKS:
        config.addinivalue_line("markers", f"{mark}: a mark of Transformers' own tests")


@pytest.fixture(autouse=True)
def one_thread():
    """The models are tiny: more threads gain nothing, and on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Turn a skip, of a test or of a subtest, into a failure where the test case says that it must pass."""
    report = yield
    # On a GPU upstream skips its tensor-parallel tests, and runs others.
    if torch_device == "cpu" and report.skipped and item.name in getattr(item.cls, "must_pass", ()):
        report.outcome = "failed"
        report.longrepr = (
            f"{item.name} must pass, as it does for OLMoE, but was skipped: {call.excinfo.value}"
        )
    return report
