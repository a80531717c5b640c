"""Memory available to this process."""

from __future__ import annotations

from pathlib import Path

import psutil

CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Folder with the limits of the container."""


def available_bytes() -> int:
    """Bytes of memory that this process can still use: the lesser of the machine's and its control group's."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = int((CONTROL_GROUP / "memory.max").read_text())  # "max" means no limit
        used = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines())["anon"]
    except (OSError, ValueError, KeyError):
        return available
    return max(0, min(available, limit - int(used)))
