"""Check what the coordinates of stored responses mean, by the labeled masks.

A wrong coordinate space, swapped axes or a wrong image size raises no error: boxes just land elsewhere. So the
responses to the labeled sentences are read again under every coordinate space, under other box forms and at other image
sizes. If another reading fits clearly better than the configured one, that is an error. Recorded masks are checked by
their bounding boxes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import pyarrow as pa

from l2l_core.artifacts import records
from l2l_core.config import CoordSpace
from l2l_core.core.arrays import DoubleArray
from l2l_core.core.boxes import iou_xyxy
from l2l_core.core.masks import rle_box_xyxy
from l2l_core.core.metrics import POSITIVE_IOU
from l2l_core.core.seeding import evenly_picked
from l2l_core.errors import ConfigError
from l2l_core.mllm.coords import COORD_SPACES, is_y_first
from l2l_core.priors.parse import BoxForm, ParsedPrior, parse_response
from l2l_core.priors.scores import LabeledMasks, hits, percent

CHECKED_BACKENDS = ("transformers", "openai", "vllm", "replay")
"""A model or a file may use other coordinates than configured; those of the other backends are known."""
MOST = 200
"""Labeled sentences read again per model; of more, an even selection. Each costs some 10 ms over all readings."""
FEWEST_OBJECTS = 10
"""With fewer labeled objects, no difference reaches MAX_P_VALUE."""
RATIO, MARGIN = 1.5, 0.1
"""Another reading fits clearly better if its mean IoU is at least RATIO times and MARGIN above the configured one, and
reaches a floor:"""
SETTING_FLOOR, OTHER_FLOOR, POINT_FLOOR = 0.3, 0.55, 0.5
"""No coordinate space fits boxes of wrong objects with a mean IoU of SETTING_FLOOR. Readings that no setting expresses
can enlarge boxes, so that boxes of parts fit large objects better: they, and readings of masks, must reach OTHER_FLOOR.
Points are hits or misses, and a misread point often hits a large object by chance, so their share of hits must reach
POINT_FLOOR."""
MIN_INVERTED = 0.1
"""Another box form needs at least this share of responses that are inverted or empty as corners. Of 20 true boxes of
RefCOCO testA as x, y, width, height, at least 0.2 were in each of 3,000 draws; of corners, almost none are. The fit is
not enough: read as x, y, width, height, the left parts of the true boxes reached a mean IoU of 0.75."""
MAX_P_VALUE = 0.001
"""Of the one-sided Wilcoxon signed-rank test over the labeled objects; strict because many readings are tried."""

_FORM_NAMES: dict[BoxForm, str] = {"xywh": "x, y, width, height", "cxcywh": "x and y of the center, width, height"}
_SIDES_PX = (224, 256, 280, 320, 336, 384, 448, 512, 560, 640, 704, 768, 840, 896, 1024, 1120, 1280, 1344, 1536, 1792)
"""Common sizes of a model's input, at most 15 % apart: read at a size that is 8 % off, boxes still overlap well."""

Hw = tuple[int, int]


@dataclass(frozen=True)
class _Reading:
    """One meaning of the coordinates."""

    space: CoordSpace
    form: BoxForm = "xyxy"
    input_hw: Callable[[int, int], Hw] | None = None  # height, width of an image -> of the model's input
    size_name: str = ""

    @property
    def is_setting(self) -> bool:
        """Whether `priors.coord_space` can express it."""
        return self.form == "xyxy" and self.input_hw is None

    def describe(self) -> str:
        """`norm1000`, or in words if no setting expresses it."""
        if self.input_hw:
            return f"pixels of {self.size_name}"
        return self.space if self.form == "xyxy" else f"boxes as {_FORM_NAMES[self.form]} in {self.space}"


@dataclass(frozen=True)
class Fit:
    """How well the coordinates of one model's responses fit the labels."""

    model: str
    space: CoordSpace  # as configured
    sentences: int
    objects: int  # that the sentences refer to
    of_masks: bool  # of the masks' bounding boxes
    by_points: bool  # fits are shares of points inside the true mask instead of mean IoU of boxes
    configured: float  # 0..1
    best: str  # the other reading that fits best
    best_fit: float
    remedy: str  # what to change if `best` fits clearly better; "": it does not, or there are too few objects
    by_space: dict[str, dict[CoordSpace, float | None]]  # metric, in percent, in every space

    def describe(self) -> str:
        """`norm1000 fits with mean IoU 80, the next best is norm1024 with 77`, or why there was no check."""
        if self.objects < FEWEST_OBJECTS:
            what = "masks" if self.of_masks else "coordinates"
            return f"{what}{self._of_model} not checked: {self.objects} labeled objects, needs {FEWEST_OBJECTS}"
        return (
            f"{'masks: ' if self.of_masks else ''}{self.space} fits with {self._measure} {100 * self.configured:.0f}, "
            f"the next best is {self.best} with {100 * self.best_fit:.0f}"
        )

    def problem(self) -> str:
        """One line about a misfit."""
        key, what = ("replay_file", "masks") if self.of_masks else ("coord_space", "responses")
        return (
            f"priors.{key}: {self.best} fits the {what}{self._of_model} to {self.sentences} labeled sentences "
            f"clearly better than {self.space}: {self._measure} {100 * self.best_fit:.0f} against "
            f"{100 * self.configured:.0f}; {self.remedy}, or set priors.check_coords: false"
        )

    @property
    def _measure(self) -> str:
        return "share of points on the object" if self.by_points else "mean IoU"

    @property
    def _of_model(self) -> str:
        return f" of {self.model}" if self.model else ""


def fit_coords(responses: pa.Table, labels: LabeledMasks) -> list[Fit]:
    """Compare readings of the first responses to the labeled sentences, for each model and configured space.

    responses: records.RESPONSES. Of a response with a mask, the mask's bounding box is read, which is in pixels. Only
    CHECKED_BACKENDS are read.
    """
    columns = ["sent_id", "sample_index", "backend", "model", "raw_text", "mask", "failure", "coord_space"]
    columns += ["input_height", "input_width"]
    frame = records.to_frame(responses.select(columns))
    frame = frame[(frame["sample_index"] == 0) & frame["sent_id"].isin(labels.sent_id)]
    frame = frame[frame["failure"].isna() & frame["backend"].isin(CHECKED_BACKENDS)]
    of_masks = frame["mask"].notna()
    frame = frame.assign(of_masks=of_masks, coord_space=frame["coord_space"].mask(of_masks, "pixel"))
    found = []
    for (model, of_masks, space, backend), rows in frame.groupby(["model", "of_masks", "coord_space", "backend"]):
        rows = rows.sort_values("sent_id").iloc[evenly_picked(len(rows), MOST)]
        own = labels.take(np.searchsorted(labels.sent_id, rows["sent_id"].to_numpy()))
        found.append(_fit(rows, own, str(model), space, of_masks=of_masks, is_replayed=backend == "replay"))
    return found


def scores_by_space(fits: list[Fit]) -> list[dict[str, object]]:
    """What each coordinate space gives on the labeled sentences, for metrics/priors.json; masks are left out.

    One entry per fit: model, coord_space (as configured), sentences, and for each space in percent box_miou and
    box_acc50, or pointing_acc of a model that only points. A list, since DVC would show each number of an object as a
    column.
    """
    return [
        {"model": fit.model, "coord_space": fit.space, "sentences": fit.sentences, **fit.by_space}
        for fit in fits
        if not fit.of_masks
    ]


def check_coords(fits: list[Fit]) -> None:
    """Raise ConfigError for the first model whose coordinates fit clearly better with another meaning."""
    for fit in fits:
        if fit.remedy:
            raise ConfigError(fit.problem())


def _fit(
    rows: pd.DataFrame, labels: LabeledMasks, model: str, space: CoordSpace, *, of_masks: bool, is_replayed: bool
) -> Fit:
    texts = _mask_boxes(rows["mask"].tolist(), labels) if of_masks else rows["raw_text"].tolist()
    recorded_hw = list(zip(rows["input_height"].tolist(), rows["input_width"].tolist(), strict=True))

    def read(reading: _Reading) -> list[ParsedPrior]:
        sizes = zip(texts, labels.image_hw.tolist(), recorded_hw, strict=True)
        return [
            parse_response(
                text,
                reading.space,
                (height, width),
                reading.input_hw(height, width) if reading.input_hw else input_hw,
                reading.form,
            )
            for text, (height, width), input_hw in sizes
        ]

    priors = {_Reading(other): read(_Reading(other)) for other in COORD_SPACES}
    boxed = max(sum(prior.bbox is not None for prior in some) for some in priors.values())
    by_points = 2 * boxed < max(sum(prior.status == "ok" for prior in some) for some in priors.values())
    measure = _points_fit if by_points else _boxes_fit
    fits = {reading: measure(some, labels) for reading, some in priors.items()}
    by_space = _by_space(fits, by_points=by_points)
    own = fits.pop(_Reading(space))
    objects = len(np.unique(labels.ann_id))
    is_checked = objects >= FEWEST_OBJECTS
    if is_checked and not by_points and RATIO * own.mean() <= 1:  # else none can be clearly better
        others = [reading for reading in _other_readings() if reading.form == "xyxy" or not of_masks]
        priors |= {reading: read(reading) for reading in others}
        fits |= {reading: _boxes_fit(priors[reading], labels) for reading in others}

    def is_clear(reading: _Reading) -> bool:
        floor = POINT_FLOOR if by_points else SETTING_FLOOR if reading.is_setting and not of_masks else OTHER_FLOOR
        inverted = _share_inverted(priors[reading], priors[_Reading(reading.space)])
        is_form = reading.form == "xyxy" or inverted >= MIN_INVERTED
        return is_form and _is_clearly_better(fits[reading], own, labels, floor)

    # A setting is preferred to sizes and forms, which approximate several settings.
    clear = [reading for reading in fits if is_checked and is_clear(reading)]
    candidates = clear or list(fits)
    best = max(candidates, key=lambda reading: round(fits[reading].mean() + 0.05 * reading.is_setting, 2))
    return Fit(
        model=model,
        space=space,
        sentences=len(texts),
        objects=objects,
        of_masks=of_masks,
        by_points=by_points,
        configured=float(own.mean()),
        best=best.describe(),
        best_fit=float(fits[best].mean()),
        remedy=_remedy(best, of_masks=of_masks, is_replayed=is_replayed) if clear else "",
        by_space=by_space,
    )


def _mask_boxes(masks: list[bytes], labels: LabeledMasks) -> list[str]:
    """The masks' bounding boxes as responses in pixels."""
    sizes = labels.image_hw.tolist()
    return [json.dumps({"bbox": rle_box_xyxy(mask, *hw)}) for mask, hw in zip(masks, sizes, strict=True)]


def _by_space(fits: dict[_Reading, DoubleArray], *, by_points: bool) -> dict[str, dict[CoordSpace, float | None]]:
    mean = {reading.space: percent(fit) for reading, fit in fits.items()}
    if by_points:
        return {"pointing_acc": mean}
    acc50 = {reading.space: percent((fit >= POSITIVE_IOU).astype(np.float64)) for reading, fit in fits.items()}
    return {"box_miou": mean, "box_acc50": acc50}


def _other_readings() -> Iterator[_Reading]:
    """Meanings that no setting expresses: other box forms, and pixels of an image of another size."""
    for space in COORD_SPACES:
        if not is_y_first(space):
            yield from (_Reading(space, form) for form in _FORM_NAMES)
    for side in _SIDES_PX:
        yield _Reading("resized_pixel", "xyxy", partial(_longer_side, side), f"about {side} px on the longer side")
        yield _Reading("resized_pixel", "xyxy", partial(_square, side), f"about {side} x {side} px")


def _longer_side(side: int, height: int, width: int) -> Hw:
    scale = side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _square(side: int, height: int, width: int) -> Hw:
    return side, side


def _boxes_fit(priors: list[ParsedPrior], labels: LabeledMasks) -> DoubleArray:
    """[N] IoU of each box with the true mask's box; 0 without a box."""
    boxes = np.array([prior.bbox or (0.0, 0.0, 0.0, 0.0) for prior in priors], dtype=np.float64).reshape(-1, 4)
    return iou_xyxy(boxes, labels.box_xyxy)


def _points_fit(priors: list[ParsedPrior], labels: LabeledMasks) -> DoubleArray:
    """[N] 1 for a point inside the true mask, else 0."""
    points = np.array([prior.point or (np.nan, np.nan) for prior in priors], dtype=np.float64).reshape(-1, 2)
    return hits(points, labels).astype(np.float64)


def _share_inverted(priors: list[ParsedPrior], as_corners: list[ParsedPrior]) -> float:
    """Share of responses with a box that give none if they are read as corners."""
    pairs = zip(priors, as_corners, strict=True)
    return float(np.mean([prior.bbox is not None and corners.bbox is None for prior, corners in pairs]))


def _is_clearly_better(other: DoubleArray, own: DoubleArray, labels: LabeledMasks, floor: float) -> bool:
    high, low = other.mean(), own.mean()
    if high < max(RATIO * low, low + MARGIN, floor):
        return False
    # Sentences about one object tend to be right or wrong together, so the object is the unit.
    gain = pd.Series(other - own).groupby(labels.ann_id).mean().to_numpy()
    gain = gain[gain != 0]
    if len(gain) < FEWEST_OBJECTS:
        return False
    from scipy.stats import wilcoxon  # takes a second to import

    return bool(wilcoxon(gain, alternative="greater").pvalue < MAX_P_VALUE)


def _remedy(best: _Reading, *, of_masks: bool, is_replayed: bool) -> str:
    if of_masks:
        return "write the masks in pixels of the stored images"
    if best.is_setting:
        return "set it (in the replay file, for lines that name their own)" if is_replayed else "set it"
    if best.form != "xyxy":
        return "convert the boxes to corners x1, y1, x2, y2" if is_replayed else "use another prompt (priors.prompt)"
    if is_replayed:
        return "give coord_space resized_pixel, and this size in input_height and input_width, in the replay file"
    return "set it to resized_pixel, and priors.max_image_px so that the model does not resize images again"
