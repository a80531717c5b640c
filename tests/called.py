"""Calls the command line as a person does, in this process."""

import sys

import pytest

from l2l_core.__main__ import main
from l2l_core.errors import exit_code


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Exit code of `python -m l2l_core WORDS...`."""
    monkeypatch.setattr(sys, "argv", ["l2l_core", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        sys.exit(exit_code(main))
    return int(ended.value.code or 0)
