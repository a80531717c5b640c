"""What the tests of training share."""

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Precision is state of the whole process in accelerate; every test chooses its own."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
