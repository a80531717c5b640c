"""Files for a person: all of them or none, and nobody else's file is touched."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from l2l_core.errors import InputError


def end_on_sigterm() -> None:
    """Let SIGTERM end this process by an exception, so that nothing half-written stays; with the shell's exit code."""

    def end(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the cleanup
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)


@contextmanager
def added_to(folder: Path) -> Iterator[Path]:
    """A folder to fill; its files move into `folder` when the block ends well, in the order of their names.

    They replace files of the same name; when the block fails, `folder` stays as it was. Raises InputError where it
    cannot be a folder.
    """
    folder = folder.resolve()
    building = folder.with_name(f".{folder.name}.{os.getpid()}.building")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out: {folder} is a file, expected a folder")
    try:
        building.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"--out: {folder} cannot be written: {error.strerror}; name another folder") from None
    try:
        yield building
        folder.mkdir(exist_ok=True)
        for file in sorted(building.iterdir()):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(building, ignore_errors=True)
