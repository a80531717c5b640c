"""Peak memory of a block of work: of this process, and of a GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

POLL_S = 0.005
"""Sampling interval; shorter peaks can be missed."""


@dataclass
class Peak:
    """Set when the block ends."""

    ram_bytes: int = 0  # above the process's memory before the block
    gpu_bytes: int | None = None  # all that PyTorch reserved for this process; None: no GPU


@contextmanager
def peak_of(device: torch.device | None = None) -> Iterator[Peak]:
    """Monitor the memory of the block. device: where it computes; None: on the CPU."""
    process, peak, done = psutil.Process(), Peak(), threading.Event()
    before = process.memory_info().rss

    def look() -> None:
        peak.ram_bytes = max(peak.ram_bytes, process.memory_info().rss - before)

    def watch() -> None:
        while not done.wait(POLL_S):
            look()

    on_gpu = device is not None and device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        look()
        if on_gpu:
            peak.gpu_bytes = torch.cuda.max_memory_reserved(device)


def free_gpu_bytes(device: torch.device) -> int | None:
    """GPU memory that is free for this process, including what it already holds; None: no GPU."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.mem_get_info(device)[0]) + int(torch.cuda.memory_reserved(device))
