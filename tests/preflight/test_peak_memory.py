"""Peak memory of a code block, against blocks that allocate a known number of bytes."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from l2l_core.preflight.memory import free_gpu_bytes, peak_of

MIB = 1 << 20


def hold(size_mib: int) -> None:
    held = np.ones(size_mib * MIB, dtype=np.uint8)
    time.sleep(0.2)
    del held


def test_peak_includes_memory_that_was_freed():
    with peak_of() as peak:
        hold(200)
    assert 190 * MIB < peak.ram_bytes < 300 * MIB
    assert peak.gpu_bytes is None


def test_peak_excludes_memory_allocated_before_the_block():
    held = np.ones(200 * MIB, dtype=np.uint8)
    with peak_of() as peak:
        hold(50)
    assert held[-1] == 1
    assert 45 * MIB < peak.ram_bytes < 150 * MIB


def test_reports_the_peak_after_an_error():
    def fail() -> None:
        hold(100)
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"), peak_of() as peak:
        fail()
    assert peak.ram_bytes > 90 * MIB


def test_reads_gpu_memory_reserved_since_the_block_began(monkeypatch):
    cuda, calls = torch.device("cuda"), []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: calls.append("read") or 7 * MIB)
    with peak_of(cuda) as peak:
        calls.append("work")
    assert calls == ["empty", "reset", "work", "read"]
    assert peak.gpu_bytes == 7 * MIB


def test_free_gpu_memory_includes_memory_reserved_by_this_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * MIB, 16 * MIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * MIB)
    assert free_gpu_bytes(torch.device("cuda")) == 8 * MIB
    assert free_gpu_bytes(SimpleNamespace(type="cpu")) is None
