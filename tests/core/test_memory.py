"""Available memory of the machine and of a container."""

from __future__ import annotations

from types import SimpleNamespace

import psutil

from l2l_core.core import memory

GIB = 1 << 30


def test_available_memory_respects_the_control_group_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5 * GIB))
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    assert memory.available_bytes() == 5 * GIB
    (tmp_path / "memory.stat").write_text(f"anon {GIB}\nfile {3 * GIB}\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes() == 5 * GIB
    (tmp_path / "memory.max").write_text(f"{4 * GIB}\n")
    assert memory.available_bytes() == 3 * GIB
