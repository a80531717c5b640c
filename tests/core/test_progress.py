"""The bar in a terminal is tqdm's own; here what a log gets."""

import pytest

from l2l_core.core import progress as module
from l2l_core.core.progress import progress


@pytest.fixture
def clock(monkeypatch):
    """Twenty-five seconds between any two looks."""
    now = iter(range(0, 100_000, 25))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))


def test_a_log_gets_a_line_a_minute(clock, capsys):
    """Looks at 0 (start), 25, 50, 75 s: of item 2 at 75 s, which is the first after 60, then of item 5 at 150 s."""
    assert list(progress(range(8), "warmup", "step")) == list(range(8))
    lines = capsys.readouterr().err.splitlines()
    assert ["2/8" in lines[0], "5/8" in lines[1], len(lines)] == [True, True, 2]
    assert all(line.startswith("warmup: ") and "s/step" in line for line in lines)
    assert "01:15" in lines[0]


def test_a_resumed_loop_counts_on(clock, capsys):
    list(progress(range(4), "warmup", "step", total=100, initial=96))
    (line,) = capsys.readouterr().err.splitlines()
    assert "98/100" in line


def test_what_is_short_leaves_no_line(capsys):
    assert list(progress(iter("ab"), "read", "file")) == ["a", "b"]
    assert capsys.readouterr().err == ""


def test_one_process_speaks(clock, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    list(progress(range(8), "warmup", "step"))
    assert capsys.readouterr().err == ""
