"""Boxes: x1 y1 x2 y2 in pixels, end-exclusive, as float arrays of shape [..., 4]."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from l2l_core.core.arrays import DoubleArray


def xywh_to_xyxy(box_xywh: ArrayLike) -> DoubleArray:
    """COCO x, y, width, height -> x1, y1, x2, y2; shape [..., 4], pixels."""
    box = np.asarray(box_xywh, dtype=np.float64)
    return np.concatenate([box[..., :2], box[..., :2] + box[..., 2:]], axis=-1)


def clip_xyxy(box_xyxy: ArrayLike, height: int, width: int) -> DoubleArray:
    """Clip boxes [..., 4] to the image; a box outside it becomes empty (zero area)."""
    box = np.asarray(box_xyxy, dtype=np.float64)
    return np.clip(box, 0.0, np.array([width, height, width, height], dtype=np.float64))


def area_xyxy(box_xyxy: ArrayLike) -> DoubleArray:
    """Area in square pixels, 0 for an inverted box; [..., 4] -> [...]."""
    box = np.asarray(box_xyxy, dtype=np.float64)
    sides = np.clip(box[..., 2:] - box[..., :2], 0.0, None)
    return np.asarray(sides[..., 0] * sides[..., 1])


def iou_xyxy(a_xyxy: ArrayLike, b_xyxy: ArrayLike) -> DoubleArray:
    """IoU in [0, 1] of broadcastable boxes, [..., 4] x [..., 4] -> [...]; two empty boxes give 0."""
    a, b = np.asarray(a_xyxy, dtype=np.float64), np.asarray(b_xyxy, dtype=np.float64)
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    sides = np.clip(high - low, 0.0, None)
    intersection = sides[..., 0] * sides[..., 1]
    union = area_xyxy(a) + area_xyxy(b) - intersection
    return np.asarray(np.divide(intersection, union, out=np.zeros_like(union), where=union > 0))
