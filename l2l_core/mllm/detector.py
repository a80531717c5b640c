"""Open-vocabulary detectors as a source of priors: image + sentence -> the best boxes, some with masks.

The models are behind `Detector`: engine_detector.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from l2l_core.config import PriorsParams
from l2l_core.core.arrays import DoubleArray
from l2l_core.core.boxes import clip_xyxy, iou_xyxy
from l2l_core.mllm.backend import Question, RawResponse, isolate_failures
from l2l_core.mllm.coords import MIN_SIDE_PX
from l2l_core.mllm.image_backend import ImageBackend

DISTINCT_IOU = 0.5
"""Boxes that overlap more are one object: a detector finds the same object several times."""
BOX_DECIMALS, SCORE_DECIMALS = 2, 6
"""Far finer than a detector's accuracy, and coarse enough to hide most differences between machines."""

Box = tuple[float, float, float, float]
Sentence = tuple[str, tuple[int, int], str]
"""Path and size of the image, text: the samples of a sentence share one detection."""


@dataclass(frozen=True, slots=True)
class DetectionRequest:
    """One sentence about one image."""

    image: Image.Image  # RGB, as stored
    sentence: str
    count: int  # most detections to return


@dataclass(frozen=True, slots=True)
class Detection:
    """One object that the detector found for a sentence."""

    box: Box  # x1 y1 x2 y2 in pixels, inside the image
    score: float  # 0..1
    mask: bytes | None = None  # COCO compressed run lengths at the image's own size; None: the model has no masks


class Detector(Protocol):
    """A model that finds the objects of a sentence. A result depends on its request alone."""

    @property
    def precision(self) -> Literal["bf16", "fp32"]:
        """Precision of the model."""
        ...

    def detect(self, requests: Sequence[DetectionRequest]) -> list[list[Detection]]:
        """The detections of each request, best first (see `best_boxes`). All images have the same size.

        Requests about one image hold the same Image object.
        """
        ...


class DetectorBackend(ImageBackend):
    """Responds with the best box of a sentence; sample k is the k-th best distinct box, `empty` if there are fewer.

    There is no score threshold. Scores of different families, and of short and long sentences, are not comparable, and
    the prior carries its score, so that the policy can judge the box by it.
    """

    def __init__(self, detector: Detector, params: PriorsParams) -> None:
        super().__init__("detector")
        self._detector = detector
        self._precision = detector.precision
        self._model = str(params.model)
        self._batch_size = params.engine.batch_size

    def _query(self, questions: Sequence[Question], images: Sequence[Image.Image | str]) -> list[RawResponse]:
        count = 1 + max((question.sample_index for question in questions), default=0)
        requests: dict[Sentence, DetectionRequest] = {}
        results: dict[Sentence, list[Detection] | str] = {}
        for question, image in zip(questions, images, strict=True):
            if isinstance(image, str):
                results[_sentence(question)] = image
            else:
                requests[_sentence(question)] = DetectionRequest(image, question.sentence, count)
        for batch in _batches(requests, self._batch_size):
            found = isolate_failures(self._detect, [requests[sentence] for sentence in batch], str)
            results |= zip(batch, found, strict=True)
        return [self._response(question, results[_sentence(question)]) for question in questions]

    def _detect(self, requests: Sequence[DetectionRequest]) -> list[list[Detection] | str]:
        return [*self._detector.detect(requests)]

    def _response(self, question: Question, result: list[Detection] | str) -> RawResponse:
        failure: Literal["empty", "error"] | None = None
        raw_text, reason, mask = "", "", None
        if isinstance(result, str):
            failure, reason = "error", result
        elif question.sample_index >= len(result):
            failure = "empty"
        else:
            best = result[question.sample_index]
            raw_text, mask = json.dumps({"bbox": best.box, "confidence": best.score}), best.mask
        return RawResponse(
            raw_text,
            model=self._model,
            coord_space="pixel",
            input_hw=question.image_hw,
            failure=failure,
            reason=reason,
            is_valid=failure != "error",
            precision=self._precision,
            mask=mask,
        )


def best_boxes(
    xyxy: DoubleArray, score: DoubleArray, image_hw: tuple[int, int], count: int
) -> list[tuple[int, Box, float]]:
    """The `count` best distinct boxes -> their rows, boxes inside the image, and scores, best first.

    xyxy: [N, 4] x1 y1 x2 y2 in pixels of the image, may exceed it. score: [N] in 0..1. Boxes that are thinner than
    MIN_SIDE_PX inside the image are skipped, as are boxes that overlap a better one by more than DISTINCT_IOU. Equal
    scores keep the order of the rows. The first k boxes do not depend on `count`.
    """
    inside = np.round(clip_xyxy(xyxy, *image_hw), BOX_DECIMALS)
    waiting = np.asarray(((inside[:, 2:] - inside[:, :2]) >= MIN_SIDE_PX).all(axis=1))
    chosen: list[tuple[int, Box, float]] = []
    for row in np.argsort(-score, kind="stable").tolist():
        if len(chosen) == count:
            break
        if waiting[row]:
            x1, y1, x2, y2 = inside[row].tolist()
            chosen.append((row, (x1, y1, x2, y2), round(float(score[row]), SCORE_DECIMALS)))
            waiting &= iou_xyxy(inside[row], inside) <= DISTINCT_IOU
    return chosen


def _sentence(question: Question) -> Sentence:
    return question.image_path, question.image_hw, question.sentence


def _batches(sentences: Iterable[Sentence], size: int) -> Iterator[list[Sentence]]:
    """Batches of at most `size` sentences whose images have one size.

    Images of several sizes would need padding, and some models see it: their boxes would depend on the batch.
    """
    by_size: dict[tuple[int, int], list[Sentence]] = {}
    for sentence in sentences:
        by_size.setdefault(sentence[1], []).append(sentence)
    for same in by_size.values():
        yield from (same[start : start + size] for start in range(0, len(same), size))
