"""Progress bars with throughput and time left; in a log, a line a minute. Of several processes one speaks."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

LOG_INTERVAL_S = 60.0
"""Often enough to see that a long training lives, seldom enough to leave a log readable."""


def progress(items: Iterable[T], what: str, unit: str, total: int | None = None, initial: int = 0) -> Iterator[T]:
    """Iterate with a bar on stderr: `what: 40%|####  | 12/30 [00:05<00:07, 2.4unit/s]`.

    Where stderr is no terminal, the same as a line every LOG_INTERVAL_S, and nothing of what is done sooner.
    """
    if not is_first_process():
        return iter(items)
    if sys.stderr.isatty():
        return iter(tqdm(items, desc=what, unit=unit, total=total, initial=initial, mininterval=1))
    count = len(items) if total is None and isinstance(items, Sized) else total
    return _logged(items, what, unit, count, initial)


def _logged(items: Iterable[T], what: str, unit: str, total: int | None, initial: int) -> Iterator[T]:
    started = spoken = time.monotonic()
    for done, item in enumerate(items, start=initial):
        now = time.monotonic()
        if now - spoken >= LOG_INTERVAL_S:
            spoken = now
            line = tqdm.format_meter(done, total or 0, now - started, ncols=0, prefix=what, unit=unit, initial=initial)
            print(line, file=sys.stderr, flush=True)
        yield item


def is_first_process() -> bool:
    """Of the processes that torchrun or accelerate launched together, the one that speaks and writes files."""
    return os.environ.get("RANK", "0") == "0"
