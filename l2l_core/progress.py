"""Progress bars with throughput and time left; silent where stderr is not a terminal, and in all processes but one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], what: str, unit: str, total: int | None = None, initial: int = 0) -> Iterator[T]:
    """Iterate with a bar on stderr: `what: 40%|####  | 12/30 [00:05<00:07, 2.4unit/s]`."""
    silent = not (sys.stderr.isatty() and is_first_process())
    return iter(tqdm(items, desc=what, unit=unit, total=total, initial=initial, disable=silent, mininterval=1))


def is_first_process() -> bool:
    """Of the processes that torchrun or accelerate launched together, the one that speaks and writes files."""
    return os.environ.get("RANK", "0") == "0"
