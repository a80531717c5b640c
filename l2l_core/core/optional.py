"""Hides installed packages that another package would import on sight."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hide_packages(*packages: str) -> Iterator[None]:
    """Within the block, the packages that are not loaded yet appear as not installed.

    A module imported in the block may remember this permanently, so hide only packages that it never needs.
    """
    missing = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(missing))  # type: ignore[arg-type]  # None: the import system treats it as missing
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]
