"""Errors that a user can fix, and the functions that turn them into exit code 2.

L2LError            any error that the user can fix; its text is the whole message
├── ConfigError     a parameter is unknown, has the wrong type or is out of range
├── InputError      a data file, an image, a mask or a sentence is unusable
└── ArtifactError   an artifact of an earlier stage is missing or comes from another version
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

MAX_PROBLEMS_SHOWN = 50


class L2LError(Exception):
    """Base of all errors that the input causes. The command line prints the text and exits with 2."""


class ConfigError(L2LError):
    """A parameter is unknown, has the wrong type or is out of range."""


class InputError(L2LError):
    """A data file, an image, a mask or a sentence is unusable."""


class ArtifactError(L2LError):
    """An artifact that a stage needs is missing or malformed."""


def raise_all(problems: Sequence[str], kind: type[L2LError] = InputError) -> None:
    """Raise one error that lists every problem, one per line. Do nothing if there is no problem."""
    if not problems:
        return
    if len(problems) == 1:
        raise kind(problems[0])
    shown = "\n".join(f"  {problem}" for problem in problems[:MAX_PROBLEMS_SHOWN])
    rest = len(problems) - MAX_PROBLEMS_SHOWN
    raise kind(f"{len(problems)} problems:\n{shown}" + (f"\n  ... and {rest} more" if rest > 0 else ""))


def exit_code(main: Callable[[], None]) -> int:
    """Run a command line; print an L2LError to stderr as `error: ...` and return 2. Return 0 on success."""
    try:
        main()
    except L2LError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run_stage(main: Callable[[], None]) -> NoReturn:
    """Run a stage as this process's only task and end with its exit code.

    Python would first take all modules apart, which takes up to two seconds with PyTorch.
    """
    code = exit_code(main)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
