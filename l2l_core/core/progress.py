"""Messages of a run, and progress bars with throughput and time left, or one line per minute in a log.

Messages go through the logger `l2l_core`, so that a program can silence or redirect them. Bars go to stderr. Only rank
0 writes.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

logger = logging.getLogger("l2l_core")


class _Console(logging.Handler):
    """Writes messages as plain lines: information to stdout, warnings to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        if not is_first_process():
            return
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        print(self.format(record), file=stream, flush=True)


if not logger.handlers:  # a program may have set up the logger before
    logger.addHandler(_Console())
    logger.propagate = False
if logger.level == logging.NOTSET:
    logger.setLevel(logging.INFO)

LOG_INTERVAL_S = 60.0
"""Short enough to show that a long training run is alive, long enough to keep a log readable."""


def progress(items: Iterable[T], what: str, unit: str, total: int | None = None, initial: int = 0) -> Iterator[T]:
    """Iterate with a bar on stderr: `what: 40%|####  | 12/30 [00:05<00:07, 2.4unit/s]`.

    If stderr is not a terminal, print a line every LOG_INTERVAL_S instead, and none for shorter work.
    """
    if not is_first_process():
        return iter(items)
    if sys.stderr.isatty():
        return iter(tqdm(items, desc=what, unit=unit, total=total, initial=initial, mininterval=1))
    count = len(items) if total is None and isinstance(items, Sized) else total
    return _logged(items, what, unit, count, initial)


def _logged(items: Iterable[T], what: str, unit: str, total: int | None, initial: int) -> Iterator[T]:
    lines = _Lines(what, unit, total, initial)
    for item in items:
        lines.show()
        yield item
        lines.done += 1


@contextmanager
def progress_counter(what: str, unit: str, total: int, initial: int = 0) -> Iterator[Callable[[int], object]]:
    """The bar or lines of `progress` for items that finish in any order: yields a function that adds finished ones."""
    if not is_first_process():
        yield lambda count: None
    elif sys.stderr.isatty():
        with tqdm(desc=what, unit=unit, total=total, initial=initial, mininterval=1) as bar:
            yield bar.update
    else:
        yield _Lines(what, unit, total, initial).add


class _Lines:
    """A line of progress, at most one every LOG_INTERVAL_S."""

    def __init__(self, what: str, unit: str, total: int | None, initial: int) -> None:
        self._what, self._unit, self._total, self._initial = what, unit, total or 0, initial
        self.done, self._started = initial, time.monotonic()
        self._spoken = self._started

    def add(self, count: int) -> None:
        self.done += count
        self.show()

    def show(self) -> None:
        now = time.monotonic()
        if now - self._spoken < LOG_INTERVAL_S:
            return
        self._spoken = now
        seconds, initial = now - self._started, self._initial
        line = tqdm.format_meter(
            self.done, self._total, seconds, ncols=0, prefix=self._what, unit=self._unit, initial=initial
        )
        print(line, file=sys.stderr, flush=True)


def is_first_process() -> bool:
    """Whether this process has rank 0 under torchrun or accelerate; only rank 0 prints and writes files."""
    return os.environ.get("RANK", "0") == "0"
