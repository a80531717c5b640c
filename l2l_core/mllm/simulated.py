"""Simulated priors: they READ THE TRUE BOXES and perturb them as a real model would. For datasets with truth only.

The boxes come from error_model.py; the words come from the sentence alone. A response is written in the format of the
model's family and goes through the parser like any other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from l2l_core.config import CoordScale, CoordSpace
from l2l_core.core.arrays import DoubleArray
from l2l_core.errors import InputError
from l2l_core.mllm.backend import Question, RawResponse, clean_text
from l2l_core.mllm.coords import qwen_input_hw, resolve_coord_space, scale_of, write_boxes
from l2l_core.mllm.error_model import ERROR_MODELS, Scenes, draw_boxes, random_draws
from l2l_core.mllm.prompt import prompt_sha256

PRESET_COORD_SPACES: dict[str, CoordSpace] = {
    "qwen2.5-vl-7b": "resized_pixel",
    "internvl2.5-8b": "norm1000",
    "llava-1.5-7b": "unit",  # of the image, not of a square: no image was padded, and published results stay valid
}
DECIMALS: dict[CoordScale, int] = {
    "pixel": 3,
    "resized_pixel": 3,
    "norm1000": 3,
    "norm999": 3,
    "norm1024": 3,
    "percent": 4,
    "unit": 6,
    "unit_square": 6,
}
"""More decimals than real models write (most write whole numbers): whole numbers cannot express an IoU above 0.9 in a
96 px image."""

_ARTICLE = re.compile("a|an|the|this|that|its|his|her|their")
_PLACE = re.compile(
    "left|right|top|bottom|upper|lower|middle|cent(er|re)|far|near|leftmost|rightmost|closest|nearest|"
    "first|second|third|fourth|fifth|last"
)
_LINK = re.compile(
    "in|on|at|of|with|without|behind|before|beside|between|by|near|next|to|above|below|under|over|from|for|who|whose|"
    "which|that|is|are|not|wearing|holding|sitting|standing|placed|located|close|facing|"
    "looking|touching|inside|outside|and"
)
"""Words that end the phrase naming the target."""


@dataclass(frozen=True)
class Truth:
    """True boxes by sentence and all annotated objects by image."""

    sent_id: NDArray[np.int64]  # [N] ascending
    image_id: NDArray[np.int64]  # [N]
    ann_id: NDArray[np.int64]  # [N]
    category: NDArray[np.object_]  # [N]
    xyxy: DoubleArray  # [N, 4] pixels
    object_image_id: NDArray[np.int64]  # [M] ascending
    object_ann_id: NDArray[np.int64]  # [M]
    object_category: NDArray[np.object_]  # [M]
    object_xyxy: DoubleArray  # [M, 4]


def make_truth(refs: pd.DataFrame, objects: pd.DataFrame) -> Truth:
    """Tables records.REFS and records.OBJECTS -> truth. Raises InputError if a sentence has no true box."""
    boxless = refs.loc[refs["bbox"].isna(), "sent_id"]
    if len(boxless):
        raise InputError(
            f"refs: {len(boxless)} of {len(refs)} sentences have no true box (the first is sent_id {boxless.iloc[0]}), "
            "which the simulated backend reads; set priors.backend to replay or none, or give every pair a mask or box"
        )
    refs = refs.sort_values("sent_id")
    objects = objects[objects["bbox"].notna()].sort_values(["image_id", "ann_id"])
    return Truth(
        sent_id=refs["sent_id"].to_numpy(np.int64),
        image_id=refs["image_id"].to_numpy(np.int64),
        ann_id=refs["ann_id"].to_numpy(np.int64),
        category=refs["category"].to_numpy(object),
        xyxy=np.stack(refs["bbox"].tolist()).astype(np.float64) if len(refs) else np.zeros((0, 4)),
        object_image_id=objects["image_id"].to_numpy(np.int64),
        object_ann_id=objects["ann_id"].to_numpy(np.int64),
        object_category=objects["category"].to_numpy(object),
        object_xyxy=np.stack(objects["bbox"].tolist()).astype(np.float64) if len(objects) else np.zeros((0, 4)),
    )


class SimulatedBackend:
    """Responds with true boxes perturbed by the error model `preset`."""

    name = "simulated"

    def __init__(self, preset: str, coord_space: CoordSpace, seed: int, truth: Truth) -> None:
        self._preset = preset
        self._coord_space = coord_space
        self._seed = seed
        self._truth = truth
        # The prompt whose response format is imitated; no model is queried.
        self._prompt_sha256 = prompt_sha256("box-1", coord_space)

    def query(self, questions: Sequence[Question]) -> list[RawResponse]:
        """One response per question; each depends on (seed, sent_id, sample_index) and its own image's truth alone."""
        sent_id = np.array([question.sent_id for question in questions], dtype=np.int64)
        sample_index = np.array([question.sample_index for question in questions], dtype=np.int64)
        image_hw = np.array([question.image_hw for question in questions], dtype=np.int64).reshape(-1, 2)
        scenes = self._scenes(sent_id, image_hw)
        drawn = draw_boxes(ERROR_MODELS[self._preset], scenes, random_draws(self._seed, sent_id, sample_index))

        is_resized = scale_of(self._coord_space) == "resized_pixel"
        input_hw = [qwen_input_hw(*hw) if is_resized else hw for hw in (question.image_hw for question in questions)]
        boxes = write_boxes(drawn.xyxy, self._coord_space, image_hw, np.array(input_hw).reshape(-1, 2))
        written = np.round(boxes, DECIMALS[scale_of(self._coord_space)]).tolist()
        columns = (questions, input_hw, written, drawn.has_box.tolist(), np.round(drawn.confidence, 2).tolist())
        return [
            RawResponse(
                raw_text=_response_text(question.sentence, box if has_box else None, confidence),
                model=self._preset,
                coord_space=self._coord_space,
                input_hw=hw,
                prompt_sha256=self._prompt_sha256,
            )
            for question, hw, box, has_box, confidence in zip(*columns, strict=True)
        ]

    def _scenes(self, sent_id: NDArray[np.int64], image_hw: NDArray[np.int64]) -> Scenes:
        truth = self._truth
        rows = np.searchsorted(truth.sent_id, sent_id)
        first = np.searchsorted(truth.object_image_id, truth.image_id[rows], side="left")
        count = np.searchsorted(truth.object_image_id, truth.image_id[rows], side="right") - first
        other_row = np.repeat(np.arange(len(rows)), count)
        within = np.arange(len(other_row)) - np.repeat(np.cumsum(count) - count, count)
        other = first[other_row] + within
        is_other = truth.object_ann_id[other] != truth.ann_id[rows][other_row]
        other_row, other = other_row[is_other], other[is_other]
        limits = image_hw[:, [1, 0, 1, 0]]
        return Scenes(
            true_xyxy=np.clip(truth.xyxy[rows], 0, limits),
            image_hw=image_hw,
            other_row=other_row,
            other_xyxy=np.clip(truth.object_xyxy[other], 0, limits[other_row]),
            other_same_category=truth.object_category[other] == truth.category[rows][other_row],
        )


def preset_coord_space(preset: str, configured: str) -> CoordSpace:
    """The coordinate space of a preset's responses: `configured`, or the preset's own for `auto`."""
    return PRESET_COORD_SPACES[preset] if configured == "auto" else resolve_coord_space(preset, configured)


def describe_sentence(sentence: str) -> tuple[str, list[str], str]:
    """Guess target, attributes and relation from the words alone.

    The phrase before the first linking word names the target: its last word that is not a place is the target, the
    words before that are attributes, and its places and all that follows form the relation. "white car left of the bus"
    -> ("car", ["white"], "left of the bus").
    """
    words = re.findall(r"[\w'-]+", clean_text(sentence).lower())
    cut = next((index for index, word in enumerate(words) if index and _LINK.fullmatch(word)), len(words))
    phrase = [word for word in words[:cut] if not _ARTICLE.fullmatch(word)]
    names = [word for word in phrase if not _PLACE.fullmatch(word)] or phrase[-1:]
    places = [word for word in phrase if word not in names]
    return (names[-1] if names else ""), names[:-1], " ".join(places + words[cut:])


def _response_text(sentence: str, box: list[float] | None, confidence: float) -> str:
    target, attributes, relation = describe_sentence(sentence)
    response = {
        "found": box is not None,
        "target": target,
        "attributes": attributes,
        "relation": relation,
        "bbox": box,
        "confidence": confidence if box else 0.0,
    }
    return json.dumps(response)
