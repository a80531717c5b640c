"""The bundled model, queried as in the stage `query`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from bench.vlm import MODEL
from l2l_core.config import PriorsParams, load_params
from l2l_core.core.boxes import iou_xyxy
from l2l_core.mllm.backend import Question, RawResponse
from l2l_core.mllm.engine import MllmBackend
from l2l_core.mllm.engine_transformers import TransformersEngine
from l2l_core.mllm.simulated import describe_sentence
from l2l_core.priors.parse import parse_response
from l2l_core.refshapes.dataset import make_scene

pytestmark = pytest.mark.xdist_group("refshapes_vlm")  # queries the model only once

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / MODEL["model"]
SCENES = 60


@pytest.fixture(scope="module")
def backend() -> MllmBackend:
    shipped = load_params(ROOT / "params.yaml").priors.model_dump()
    engine = shipped["engine"] | {"device": "cpu", "batch_size": 40}
    changes = {"model": str(FOLDER), "precision": "fp32", "engine": engine}
    params = PriorsParams.model_validate(shipped | MODEL | changes)
    return MllmBackend(TransformersEngine(params), params)


@pytest.fixture(scope="module")
def queried(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Question], list[tuple[float, ...]]]:
    """Scenes outside all splits and the training data, with their true boxes."""
    folder, questions, boxes = tmp_path_factory.mktemp("scenes"), [], []
    for number in range(SCENES):
        scene, expressions = make_scene(12345, "extra", number)
        path = folder / f"{number}.png"
        Image.fromarray(scene.image).save(path)
        for expression in expressions:
            ys, xs = np.nonzero(scene.masks[expression.target])
            questions.append(Question(len(questions), 0, str(path), scene.image.shape[:2], expression.sentence))
            boxes.append((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
    return questions, boxes


@pytest.fixture(scope="module")
def responses(backend: MllmBackend, queried: tuple[list[Question], list[tuple[float, ...]]]) -> list[RawResponse]:
    return backend.query(queried[0])


def test_refshapes_vlm_is_the_default_model() -> None:
    shipped = load_params(ROOT / "params.yaml").priors
    assert shipped.model_dump().items() >= MODEL.items()


def test_refshapes_vlm_has_the_stated_size() -> None:
    files = [path for path in FOLDER.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
        assert {weights.get_slice(name).get_dtype() for name in names} == {"BF16"}
        assert sum(np.prod(weights.get_slice(name).get_shape()) for name in names) == pytest.approx(5.0e6, rel=0.02)
    assert json.loads((FOLDER / "config.json").read_text())["architectures"] == ["LlavaForConditionalGeneration"]


def test_responses_are_valid_and_mostly_correct(
    queried: tuple[list[Question], list[tuple[float, ...]]], responses: list[RawResponse]
) -> None:
    """The bound is below the result of bench.vlm; chance is below a tenth."""
    read = [parse_response(a.raw_text, "percent", q.image_hw) for q, a in zip(queried[0], responses, strict=True)]
    assert all(response.is_valid and response.attempts == 1 for response in responses)
    assert {prior.status for prior in read} == {"ok"}
    right = [iou_xyxy(np.array([p.bbox]), np.array([box]))[0] >= 0.5 for p, box in zip(read, queried[1], strict=True)]
    assert np.mean(right) > 0.6


def test_responses_describe_the_sentence(
    queried: tuple[list[Question], list[tuple[float, ...]]], responses: list[RawResponse]
) -> None:
    told = [json.loads(response.raw_text) for response in responses]
    wanted = [describe_sentence(question.sentence) for question in queried[0]]
    same = [(t["target"], t["attributes"]) == (w[0], list(w[1])) for t, w in zip(told, wanted, strict=True)]
    assert np.mean(same) > 0.9


def test_fp32_responses_do_not_depend_on_the_batch(
    backend: MllmBackend, queried: tuple[list[Question], list[tuple[float, ...]]], responses: list[RawResponse]
) -> None:
    alone = [backend.query([question])[0] for question in queried[0][:6]]
    assert [response.raw_text for response in alone] == [response.raw_text for response in responses[:6]]


def test_responds_to_unseen_images_and_words(
    backend: MllmBackend,
    queried: tuple[list[Question], list[tuple[float, ...]]],
    responses: list[RawResponse],
    tmp_path: Path,
) -> None:
    path = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 333, 3), dtype=np.uint8)).save(path)
    strange = Question(0, 0, str(path), (120, 333), "der Mann mit dem größten Hut, 3. von links")
    response, known = backend.query([strange, queried[0][0]])
    assert response.failure is None
    assert response.raw_text
    assert known.raw_text == responses[0].raw_text
