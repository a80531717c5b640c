"""Calls the command line in this process."""

import sys

import pytest

from l2l_core.cli import run_command
from l2l_core.errors import exit_code


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Exit code of `l2l WORDS...`."""
    monkeypatch.setattr(sys, "argv", ["l2l", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        sys.exit(exit_code(run_command))
    return int(ended.value.code or 0)
