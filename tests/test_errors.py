import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from l2l_core.errors import (
    MAX_PROBLEMS_SHOWN,
    ArtifactError,
    ConfigError,
    InputError,
    L2LError,
    exit_code,
    raise_all,
    redacted,
    short_repr,
    writing,
)


def test_raises_nothing_without_problems():
    assert raise_all([]) is None


def test_single_problem_is_the_whole_message():
    with pytest.raises(InputError) as caught:
        raise_all(["pairs.jsonl: row 3: sentence is empty"])
    assert str(caught.value) == "pairs.jsonl: row 3: sentence is empty"


def test_lists_several_problems_in_order_with_their_count():
    with pytest.raises(ConfigError) as caught:
        raise_all(["first", "second", "third"], ConfigError)
    assert str(caught.value) == "3 problems:\n  first\n  second\n  third"


@pytest.mark.parametrize("more", [0, 1, 1000])
def test_truncates_and_counts_many_problems(more):
    problems = [f"row {number}" for number in range(MAX_PROBLEMS_SHOWN + more)]
    with pytest.raises(InputError) as caught:
        raise_all(problems)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{len(problems)} problems:"
    assert [line.strip() for line in lines[1 : MAX_PROBLEMS_SHOWN + 1]] == problems[:MAX_PROBLEMS_SHOWN]
    assert lines[MAX_PROBLEMS_SHOWN + 1 :] == ([f"  ... and {more} more"] if more else [])


@pytest.mark.parametrize("kind", [L2LError, ConfigError, InputError, ArtifactError])
def test_user_errors_exit_with_code_2_and_their_message(kind, capsys):
    def main() -> None:
        raise kind("params.yaml: what is wrong")

    assert exit_code(main) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: params.yaml: what is wrong\n")


def test_success_exits_with_code_0_and_prints_nothing(capsys):
    assert exit_code(lambda: None) == 0
    assert capsys.readouterr() == ("", "")


def test_program_errors_are_not_reported_as_user_errors():
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: print(1 // 0))


@pytest.mark.parametrize(("end", "code"), [("pass", 0), ("raise L2LError('no photo')", 2)])
def test_a_stage_ends_with_its_exit_code_and_all_output(end, code):
    body = f"print('half')\n  {end}"
    text = f"if True:\n from l2l_core.errors import L2LError, run_stage\n def main():\n  {body}\n run_stage(main)"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False, env=buffered)
    assert (done.returncode, done.stdout, done.stderr) == (code, "half\n", "error: no photo\n" if code else "")


# --- values in messages


@pytest.mark.parametrize(
    "value", [None, True, 3, -0.5, "a 'b'", b"x", [], {}, [1, [2, "c"]], {"a": [1.5, None]}, {"k": {}}, (1, 2)]
)
def test_shows_a_short_value_as_python_does(value):
    assert short_repr(value) == repr(value)


def test_cuts_a_long_value():
    for value in ("x" * 1000, list(range(1000)), {str(number): number for number in range(1000)}):
        assert short_repr(value) == repr(value)[:60] + "..."
    assert short_repr(10**5000) == "a number of thousands of digits"


def test_shows_a_value_of_any_nesting_in_bounded_time():
    """Python's repr of the first takes longer than the universe is old, that of the second ends in a RecursionError."""
    bomb = deep = endless = ["x"]
    for _ in range(100):
        bomb = [bomb] * 9
    for _ in range(100_000):
        deep = [deep]
    endless.append(endless)
    assert short_repr(bomb) == short_repr(deep) == "[" * 60 + "..."
    assert short_repr(endless).startswith("['x', ['x', [")


# --- secrets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://me:secret@host:8000/v1: no server", "http://***@host:8000/v1: no server"),
        ("https://token@host/a?b=c@d", "https://***@host/a?b=c@d"),
        ("http://a:p@ss@host", "http://***@host"),
        ("mail me@host, see http://host/path@2", "mail me@host, see http://host/path@2"),
        ("Bearer sk-12345678 was refused, sk-12345678", "Bearer *** was refused, ***"),
        ("hunter2hunter2 is in MY_PASSWORD", "*** is in MY_PASSWORD"),
        ("short stays", "short stays"),
        ("visible1 stays", "visible1 stays"),
    ],
)
def test_messages_hold_no_keys_and_passwords(monkeypatch, text, expected):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-12345678\n")
    monkeypatch.setenv("MY_PASSWORD", "hunter2hunter2")
    monkeypatch.setenv("A_TOKEN", "short")
    monkeypatch.setenv("NO_SECRET_AT_ALL", "visible1")
    assert redacted(text) == expected
    assert str(InputError(text)) == expected


def test_a_name_that_is_too_long_for_a_file_is_one_line(capsys):
    name = "x" * 5000
    assert exit_code(lambda: print(Path(name).is_dir())) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: 'xxx")
    assert said.endswith("expected a shorter one\n")
    assert len(said) < 300


# --- a full disk, too little memory, Ctrl-C


class LibraryError(Exception):
    """An exception type of a library, which says what happened only in its text."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        LibraryError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, capsys, error):
    def main() -> None:
        with writing(tmp_path / "model.pt"):
            raise error

    assert exit_code(main) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(
        rf"error: disk full: {tmp_path}/model\.pt cannot be written, [\d.]+ MB are free there; .*are kept: .*\n", said
    )


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this system has no device that is always full")
def test_a_really_full_disk_is_recognized(capsys):
    """Linux's /dev/full refuses every write."""

    def main() -> None:
        with writing(Path("/dev/full")):
            Path("/dev/full").write_text("x")

    assert exit_code(main) == 2
    assert capsys.readouterr().err.startswith("error: disk full: /dev/full cannot be written")


def call_with(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    "fail",
    [
        lambda: np.empty(2**60, np.uint8),
        lambda: torch.empty(2**60, dtype=torch.uint8),
        lambda: call_with(OSError(errno.ENOMEM, "Cannot allocate memory")),
        lambda: call_with(RuntimeError("can't start new thread")),
    ],
)
def test_too_little_memory_is_one_line(capsys, fail):
    assert exit_code(fail) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: out of memory: .+; .*are kept: .*\n", said)


def test_ctrl_c_is_one_line(capsys):
    def main() -> None:
        raise KeyboardInterrupt

    assert exit_code(main) == 130
    assert re.fullmatch(r"error: interrupted; .*are kept: rerun to resume\n", capsys.readouterr().err)


def test_ctrl_c_while_a_stage_imports_its_libraries_is_one_line(tmp_path):
    """The module ends before any stage has a chance to call `exit_code`."""
    code = "import stages; raise KeyboardInterrupt"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode
    assert re.fullmatch(r"error: interrupted; .*\n", done.stderr)
