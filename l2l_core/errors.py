"""Errors that a user can fix, and the functions that turn them into one line and an exit code.

L2LError            any error that the user can fix; its text is the whole message
├── ConfigError     a parameter is unknown, has the wrong type or is out of range
├── InputError      a data file, an image, a mask or a sentence is unusable
└── ArtifactError   an artifact of an earlier stage is missing or comes from another version
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NoReturn

MAX_PROBLEMS_SHOWN = 50
SHOWN_CHARACTERS = 60
"""Most characters of a wrong value in a message: a polygon would fill the screen."""

INTERRUPTED = 130
"""The shell's exit code after Ctrl-C."""
DOCTOR = "dvc repro restores it; l2l doctor names all torn files"
"""What to do about an artifact that is torn or of another form."""
SAFE = "finished stages, stored responses and the last checkpoint are kept"

_SECRET_NAME = re.compile(r"(?:API_?KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)
_SECRET_LENGTH = 8  # shorter values could be ordinary words
_URL_USER = re.compile(r"(?<=://)[^/\s?#]+@")
_DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded")
"""How libraries report a full disk if they drop its error number."""
_NO_MEMORY = re.compile(
    r"out of memory|can(?:no|')t allocate memory|Insufficient memory|bad_alloc|failed to map segment|start new thread",
    re.IGNORECASE,
)


class L2LError(Exception):
    """Base of all errors that the input causes. The command line prints the text, without secrets, and exits with 2."""

    def __init__(self, message: str = "") -> None:
        super().__init__(redacted(message))


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


def redacted(text: str) -> str:
    """A text without the keys and passwords of environment variables and without `user:password@` in URLs.

    >>> redacted("http://me:secret@host/v1: no server")
    'http://***@host/v1: no server'
    """
    for name, value in os.environ.items():
        if len(secret := value.strip()) >= _SECRET_LENGTH and _SECRET_NAME.search(name):
            text = text.replace(secret, "***")
    return _URL_USER.sub("***@", text)


def short_repr(value: object) -> str:
    """`repr` of plain data for a message: at most SHOWN_CHARACTERS and in bounded time, however it is nested.

    >>> short_repr({"size": [480, 640]})
    "{'size': [480, 640]}"
    """
    text = ""
    for piece in _pieces(value):
        text += piece
        if len(text) > SHOWN_CHARACTERS:
            return f"{text[:SHOWN_CHARACTERS]}..."
    return text


def _pieces(value: object) -> Iterator[str]:
    """The `repr` of a value piece by piece, so that what is not shown is never computed."""
    match value:
        case str() | bytes():
            yield repr(value[: SHOWN_CHARACTERS + 1])
        case list():
            yield "["
            for number, item in enumerate(value):
                yield ", " * (number > 0)
                yield from _pieces(item)
            yield "]"
        case dict():
            yield "{"
            for number, (key, item) in enumerate(value.items()):
                yield ", " * (number > 0)
                yield from _pieces(key)
                yield ": "
                yield from _pieces(item)
            yield "}"
        case _:
            try:
                yield repr(value)
            except ValueError:  # Python refuses to print integers of more than some thousand digits
                yield "a number of thousands of digits"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Add the file's path to a disk-full error: libraries omit it, and each has its own words."""
    try:
        yield
    except Exception as error:
        if _is_disk_full(error) and not getattr(error, "filename", None):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def exit_code(main: Callable[[], None]) -> int:
    """Run a command line and return 0 on success.

    An L2LError, a name that is too long for a file, a full disk and a lack of memory become one line `error: ...` on
    stderr and exit code 2, Ctrl-C one line and 130. Other exceptions are faults of the program and pass.
    """
    try:
        main()
    except (KeyboardInterrupt, Exception) as error:
        message = explain(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 2
    return 0


def run_stage(main: Callable[[], None]) -> NoReturn:
    """Run a stage as this process's only task and end with its exit code.

    This skips the interpreter's shutdown, which takes up to two seconds with PyTorch.
    """

    def main_and_flush() -> None:
        try:
            main()
        finally:
            sys.stdout.flush()  # it may be a file on a full disk

    code = exit_code(main_and_flush)
    sys.stderr.flush()
    os._exit(code)


def explain_early_errors() -> None:
    """Print one line if the program fails while it imports its libraries, before its `exit_code`."""

    def say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        message = explain(error)
        if message is None:
            sys.__excepthook__(kind, error, trace)
        else:
            print(f"error: {message}", file=sys.stderr)

    sys.excepthook = say


def explain(error: BaseException) -> str | None:
    """The whole message of an error that the user can fix; None for any other."""
    if isinstance(error, L2LError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted; {SAFE}: rerun to resume"
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return redacted(f"{short_repr(error.filename)}: got a name that is too long for a file, expected a shorter one")
    if _is_disk_full(error):
        place = Path(getattr(error, "filename", None) or ".")
        folder = next(folder for folder in (place, *place.absolute().parents) if folder.is_dir())
        free = shutil.disk_usage(folder).free / 1e6
        return redacted(
            f"disk full: {place.absolute()} cannot be written, {free:.1f} MB are free there; {SAFE}: make room "
            "(l2l check says how much a run needs) and rerun"
        )
    if _is_out_of_memory(error):
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return redacted(
            f"out of memory: {reason}; {SAFE}: free memory or lower a parameter that l2l check names, and rerun"
        )
    return None


def _is_disk_full(error: BaseException) -> bool:
    """Also if the error was raised while a full disk was handled: PyTorch then reports a wrong position in its file."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _DISK_FULL.search(str(error)):
        return True
    before = error.__cause__ or error.__context__
    return before is not None and _is_disk_full(before)


def _is_out_of_memory(error: BaseException) -> bool:
    is_named = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    return is_named or bool(_NO_MEMORY.search(str(error)))
