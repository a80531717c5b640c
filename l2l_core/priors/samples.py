"""The responses to each sentence as arrays: where they place the object, and how well they agree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from l2l_core.core.arrays import DoubleArray
from l2l_core.core.boxes import iou_xyxy
from l2l_core.core.masks import intersection_union_px
from l2l_core.core.metrics import iou_from_px
from l2l_core.errors import ArtifactError
from l2l_core.priors.renderers import POINT_SIDE

MIN_CONFIDENCE = 0.01
"""Keeps a proposal's score above 0, which means `no prior`, if a model reports confidence 0."""


@dataclass(frozen=True)
class PriorSamples:
    """N sentences with K responses each; coordinates in original-image pixels, zeros if missing."""

    sent_id: NDArray[np.int64]  # [N] ascending
    image_row: NDArray[np.int64]  # [N] row of the images table
    image_hw: NDArray[np.int64]  # [N, 2]
    box_xyxy: DoubleArray  # [N, K, 4]
    has_box: NDArray[np.bool_]  # [N, K]
    point_xy: DoubleArray  # [N, K, 2]
    has_point: NDArray[np.bool_]  # [N, K] a point and no box
    mask: NDArray[np.object_]  # [N, K] run lengths at the image's size, or None
    has_mask: NDArray[np.bool_]  # [N, K] a mask and its box
    any_point: NDArray[np.bool_]  # [N, K] a point, with or without a box
    confidence: DoubleArray  # [N, K] in [0, 1], reported by the model; 1 if missing

    def take(self, rows: NDArray[np.int64]) -> PriorSamples:
        """The sentences of the given rows, in that order."""
        return PriorSamples(**{name: column[rows] for name, column in vars(self).items()})


def to_samples(priors: pa.Table, refs: pd.DataFrame, images: pd.DataFrame) -> PriorSamples:
    """The responses of all sentences; tables as in `make_proposals`. Raises ArtifactError if they do not match."""
    priors = priors.sort_by([("sent_id", "ascending"), ("sample_index", "ascending")])
    sent_id = priors["sent_id"].to_numpy()
    responses = int(pc.max(priors["sample_index"]).as_py() or 0) + 1
    shape = (len(sent_id) // responses, responses)
    is_whole = len(sent_id) == shape[0] * responses
    if not is_whole or (priors["sample_index"].to_numpy().reshape(shape) != np.arange(responses)).any():
        raise ArtifactError(f"priors: sentences differ in their number of responses (up to {responses}); run dvc repro")
    sent_id = sent_id.reshape(shape)[:, 0]
    image_id = refs.set_index("sent_id")["image_id"].reindex(sent_id)
    if image_id.isna().any() or len(refs) != len(sent_id):
        raise ArtifactError("priors: their sentences are not those of the index; run dvc repro")
    image_row = pd.Index(images["image_id"]).get_indexer(image_id)
    box_xyxy, has_box = _fixed_lists(priors["bbox"], 4)
    point_xy, has_point = _fixed_lists(priors["point"], 2)
    mask = np.array(priors["mask"].to_pylist(), dtype=np.object_)
    return PriorSamples(
        sent_id=sent_id,
        image_row=image_row,
        image_hw=images[["height", "width"]].to_numpy(np.int64)[image_row],
        box_xyxy=box_xyxy.reshape(*shape, 4),
        has_box=has_box.reshape(shape),
        point_xy=point_xy.reshape(*shape, 2),
        has_point=(has_point & ~has_box).reshape(shape),
        mask=mask.reshape(shape),
        has_mask=priors["mask"].is_valid().to_numpy().reshape(shape),
        any_point=has_point.reshape(shape),
        confidence=priors["score"].fill_null(1.0).to_numpy().astype(np.float64).reshape(shape),
    )


def prior_score(samples: PriorSamples) -> DoubleArray:
    """[N] reliability of a proposal, in (0, 1]; 0 for a sentence without any response that gives a place.

    Share of the responses that give a place x their agreement x their mean confidence. Agreement is the expected IoU of
    two of them drawn with replacement: 1 for one response or equal ones, 1 / m for m disjoint ones. It is the IoU of
    masks where both are masks, else of boxes.
    """
    located = samples.has_box | samples.has_point
    boxes = np.where(samples.has_box[..., None], samples.box_xyxy, _point_box(samples.point_xy, samples.image_hw))
    both = located[:, :, None] & located[:, None, :]
    iou = iou_xyxy(boxes[:, :, None], boxes[:, None, :])
    row, first, second = np.nonzero(np.triu(samples.has_mask[:, :, None] & samples.has_mask[:, None, :], 1))
    pixels = intersection_union_px(
        samples.mask[row, first].tolist(), samples.mask[row, second].tolist(), samples.image_hw[row]
    )
    iou[row, first, second] = iou[row, second, first] = iou_from_px(*pixels.T)
    agreement = (iou * both).sum(axis=(1, 2)) / np.maximum(both.sum(axis=(1, 2)), 1)
    count = located.sum(axis=1)
    confidence = (np.maximum(samples.confidence, MIN_CONFIDENCE) * located).sum(axis=1) / np.maximum(count, 1)
    return np.asarray(count / located.shape[1] * agreement * confidence)


def _fixed_lists(column: pa.ChunkedArray, length: int) -> tuple[DoubleArray, NDArray[np.bool_]]:
    """A column of lists or nulls -> [N, length] with zeros for null, and [N] whether a list is present."""
    is_there = column.is_valid().to_numpy()
    values = np.zeros((len(column), length))
    values[is_there] = column.drop_null().combine_chunks().flatten().to_numpy().reshape(-1, length)
    return values, is_there


def _point_box(point_xy: DoubleArray, image_hw: NDArray[np.int64]) -> DoubleArray:
    """[N, K, 2] points -> [N, K, 4] squares with the assumed side of an object around a point."""
    half = POINT_SIDE / 2 * np.sqrt(image_hw[:, 0] * image_hw[:, 1])[:, None, None]
    return np.concatenate([point_xy - half, point_xy + half], axis=-1)
