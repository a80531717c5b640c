"""What the machine offers that decides how fast a row was measured: cores, instructions, native bf16, GPU, PyTorch."""

from __future__ import annotations

import platform

import torch

from l2l_core.core.device import computes_bf16
from l2l_core.core.threads import usable_cores


def capabilities() -> dict[str, object]:
    """Values for a row of bench/results.

    device: all that follows in one text, such as "cpu, 2 cores, x86_64, AVX2, no native bf16" or "NVIDIA H100, 80 GiB";
    cpu_isa: widest vector instructions that PyTorch uses; native_bf16: whether the CPU computes bf16 by itself;
    cores: physical ones that this process may use; torch: version.
    """
    isa, bf16, cores = torch.backends.cpu.get_cpu_capability(), computes_bf16(torch.device("cpu")), usable_cores()
    return {
        "device": gpu() or f"cpu, {cores} cores, {platform.machine()}, {isa}, {'' if bf16 else 'no '}native bf16",
        "cpu_isa": isa,
        "native_bf16": bf16,
        "cores": cores,
        "torch": torch.__version__,
    }


def gpu() -> str | None:
    """Name and memory of the first CUDA device; None without one."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return f"{found.name}, {found.total_memory / 2**30:.0f} GiB"
