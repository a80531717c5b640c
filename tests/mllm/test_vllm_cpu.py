"""Real vLLM on a CPU, in-process and as a server, compared with transformers on a small random Qwen2.5-VL.

`make test-vllm` runs it in .venv-vllm, where all three are installed.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests as http
from PIL import Image
from prior_tables import prior_params

from bench.tiny_qwen import save_tiny_qwen
from bench.vlm import MODEL
from l2l_core.config import PriorsParams
from l2l_core.errors import ConfigError
from l2l_core.mllm.backend import Question, RawResponse
from l2l_core.mllm.engine import Engine, MllmBackend
from l2l_core.mllm.engine_openai import OpenAIEngine
from l2l_core.mllm.engine_transformers import TransformersEngine
from l2l_core.mllm.engine_vllm import STRUCTURED_OUTPUTS, VllmEngine
from l2l_core.mllm.prompt import keeps_to, response_schema
from l2l_core.refshapes.dataset import make_scene

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]  # vLLM and its dependencies emit many warnings

ENVIRONMENT = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}  # copied before an in-process engine adds to it
NAME = "tiny-Qwen2.5-VL"
EMBEDDED = Path(__file__).parents[2] / MODEL["model"]
SIZES_HW = [(56, 56), (100, 75), (40, 200), (168, 168), (300, 28), (63, 120), (1, 1), (90, 130), (224, 112)]
SENTENCES = ["the red cup", "left", "a dog behind the second cup, not the small one", "thing 7"]
TOGETHER = '("$@"; kill -9 0) & read _; kill -9 0'
"""Runs a command and kills its process group when the command or the process that holds its stdin ends."""
START_S = 900.0  # server start: half a minute on two free cores, much longer under load


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    """Runs the engine in this process (its start takes half the time) with a cache of 1 GiB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_qwen(tmp_path_factory.mktemp("models") / NAME)


def params(model: Path | str, **changes: Any) -> PriorsParams:
    settings: dict[str, Any] = {"model": str(model), "precision": "fp32", "max_tokens": 400, "retries": 0}
    engine = {"device": "cpu", "batch_size": 12, "concurrency": 8} | changes.pop("engine", {})
    return prior_params(engine=engine, **(settings | {"backend": "vllm"} | changes))


@pytest.fixture(scope="module")
def offline(model: Path) -> VllmEngine:
    return VllmEngine(params(model))


@pytest.fixture(scope="module")
def server_url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server started as in docs/priors.md; always killed with all its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "4096", "--limit-mm-per-prompt", '{"image": 1, "video": 0}', "--enforce-eager"]
    command += ["--generation-config", "vllm", "--structured-outputs-config", json.dumps(STRUCTURED_OUTPUTS)]
    with log.open("w") as file:
        process = subprocess.Popen(
            ["sh", "-c", TOGETHER, "sh", *command],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_S
        while not _is_up(port):
            assert process.poll() is None, log.read_text()[-5000:]
            assert time.monotonic() < deadline, log.read_text()[-5000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.communicate()  # closes stdin


def _is_up(port: int) -> bool:
    try:
        return http.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
    except http.RequestException:
        return False


@pytest.fixture(scope="module")
def served(server_url: str) -> OpenAIEngine:
    return OpenAIEngine(params(NAME, backend="openai", engine={"server_url": server_url}))


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Question]:
    """Images of many sizes with several sentences each, in the order in which the stage queries them."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    made = []
    for number, (height, width) in enumerate(SIZES_HW):
        path = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        for place, sentence in enumerate(SENTENCES):
            made.append(Question(len(SENTENCES) * number + place, 0, str(path), (height, width), sentence))
    return made


def backend(engine: Engine, model: Path | str = NAME, **changes: Any) -> MllmBackend:
    return MllmBackend(engine, params(model, **changes))


def is_valid(text: str) -> bool:
    """Validates with a JSON schema validator, independent of grammars."""
    import jsonschema  # a dependency of vLLM

    jsonschema.validate(json.loads(text), response_schema("box-2", "resized_pixel"))
    return True


def said(responses: Sequence[RawResponse]) -> list[RawResponse]:
    """The responses without their precision, which a server does not report."""
    return [replace(response, precision=None) for response in responses]


def test_vllm_server_and_transformers_give_the_same_text(
    model: Path, offline: VllmEngine, served: OpenAIEngine, questions: list[Question]
) -> None:
    """Greedy, in fp32. The three differ in the code that computes, batches and constrains the output to JSON."""
    by_vllm = backend(offline).query(questions)
    by_server = backend(served).query(questions)
    by_transformers = backend(TransformersEngine(params(model))).query(questions)
    assert said(by_vllm) == by_server == said(by_transformers)  # texts, sizes and tokens
    assert {response.precision for response in [*by_vllm, *by_transformers]} == {"fp32"}
    assert all(response.failure is None and is_valid(response.raw_text) for response in by_vllm)
    assert all(keeps_to("box-2", response.raw_text) == response.is_valid for response in by_vllm)
    assert len({response.raw_text for response in by_vllm}) > len(questions) * 0.9  # image and sentence matter


def test_samples_are_valid_and_depend_only_on_their_seed(
    offline: VllmEngine, served: OpenAIEngine, questions: list[Question]
) -> None:
    drawn = [replace(question, sample_index=sample) for question in questions[:12] for sample in (1, 2)]
    sampled = backend(offline, temperature=1.5)
    responses = sampled.query(drawn)
    assert all(is_valid(response.raw_text) for response in responses)
    assert len({response.raw_text for response in responses}) == len(drawn)
    assert sampled.query(drawn[::-1])[::-1] == responses
    assert sampled.query(drawn[:1]) == responses[:1]
    assert backend(served, temperature=1.5).query(drawn) == said(responses)


def test_output_is_unconstrained_without_a_schema(offline: VllmEngine, questions: list[Question]) -> None:
    responses = backend(offline, structured_output=False, max_tokens=20).query(questions[:4])
    assert not any(response.is_valid for response in responses)
    assert all(response.raw_text and response.failure is None for response in responses)


@pytest.mark.parametrize("way", ["offline", "served"])
def test_marks_impossible_requests_and_completes_the_others(
    way: str, request: pytest.FixtureRequest, questions: list[Question], tmp_path: Path
) -> None:
    """One sentence exceeds the context; one image is refused by Qwen's processor (1,071 times as wide as high)."""
    thin = tmp_path / "thin.png"
    Image.new("RGB", (30000, 10)).save(thin)
    good = questions[:5]
    bad = [replace(good[0], sentence="very " * 5000), replace(good[0], image_path=str(thin), image_hw=(10, 30000))]
    mllm = backend(request.getfixturevalue(way))
    responses = mllm.query([good[0], bad[0], *good[1:4], bad[1], good[4]])
    assert [response.failure for response in responses] == [None, "error", None, None, None, "error", None]
    reasons = {response.reason for response in responses if response.failure}
    assert reasons == ({"HTTP 400"} if way == "served" else {"VLLMValidationError", "ValueError"})
    assert [response for response in responses if not response.failure] == mllm.query(good)


def test_missing_model_error_names_the_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"priors\.model: vLLM cannot run '.*nothing-Qwen2\.5-VL'"):
        VllmEngine(params(tmp_path / "nothing-Qwen2.5-VL"))


def test_built_in_model_gives_the_same_text_with_both_engines(tmp_path: Path) -> None:
    """200 greedy responses in fp32, for scenes that belong to no split.

    Must stay the last test: vLLM keeps state in the process, so engines started earlier return nonsense afterwards.
    """
    made = []
    for number in range(100):
        scene, expressions = make_scene(12345, "extra", number)
        Image.fromarray(scene.image).save(tmp_path / f"{number}.png")
        for expression in expressions:
            path = str(tmp_path / f"{number}.png")
            made.append(Question(len(made), 0, path, scene.image.shape[:2], expression.sentence))
    assert len(made) == 200
    changes = MODEL | {"model": str(EMBEDDED), "precision": "fp32", "structured_output": True}
    by_vllm, by_transformers = (
        MllmBackend(make(params(**(changes | {"backend": name}))), params(**(changes | {"backend": name})))
        for name, make in (("vllm", VllmEngine), ("transformers", TransformersEngine))
    )
    texts = [response.raw_text for response in by_vllm.query(made)]
    assert texts == [response.raw_text for response in by_transformers.query(made)]
    assert all(keeps_to("box-2", text) for text in texts)
    assert len(set(texts)) > 190  # image and sentence matter
