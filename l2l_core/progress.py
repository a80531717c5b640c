"""Progress bars with throughput and time left; silent where stderr is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], what: str, unit: str, total: int | None = None, initial: int = 0) -> Iterator[T]:
    """Iterate with a bar on stderr: `what: 40%|####  | 12/30 [00:05<00:07, 2.4unit/s]`."""
    return iter(
        tqdm(items, desc=what, unit=unit, total=total, initial=initial, disable=not sys.stderr.isatty(), mininterval=1)
    )
