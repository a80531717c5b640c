"""Fixtures shared by the training tests."""

import pytest
from accelerate.state import AcceleratorState
from toy_pairs import toy_pairs

from l2l_core.data.pairs import Pairs, Targets


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Reset the process-wide precision of accelerate, so that every test can choose its own."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def toy(tmp_path) -> tuple[Pairs, Targets]:
    """Five images with one sentence each, and their true masks."""
    return toy_pairs(tmp_path / "images", 5)
