"""Cases that the real vLLM cannot show on a CPU (test_vllm_cpu.py): GPU settings, a dead engine, no vLLM.

A stand-in with vLLM's call signatures replaces the package.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from prior_tables import prior_params

from l2l_core.errors import ConfigError, InputError
from l2l_core.mllm.engine import Request
from l2l_core.mllm.engine_vllm import VllmEngine


class EngineDeadError(Exception):
    pass


class LLM:
    made: dict[str, Any]

    def __init__(self, **settings: Any) -> None:
        type(self).made = settings

    def chat(self, *_: Any, **__: Any) -> list[Any]:
        raise EngineDeadError


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(is_cpu=lambda: False, has_device_capability=lambda capability: capability <= 80)
    for name, contents in (
        ("vllm", {"LLM": LLM, "SamplingParams": SimpleNamespace}),
        ("vllm.platforms", {"current_platform": gpu}),
        ("vllm.sampling_params", {"StructuredOutputsParams": SimpleNamespace}),
    ):
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)


def engine(**changes: object) -> VllmEngine:
    return VllmEngine(prior_params(backend="vllm", model="Qwen/Qwen2.5-VL-7B-Instruct", engine=changes))


@pytest.mark.usefixtures("_installed")
def test_passes_the_configured_settings_to_vllm() -> None:
    engine(tensor_parallel=2, memory_share=0.5, context_tokens=2048)
    assert LLM.made == {
        "model": "Qwen/Qwen2.5-VL-7B-Instruct",
        "dtype": "bfloat16",
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.5,
        "max_model_len": 2048,
        "limit_mm_per_prompt": {"image": 1, "video": 0},
        "enable_prefix_caching": True,
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        "enforce_eager": False,
    }


@pytest.mark.usefixtures("_installed")
def test_a_dead_engine_stops_the_run() -> None:
    with pytest.raises(InputError, match=r"engine has died .*priors\.engine\)$"):
        engine().generate([Request(Image.new("RGB", (28, 28)), "cup", None, 0.5, 9, 64)])


def test_missing_vllm_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(
        ConfigError, match=r"vLLM is not installed in .*priors\.engine\.python.*make vllm-cpu.*requirements-vllm\.txt"
    ):
        engine()
