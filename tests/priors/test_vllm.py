"""The calls made of vLLM, against a stand-in with its call shapes: vLLM itself needs an environment of its own."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from prior_tables import prior_params

from l2l_core.errors import ConfigError, InputError
from l2l_core.priors.mllm import Completion, Request
from l2l_core.priors.prompt import answer_schema
from l2l_core.priors.vllm import VllmEngine

SCHEMA = answer_schema("box-2", "resized_pixel")


@dataclass(kw_only=True)
class SamplingParams:
    """Unknown names are errors, as in vLLM."""

    temperature: float
    seed: int | None
    max_tokens: int | None
    structured_outputs: Any


@dataclass(kw_only=True)
class StructuredOutputsParams:
    json: str | dict[str, Any] | None


class LLM:
    """Answers with its question."""

    made: dict[str, Any]

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        tensor_parallel_size: int,
        gpu_memory_utilization: float,
        max_model_len: int,
        limit_mm_per_prompt: dict[str, int],
        enable_prefix_caching: bool,
        structured_outputs_config: dict[str, Any],
    ) -> None:
        type(self).made = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        if model == "missing":
            raise OSError("missing is no\nmodel")

    def chat(
        self, messages: list[list[dict[str, Any]]], sampling_params: list[SamplingParams], *, use_tqdm: bool
    ) -> list[Any]:
        self.sampling_params = sampling_params
        done = []
        for (message,), _ in zip(messages, sampling_params, strict=True):
            image, text = message["content"]
            assert (image["type"], text["type"], message["role"]) == ("image_pil", "text", "user")
            assert isinstance(image["image_pil"], Image.Image)
            if text["text"] == "long":
                raise ValueError("The decoder prompt is longer than the maximum model length")
            if text["text"] == "deadly":
                raise EngineDeadError
            output = SimpleNamespace(text=text["text"], token_ids=[1, 2])
            done.append(SimpleNamespace(prompt_token_ids=[0] * 7, outputs=[output]))
        return done


class EngineDeadError(Exception):
    pass


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm, sampling = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    vllm.LLM, vllm.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    sampling.StructuredOutputsParams = StructuredOutputsParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", sampling)


def engine(model: str = "Qwen/Qwen2.5-VL-7B-Instruct", **changes: object) -> VllmEngine:
    return VllmEngine(prior_params(backend="vllm", model=model, engine=changes))


def request(text: str, schema: dict[str, object] | None = SCHEMA) -> Request:
    return Request(Image.new("RGB", (28, 28)), text, schema, 0.5, 9, 64)


@pytest.mark.usefixtures("_installed")
def test_the_engine_is_made_as_configured() -> None:
    engine(tensor_parallel=2, memory_share=0.5, context_tokens=2048)
    assert LLM.made == {
        "model": "Qwen/Qwen2.5-VL-7B-Instruct",
        "dtype": "bfloat16",
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.5,
        "max_model_len": 2048,
        "limit_mm_per_prompt": {"image": 1},
        "enable_prefix_caching": True,
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }


@pytest.mark.usefixtures("_installed")
def test_questions_and_answers() -> None:
    asked = engine()
    assert asked.generate([request("a"), request("b", None)]) == [Completion("a", 7, 2), Completion("b", 7, 2)]
    first, second = asked._llm.sampling_params
    assert (first.temperature, first.seed, first.max_tokens) == (0.5, 9, 64)
    assert first.structured_outputs == StructuredOutputsParams(json=SCHEMA)
    assert second.structured_outputs is None


@pytest.mark.usefixtures("_installed")
def test_one_bad_request_raises_for_all_and_the_engine_lives_on() -> None:
    asked = engine()
    with pytest.raises(ValueError, match="longer"):
        asked.generate([request("a"), request("long")])
    assert asked.generate([request("a")]) == [Completion("a", 7, 2)]


@pytest.mark.usefixtures("_installed")
def test_a_dead_engine_stops_the_run() -> None:
    with pytest.raises(InputError, match=r"engine has died .*run again to go on"):
        engine().generate([request("deadly")])


@pytest.mark.usefixtures("_installed")
def test_a_model_that_cannot_be_loaded_is_named() -> None:
    with pytest.raises(ConfigError, match=r"priors\.model: vLLM cannot run 'missing': missing is no model"):
        engine("missing")


def test_without_vllm_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"vLLM is not installed: pip install -r requirements-vllm\.txt"):
        engine()
