"""emo-tiny, opened once for the tests that leave it as it is."""

import pytest
from conftest import TOY
from transformers_emo.analysis.trying import Session

EMO_TINY = TOY.parent / "emo-tiny"


@pytest.fixture(scope="session")
def whole():
    """A session with all experts. Tests that exchange them put them back."""
    return Session.open(EMO_TINY)


@pytest.fixture
def session(whole):
    yield whole
    if whole.domain is not None:
        whole.switch(None)
