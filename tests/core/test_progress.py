"""Progress lines in a log; in a terminal, tqdm draws the bar."""

import subprocess
import sys

import pytest

from l2l_core.core import progress as module
from l2l_core.core.progress import logger, progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances 25 s at each reading."""
    now = iter(range(0, 100_000, 25))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))


def test_log_gets_one_line_per_minute(clock, capsys):
    """Readings at 0 (start), 25, 50, 75 s: item 2 prints at 75 s, the first after 60 s, and item 5 at 150 s."""
    assert list(progress(range(8), "warmup", "step")) == list(range(8))
    lines = capsys.readouterr().err.splitlines()
    assert ["2/8" in lines[0], "5/8" in lines[1], len(lines)] == [True, True, 2]
    assert all(line.startswith("warmup: ") and "s/step" in line for line in lines)
    assert "01:15" in lines[0]


def test_resumed_loop_continues_the_count(clock, capsys):
    list(progress(range(4), "warmup", "step", total=100, initial=96))
    (line,) = capsys.readouterr().err.splitlines()
    assert "98/100" in line


def test_short_loop_prints_nothing(capsys):
    assert list(progress(iter("ab"), "read", "file")) == ["a", "b"]
    assert capsys.readouterr().err == ""


def test_only_rank_0_prints(clock, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    list(progress(range(8), "warmup", "step"))
    assert capsys.readouterr().err == ""


# --- messages


def test_messages_go_to_stdout_and_warnings_to_stderr(capsys):
    logger.info("device: cpu")
    logger.warning("note: torn")
    assert capsys.readouterr() == ("device: cpu\n", "note: torn\n")


def test_a_program_can_silence_messages_before_they_come():
    """Public names load their modules when they are first used, after the program has set the level."""
    code = (
        "import logging, l2l_core as l2l; logging.getLogger('l2l_core').setLevel(logging.ERROR); l2l.Predictor; "
        "from l2l_core.core.progress import logger; logger.warning('note: torn'); logger.error('broken')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "broken\n")


def test_only_the_first_process_writes_messages(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    logger.info("done before")
    assert capsys.readouterr() == ("", "")
