"""What the machine offers that decides how fast a row was measured: cores, instructions, native bf16, GPU, PyTorch."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")
NATIVE_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""Names of PyTorch for bf16 instructions: two of x86, two of ARM."""


def capabilities() -> dict[str, object]:
    """Values for a row of bench/results.

    device: all that follows in one text, such as "cpu, 2 cores, x86_64, AVX2, no native bf16" or "NVIDIA H100, 80 GiB";
    cpu_isa: widest vector instructions that PyTorch uses; native_bf16: whether the CPU computes bf16 by itself;
    cores: that this process may use; torch: version.
    """
    isa, bf16, cores = torch.backends.cpu.get_cpu_capability(), native_bf16(), usable_cores()
    return {
        "device": gpu() or f"cpu, {cores} cores, {platform.machine()}, {isa}, {'' if bf16 else 'no '}native bf16",
        "cpu_isa": isa,
        "native_bf16": bf16,
        "cores": cores,
        "torch": torch.__version__,
    }


def native_bf16() -> bool:
    """Whether the CPU has instructions for bf16, by PyTorch's own tests of it."""
    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in NATIVE_BF16)


def gpu() -> str | None:
    """Name and memory of the first CUDA device; None without one."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return f"{found.name}, {found.total_memory / 2**30:.0f} GiB"


def usable_cores() -> int:
    """Cores that the process may use: its affinity, and no more than the quota of its control group."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota_cores()
    return allowed if quota is None else max(1, min(allowed, math.floor(quota)))


def _quota_cores() -> float | None:
    """CPU time per wall time that the control group grants (cgroup v2, then v1); None: no limit."""
    try:
        if (version_2 := CGROUP / "cpu.max").exists():
            quota, period = version_2.read_text(encoding="ascii").split()
        else:
            quota, period = (
                (CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip()
                for name in ("quota", "period")
            )
    except OSError:
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)
