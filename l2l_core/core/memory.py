"""How much memory this process can still use."""

from __future__ import annotations

from pathlib import Path

import psutil

CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Where a container's own limits stand."""


def available_bytes() -> int:
    """Memory that this process can still use: of the machine, or of its control group if that has less."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = int((CONTROL_GROUP / "memory.max").read_text())  # "max" means no limit
        used = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines())["anon"]
    except (OSError, ValueError, KeyError):
        return available
    return max(0, min(available, limit - int(used)))
