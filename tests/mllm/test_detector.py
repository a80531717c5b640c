"""DetectorBackend and its choice of boxes; the detectors are plain functions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image
from prior_tables import prior_params

from l2l_core.errors import ConfigError
from l2l_core.mllm.backend import Question
from l2l_core.mllm.detector import DISTINCT_IOU, Detection, DetectionRequest, DetectorBackend, best_boxes
from l2l_core.priors.parse import parse_response

BOXES = [
    Detection((1.0, 2.0, 30.5, 40.0), 0.75, b"mask"),
    Detection((0.0, 0.0, 9.0, 9.0), 0.5),
]


@dataclass
class Scripted:
    """Finds the first of BOXES for each `dot` in the sentence, and records the batches it receives."""

    precision: Literal["bf16", "fp32"] = "fp32"
    batches: list[list[DetectionRequest]] = field(default_factory=list)

    def detect(self, requests: Sequence[DetectionRequest]) -> list[list[Detection]]:
        self.batches.append(list(requests))
        return [BOXES[: min(request.sentence.count("dot"), request.count)] for request in requests]


def backend(detector: Scripted, **engine: object) -> DetectorBackend:
    return DetectorBackend(detector, prior_params(backend="detector", model="org/finder", engine=engine))


def ask(folder: Path, *rows: tuple[int, str], samples: int = 1, hw: tuple[int, int] = (48, 64)) -> list[Question]:
    """Questions (number of the image, sentence)."""
    for number in {number for number, _ in rows}:
        Image.new("RGB", (hw[1], hw[0]), (number, 0, 0)).save(folder / f"{number}.png")
    return [
        Question(place, sample, str(folder / f"{number}.png"), hw, sentence)
        for place, (number, sentence) in enumerate(rows)
        for sample in range(samples)
    ]


# --- choice of boxes


def test_the_best_boxes_are_distinct_visible_and_inside_the_image() -> None:
    """In an image of height 40 and width 100, by hand."""
    xyxy = np.array(
        [
            [10.0, 10.0, 30.0, 30.0],
            [101.0, 0.0, 150.0, 40.0],  # outside, with the highest score
            [10.0, 10.0, 30.0, 26.0],  # IoU 320 / 400 = 0.8 with the first
            [-20.0, 30.0, 40.0, 60.0],  # clipped to 0 30 40 40
            [50.0, 10.0, 50.9, 30.0],  # thinner than a pixel
            [20.0, 10.0, 40.0, 30.0],  # IoU 200 / 600 = 0.33 with the first
            [60.0, 60.0, 90.0, 80.0],  # below the image: inside its width, but not its height
        ]
    )
    score = np.array([0.5, 0.9, 0.45, 0.6, 0.8, 0.4, 0.7])
    expected = [
        (3, (0.0, 30.0, 40.0, 40.0), 0.6),
        (0, (10.0, 10.0, 30.0, 30.0), 0.5),
        (5, (20.0, 10.0, 40.0, 30.0), 0.4),
    ]
    assert best_boxes(xyxy, score, (40, 100), 9) == expected
    assert best_boxes(xyxy, score, (40, 100), 2) == expected[:2]
    assert best_boxes(np.zeros((0, 4)), np.zeros(0), (40, 100), 2) == []


def test_chosen_boxes_are_distinct_sorted_and_independent_of_their_number() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        corner, side = rng.uniform(-20, 100, (60, 2)), rng.uniform(0, 60, (60, 2))
        xyxy, score = np.concatenate([corner, corner + side], axis=1), rng.integers(0, 9, 60) / 9
        found = best_boxes(xyxy, score, (80, 110), 60)
        assert [best_boxes(xyxy, score, (80, 110), count) for count in (1, 5)] == [found[:1], found[:5]]
        assert [value for _, _, value in found] == sorted((value for _, _, value in found), reverse=True)
        assert all(_overlap(one, other) <= DISTINCT_IOU for _, one, _ in found for _, other, _ in found if one != other)


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0) * max(height, 0)
    return both / (sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - both)


def test_every_chosen_box_is_one_that_the_parser_accepts() -> None:
    """Sides near the parser's minimum of one pixel, where rounding matters."""
    rng = np.random.default_rng(1)
    corner = rng.uniform(0, 60, (2000, 2))
    xyxy = np.concatenate([corner, corner + rng.uniform(0.98, 1.02, (2000, 2))], axis=1)
    chosen = best_boxes(xyxy, rng.random(2000), (64, 64), 2000)
    assert 100 < len(chosen) < 1900
    for _, box, _ in chosen:
        assert parse_response(json.dumps({"bbox": box}), "pixel", (64, 64)).bbox == box


# --- responses


def test_the_best_box_is_the_response_and_its_score_the_confidence(tmp_path: Path) -> None:
    (response,) = backend(Scripted(precision="bf16")).query(ask(tmp_path, (0, "dot")))
    prior = parse_response(response.raw_text, response.coord_space, (48, 64), response.input_hw)
    assert (prior.status, prior.bbox, prior.score) == ("ok", BOXES[0].box, 0.75)
    assert (response.model, response.coord_space, response.input_hw) == ("org/finder", "pixel", (48, 64))
    assert (response.failure, response.reason, response.prompt_sha256) == (None, "", "")
    assert (response.mask, response.precision, response.attempts) == (b"mask", "bf16", 1)


def test_samples_are_the_next_best_boxes_and_further_ones_are_empty(tmp_path: Path) -> None:
    responses = backend(Scripted()).query(ask(tmp_path, (0, "dot dot"), (0, "nothing"), samples=3))
    assert [response.failure for response in responses] == [None, None, "empty", "empty", "empty", "empty"]
    assert [json.loads(response.raw_text)["confidence"] for response in responses[:2]] == [0.75, 0.5]
    assert [response.mask for response in responses] == [b"mask", *[None] * 5]


def test_a_sentence_is_detected_once_and_its_image_decoded_once(tmp_path: Path) -> None:
    detector = Scripted()
    backend(detector).query(ask(tmp_path, (0, "dot"), (0, "red dot"), (1, "dot"), samples=4))
    ((first, second, third),) = detector.batches
    assert [request.sentence for request in (first, second, third)] == ["dot", "red dot", "dot"]
    assert first.image is second.image is not third.image
    assert [request.image.getpixel((0, 0)) for request in (first, third)] == [(0, 0, 0), (1, 0, 0)]
    assert [request.count for request in (first, second, third)] == [4, 4, 4]


def test_batches_hold_images_of_one_size(tmp_path: Path) -> None:
    wide = ask(tmp_path, *((number, "dot") for number in range(5)))
    tall = ask(tmp_path, (7, "dot dot"), (8, "red"), hw=(64, 48))
    detector = Scripted()
    mixed = [wide[0], tall[0], *wide[1:], tall[1]]
    responses = backend(detector, batch_size=3).query(mixed)
    assert [[request.image.size for request in batch] for batch in detector.batches] == [
        [(64, 48)] * 3,
        [(64, 48)] * 2,
        [(48, 64)] * 2,
    ]
    assert [response.failure for response in responses] == [*[None] * 6, "empty"]
    assert [response.input_hw for response in responses] == [question.image_hw for question in mixed]


class Fussy(Scripted):
    """Fails for a batch with the sentence `bad`."""

    def detect(self, requests: Sequence[DetectionRequest]) -> list[list[Detection]]:
        found = super().detect(requests)
        if any(request.sentence == "bad" for request in requests):
            raise RuntimeError("out of memory at 0x7f")
        return found


def test_a_failing_sentence_is_isolated_and_marked(tmp_path: Path) -> None:
    rows = [(0, "dot"), (0, "bad"), (1, "dot dot"), (1, "red dot"), (1, "dot.")]
    responses = backend(Fussy()).query(ask(tmp_path, *rows))
    assert [response.reason for response in responses] == ["", "RuntimeError", "", "", ""]
    assert [response.failure for response in responses] == [None, "error", None, None, None]
    assert [response.is_valid for response in responses] == [True, False, True, True, True]


def test_an_error_of_the_whole_model_stops_the_query(tmp_path: Path) -> None:
    class Broken(Scripted):
        def detect(self, requests: Sequence[DetectionRequest]) -> list[list[Detection]]:
            raise ConfigError("no such device")

    with pytest.raises(ConfigError, match="no such device"):
        backend(Broken()).query(ask(tmp_path, (0, "dot"), (0, "red dot")))


def test_an_unreadable_image_is_an_error_of_its_sentences_alone(tmp_path: Path) -> None:
    questions = ask(tmp_path, (0, "dot"), (1, "dot"), samples=2)
    (tmp_path / "0.png").write_bytes(b"no image")
    responses = backend(Scripted()).query(questions)
    assert [response.failure for response in responses] == ["error", "error", None, "empty"]
    assert "0.png" in responses[0].reason
