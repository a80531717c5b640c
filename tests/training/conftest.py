"""Fixtures shared by the training tests."""

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Reset the process-wide precision of accelerate, so that every test can choose its own."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
