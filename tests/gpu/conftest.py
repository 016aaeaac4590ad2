"""Tests for a GPU: `make test-gpu`. Without one they are skipped; `EMO_TEST_DEVICE=cpu` runs them anyway."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from device import find_device  # noqa: E402

DEVICE, WHAT = find_device()


def pytest_collection_modifyitems(items):
    for item in items:
        if DEVICE is None and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=WHAT))


def pytest_report_header():
    return f"GPU: {WHAT}"


@pytest.fixture
def device() -> str:
    """Where the tests run."""
    assert DEVICE is not None
    return DEVICE
