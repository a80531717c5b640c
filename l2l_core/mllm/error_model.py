"""Error model of a multimodal LLM's boxes: perturbs true boxes at error rates measured on real models.

This is the only part of the priors that uses the ground truth. The rates come from recorded responses of real models
on RefCOCO testA (1,975 referred objects, one response each); docs/priors.md lists what is measured and what is assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator, Philox
from numpy.typing import NDArray

from l2l_core.core.arrays import BoolArray, DoubleArray
from l2l_core.core.boxes import iou_xyxy
from l2l_core.mllm.coords import MIN_SIDE_PX

IntArray = NDArray[np.int64]

IOU_EDGES = np.array([0.0, 0.05, 0.2, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0])
"""Bins of the IoU between a predicted box and the true one; the last bin includes 1."""
LOW_BINS = 3
"""Number of bins below IoU 0.5: only there can the box mark another object (IoU >= 0.5 with it)."""


@dataclass(frozen=True)
class ErrorModel:
    """How often a model's box falls into each IoU bin, and how often it then marks another object."""

    iou_share: tuple[float, ...]  # of all responses, one entry per bin of IOU_EDGES; the rest has no box
    wrong_object_share: tuple[float, float, float]  # of the responses in each low bin

    @property
    def wrong_object_rate(self) -> float:
        """Share of all responses that mark another annotated object."""
        return float(np.dot(self.iou_share[:LOW_BINS], self.wrong_object_share))


# iou_share: measured. wrong_object_share: counted over the other referred objects of the same photo, as
# "responses with IoU >= 0.5 with one of them / responses in the bin". Objects without a referring expression are not
# annotated there, so the true rate is higher.
#
# llava-1.5-7b: its histogram is measured, but no single responses are available to count wrong objects. Assumed: large
# misses (IoU < 0.05) are 4.9 times as frequent as with the other two models (0.126 against 0.0258), and so are
# responses about another object (0.033 there). Its boxes are looser, so only 0.62 times as many of these reach IoU 0.5
# with that object: 0.033 * 4.9 * 0.62 = 0.10 of all responses. The shares of the lowest two bins are those of the other
# two models (0.53, 0.47) times 0.62. The third bin gets the rest of the 0.10, since most of its many responses are
# loose boxes of the right object.
ERROR_MODELS: dict[str, ErrorModel] = {
    "qwen2.5-vl-7b": ErrorModel((0.021, 0.016, 0.037, 0.065, 0.084, 0.248, 0.335, 0.171), (29 / 42, 17 / 32, 17 / 73)),
    "internvl2.5-8b": ErrorModel((0.030, 0.021, 0.045, 0.076, 0.084, 0.239, 0.279, 0.216), (25 / 60, 17 / 41, 26 / 88)),
    "llava-1.5-7b": ErrorModel((0.126, 0.068, 0.316, 0.311, 0.114, 0.047, 0.011, 0.006), (0.33, 0.29, 0.12)),
}

SAME_CATEGORY_WEIGHT = 4.0
"""Odds ratio for confusing the target with another object of the same category: 126 of 131 wrong objects (96 %)
were of the target's category, as were 87 % of the candidates; (0.96 / 0.04) / (0.87 / 0.13) is about 4."""

CONFIDENCE_MEAN, CONFIDENCE_SPREAD, CONFIDENCE_GAIN, CONFIDENCE_STEP = 0.85, 0.07, 0.4, 0.05
"""Assumed, not measured: verbal confidence is high, comes in steps of 0.05 and hardly depends on whether the box is
right. A gain of 0.4 standard deviations for right boxes gives an AUROC of about 0.6."""

TRIES = 12
"""Random boxes tried before the two deterministic ones; nearly all rows are done after three."""
_BISECTIONS = 40  # halvings of a step of at most _FAR sides: the IoU is exact to float precision
_FAR = 8.0
_EDGE_MARGIN = 1e-3  # distance from a bin's ends, larger than the effect of rounding the written coordinates
_SIDE_MARGIN_PX = 0.1  # distance from the parser's smallest box, for the same reason
_SIZE_SPREAD = 0.3  # log-normal spread of a misplaced box's sides around the true ones


@dataclass(frozen=True)
class Draws:
    """Random numbers of N responses; each row depends on (seed, sent_id, sample_index) alone."""

    uniform: DoubleArray  # bin, position in it, wrong object?, which one, its bin, position in its bin
    confidence: DoubleArray  # [N] standard normal
    edges: DoubleArray  # [N, TRIES, 6] standard normal: shift x, y, then each edge
    place: DoubleArray  # [N, TRIES, 2] in [0, 1)


@dataclass(frozen=True)
class Scenes:
    """Ground truth of N questions, and the P other objects of their images, sorted by question."""

    true_xyxy: DoubleArray  # [N, 4] pixels, inside the image
    image_hw: IntArray  # [N, 2]
    other_row: IntArray  # [P] question that the object belongs to, ascending
    other_xyxy: DoubleArray  # [P, 4]
    other_same_category: BoolArray  # [P]

    def take(self, rows: IntArray) -> Scenes:
        """The questions of the given rows (ascending)."""
        new_row = np.full(len(self.true_xyxy), -1, dtype=np.int64)
        new_row[rows] = np.arange(len(rows))
        kept = new_row[self.other_row] >= 0
        return Scenes(
            self.true_xyxy[rows],
            self.image_hw[rows],
            new_row[self.other_row[kept]],
            self.other_xyxy[kept],
            self.other_same_category[kept],
        )

    def best_other_iou(self, boxes_xyxy: DoubleArray) -> DoubleArray:
        """[N, 4] -> [N] largest IoU with another object of the image; 0 if there is no other object."""
        best = np.zeros(len(boxes_xyxy))
        np.maximum.at(best, self.other_row, iou_xyxy(boxes_xyxy[self.other_row], self.other_xyxy))
        return best


@dataclass(frozen=True)
class DrawnBoxes:
    """N boxes drawn from the error model."""

    xyxy: DoubleArray  # original-image pixels, undefined if has_box is False
    has_box: BoolArray  # [N]
    confidence: DoubleArray  # [N] in [0, 1], the simulated verbal confidence


def random_draws(seed: int, sent_id: IntArray, sample_index: IntArray) -> Draws:
    """Random numbers of N responses; each row is independent of the other rows."""
    count = len(sent_id)
    uniform, confidence = np.empty((count, 6)), np.empty(count)
    edges, place = np.empty((count, TRIES, 6)), np.empty((count, TRIES, 2))
    for row, (sentence, sample) in enumerate(zip(sent_id.tolist(), sample_index.tolist(), strict=True)):
        # A counter-based generator has one stream per counter; the low words advance within the stream.
        rng = Generator(Philox(key=[seed, 0], counter=[0, 0, sentence % 2**64, sample]))
        uniform[row] = rng.random(6)
        confidence[row] = rng.standard_normal()
        edges[row] = rng.standard_normal((TRIES, 6))
        place[row] = rng.random((TRIES, 2))
    return Draws(uniform, confidence, edges, place)


def draw_boxes(model: ErrorModel, scenes: Scenes, draws: Draws) -> DrawnBoxes:
    """Draw a box for each of N questions.

    First draw the IoU bin, then a box with such an IoU with the true box. In the low bins, the box is another object of
    the scene (with a jitter) at the model's rate. If no other object of a scene overlaps the true box as a bin
    requires, the bin's share of wrong objects moves to the scene's bins that have one, up to their capacity. The IoU
    histogram does not change.
    """
    shares = np.asarray(model.iou_share)
    bins = np.searchsorted(np.cumsum(shares), draws.uniform[:, 0], side="right")
    has_box = bins < len(shares)
    bins = np.minimum(bins, len(shares) - 1)
    wanted_iou = _inside_bin(bins, draws.uniform[:, 1])

    fits = _bins_of_others(scenes)
    is_wrong = has_box & _marks_wrong_object(model, fits, scenes, bins, draws.uniform[:, 2])
    boxes = _boxes_at_iou(scenes, bins, wanted_iou, draws)
    rows = np.flatnonzero(is_wrong)
    if len(rows):
        boxes[rows] = _boxes_on_others(
            shares, scenes.take(rows), bins[rows], fits[is_wrong[scenes.other_row]], _take(draws, rows)
        )

    right = has_box & (bins >= LOW_BINS)
    said = CONFIDENCE_MEAN + CONFIDENCE_SPREAD * (draws.confidence + CONFIDENCE_GAIN * right)
    confidence = np.clip(np.round(said / CONFIDENCE_STEP) * CONFIDENCE_STEP, 0.5, 1.0)
    return DrawnBoxes(boxes, has_box, confidence)


def _take(draws: Draws, rows: IntArray) -> Draws:
    return Draws(draws.uniform[rows], draws.confidence[rows], draws.edges[rows], draws.place[rows])


def _inside_bin(bins: IntArray, place: DoubleArray) -> DoubleArray:
    """An IoU at a relative position within a bin, with a margin to its ends."""
    low, high = IOU_EDGES[bins] + _EDGE_MARGIN, IOU_EDGES[bins + 1] - _EDGE_MARGIN
    return np.asarray(low + place * (high - low))


def _is_in_bin(iou: DoubleArray, bins: IntArray) -> BoolArray:
    low = np.where(bins == 0, 0.0, IOU_EDGES[bins] + _EDGE_MARGIN / 2)
    return np.asarray((iou >= low) & (iou <= IOU_EDGES[bins + 1] - _EDGE_MARGIN / 2))


def _sides_are_readable(boxes: DoubleArray) -> BoolArray:
    return np.asarray((boxes[:, 2:] - boxes[:, :2]).min(axis=1) >= MIN_SIDE_PX + _SIDE_MARGIN_PX)


def _clip(boxes: DoubleArray, image_hw: IntArray) -> DoubleArray:
    return np.asarray(np.clip(boxes, 0.0, image_hw[:, [1, 0, 1, 0]]))


def _bins_of_others(scenes: Scenes) -> BoolArray:
    """[P, LOW_BINS] whether another object could be confused with the target at an IoU of that bin."""
    iou = iou_xyxy(scenes.true_xyxy[scenes.other_row], scenes.other_xyxy)
    usable = _sides_are_readable(scenes.other_xyxy)
    columns = [usable & _is_in_bin(iou, np.full(len(iou), low_bin)) for low_bin in range(LOW_BINS)]
    return np.stack(columns, axis=1)


def _marks_wrong_object(
    model: ErrorModel, fits: BoolArray, scenes: Scenes, bins: IntArray, uniform: DoubleArray
) -> BoolArray:
    """[N] whether the response is another object; False if no object of the scene fits the bin."""
    can = np.zeros((len(bins), LOW_BINS), dtype=bool)
    np.logical_or.at(can, scenes.other_row, fits)
    rate = np.array(model.iou_share[:LOW_BINS]) * np.array(model.wrong_object_share)
    reachable = can @ rate
    boost = np.divide(rate.sum(), reachable, out=np.zeros(len(bins)), where=reachable > 0)
    low = np.minimum(bins, LOW_BINS - 1)
    chance = boost * np.array(model.wrong_object_share)[low] * can[np.arange(len(bins)), low]
    return np.asarray((bins < LOW_BINS) & (uniform < chance))


def _boxes_at_iou(scenes: Scenes, bins: IntArray, wanted_iou: DoubleArray, draws: Draws) -> DoubleArray:
    """Boxes around (or, in the lowest bin, away from) the true ones, each with an IoU in its bin.

    A box of a low bin must not mark another object by accident, unless no other try succeeds. The last two tries shrink
    and grow the true box: one of them reaches any IoU that the image and the pixels allow. If both fail, the box stays
    the true one.
    """

    def propose(attempt: int, scenes: Scenes, wanted: DoubleArray, anywhere: BoolArray, draws: Draws) -> DoubleArray:
        if attempt >= TRIES:
            inwards = np.array([1.0, 1.0, -1.0, -1.0]) if attempt == TRIES else np.array([-1.0, -1.0, 1.0, 1.0])
            return _moved_to_iou(scenes.true_xyxy, np.tile(inwards, (len(wanted), 1)), scenes.image_hw, wanted)
        noise = draws.edges[:, attempt]
        moved = _moved_to_iou(scenes.true_xyxy, _directions(noise), scenes.image_hw, wanted)
        sides = (scenes.true_xyxy[:, 2:] - scenes.true_xyxy[:, :2]) * np.exp(_SIZE_SPREAD * noise[:, :2])
        room = np.maximum(scenes.image_hw[:, ::-1] - sides, 0.0)
        corner = draws.place[:, attempt] * room
        placed = _clip(np.concatenate([corner, corner + sides], axis=1), scenes.image_hw)
        return np.where(anywhere[:, None], placed, moved)

    boxes = scenes.true_xyxy.copy()
    open_rows = np.arange(len(boxes))
    for attempt in range(TRIES + 2):
        part = scenes.take(open_rows)
        tried = propose(attempt, part, wanted_iou[open_rows], bins[open_rows] == 0, _take(draws, open_rows))
        good = _is_in_bin(iou_xyxy(tried, part.true_xyxy), bins[open_rows]) & _sides_are_readable(tried)
        if attempt < TRIES:
            is_low = bins[open_rows] < LOW_BINS
            good &= ~is_low | (part.best_other_iou(tried) < IOU_EDGES[LOW_BINS] - _EDGE_MARGIN)
        boxes[open_rows[good]] = tried[good]
        open_rows = open_rows[~good]
        if not len(open_rows):
            break
    return boxes


def _boxes_on_others(shares: DoubleArray, scenes: Scenes, bins: IntArray, fits: BoolArray, draws: Draws) -> DoubleArray:
    """Boxes on another object of each scene, as tight as the model's right responses, each with an IoU in its bin."""
    weight = fits[np.arange(len(fits)), bins[scenes.other_row]] * np.where(
        scenes.other_same_category, SAME_CATEGORY_WEIGHT, 1.0
    )
    last = np.cumsum(weight)
    total = np.bincount(scenes.other_row, weight, minlength=len(bins))
    before = np.cumsum(total) - total
    chosen = np.searchsorted(last, before + draws.uniform[:, 3] * total, side="right")
    other = scenes.other_xyxy[chosen]

    right_shares = shares[LOW_BINS:] / shares[LOW_BINS:].sum()
    right_bins = LOW_BINS + np.searchsorted(np.cumsum(right_shares)[:-1], draws.uniform[:, 4], side="right")
    wanted_iou = _inside_bin(right_bins, draws.uniform[:, 5])
    boxes = other.copy()  # the object's own box is in the bin, by selection
    is_open = np.ones(len(boxes), dtype=bool)
    for attempt in range(TRIES):
        tried = _moved_to_iou(other, _directions(draws.edges[:, attempt]), scenes.image_hw, wanted_iou)
        good = is_open & _is_in_bin(iou_xyxy(tried, scenes.true_xyxy), bins) & _sides_are_readable(tried)
        good &= iou_xyxy(tried, other) >= IOU_EDGES[LOW_BINS]
        boxes[good] = tried[good]
        is_open &= ~good
    return boxes


def _directions(noise: DoubleArray) -> DoubleArray:
    """[N, 6] -> [N, 4]: how far each edge moves, in sides: a common shift plus an individual move."""
    return np.asarray(noise[:, [0, 1, 0, 1]] + noise[:, 2:])


def _moved_to_iou(
    boxes: DoubleArray, directions: DoubleArray, image_hw: IntArray, wanted_iou: DoubleArray
) -> DoubleArray:
    """Move the edges along `directions` until the box, clipped to the image, has the wanted IoU with its start.

    The IoU starts at 1 and changes continuously, so bisection finds the wanted value if the path reaches it.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    step = directions * np.concatenate([sides, sides], axis=1)
    near, far = np.zeros(len(boxes)), np.full(len(boxes), _FAR)
    for _ in range(_BISECTIONS):
        middle = (near + far) / 2
        is_above = iou_xyxy(_clip(boxes + middle[:, None] * step, image_hw), boxes) > wanted_iou
        near, far = np.where(is_above, middle, near), np.where(is_above, far, middle)
    return _clip(boxes + near[:, None] * step, image_hw)
