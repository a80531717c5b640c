"""Packages that another package loads wherever it finds them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """While the block runs, packages that are not loaded yet count as not installed.

    What is imported in the block and remembers that they are missing does so for good: hide only what it never needs.
    """
    missing = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(missing))  # type: ignore[arg-type]  # None: the import system's "there is none"
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]
