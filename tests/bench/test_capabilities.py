"""The machine description that benchmarks store, for mocked machines."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from bench import capabilities as subject


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A CPU with eight cores, AVX2 and no GPU."""
    monkeypatch.setattr(subject, "usable_cores", lambda: 8)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(subject.platform, "machine", lambda: "x86_64")
    return monkeypatch


def test_describes_a_cpu_by_cores_instruction_set_and_bf16(machine: pytest.MonkeyPatch) -> None:
    found = subject.capabilities()
    assert found == {
        "device": "cpu, 8 cores, x86_64, AVX2, no native bf16",
        "cpu_isa": "AVX2",
        "native_bf16": False,
        "cores": 8,
        "torch": torch.__version__,
    }
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16", "sve_bf16"])
def test_bf16_is_native_if_torch_reports_an_instruction_for_it(machine: pytest.MonkeyPatch, name: str) -> None:
    machine.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "any", name: True})
    assert subject.capabilities()["native_bf16"] is True
    assert str(subject.capabilities()["device"]).endswith(", native bf16")


def test_describes_a_gpu_by_name_and_memory(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30)
    machine.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert subject.capabilities()["device"] == "NVIDIA H100, 80 GiB"
