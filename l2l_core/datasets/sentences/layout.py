"""Measurements of the annotated objects of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from l2l_core.core.masks import BoolMask, decode_rle, rle_area_px, rle_box_xyxy

GRID = 160
"""Cells along the longer side, on which distances are measured: finer than every margin of the solver."""


@dataclass(frozen=True)
class Annotated:
    """One annotation. rle: run lengths at the image's size; b"" if it has no pixel."""

    kind: str
    rle: bytes
    is_crowd: bool = False


@dataclass(frozen=True)
class Layout:
    """N objects. x and width in shares of the image's width, y and height of its height, gaps of its longer side."""

    kind: NDArray[np.str_]  # [N]
    is_crowd: NDArray[np.bool_]  # [N] a region of many objects, or one without a mask: it cannot be counted
    box: NDArray[np.float64]  # [N, 4] x1 y1 x2 y2
    area: NDArray[np.float64]  # [N] of the mask, a share of the image
    gap: NDArray[np.float64]  # [N, N] free space between two masks; 0: they touch
    in_one_piece: NDArray[np.float64]  # [N] share of the mask in its largest part
    aspect: float  # width / height of the image

    @property
    def center(self) -> NDArray[np.float64]:
        """[N, 2] x, y of the boxes' centers."""
        return (self.box[:, :2] + self.box[:, 2:]) / 2

    @property
    def size(self) -> NDArray[np.float64]:
        """[N, 2] width and height of the boxes."""
        return self.box[:, 2:] - self.box[:, :2]


def measure(objects: Sequence[Annotated], height: int, width: int) -> Layout:
    """Measure all annotated objects of an image of that size in pixels."""
    count, cells = len(objects), -(-max(height, width) // GRID)
    box, area, pieces = np.zeros((count, 4)), np.zeros(count), np.ones(count)
    coarse = np.zeros((count, -(-height // cells), -(-width // cells)), dtype=bool)
    gap = np.full((count, count), np.inf)
    for index, item in enumerate(objects):
        if not item.rle:
            continue
        box[index] = np.array(rle_box_xyxy(item.rle, height, width)) / (width, height, width, height)
        area[index] = rle_area_px(item.rle, height, width) / (height * width)
        coarse[index] = _coarse(decode_rle(item.rle, height, width), cells)
        pieces[index] = _largest_part(coarse[index])
    measured = np.flatnonzero(area)
    inside = [np.flatnonzero(coarse[index]) for index in measured]
    starts = np.cumsum([0, *map(len, inside[:-1])])
    for index in measured:
        away = cv2.distanceTransform((~coarse[index]).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        nearest = np.minimum.reduceat(away.ravel()[np.concatenate(inside)], starts)
        gap[index, measured] = np.maximum(nearest - 1, 0) * cells / max(height, width)  # neighboring cells touch
    return Layout(
        kind=np.array([item.kind for item in objects], dtype=np.str_),
        is_crowd=np.array([item.is_crowd or not item.rle for item in objects], dtype=bool),
        box=box,
        area=area,
        gap=gap,
        in_one_piece=pieces,
        aspect=width / height,
    )


def _coarse(mask: BoolMask, cells: int) -> BoolMask:
    """Blocks of cells x cells pixels that hold a pixel of the mask, so that no mask vanishes."""
    height, width = mask.shape
    padded = np.pad(mask, ((0, -height % cells), (0, -width % cells))).astype(np.float32)
    size = padded.shape[1] // cells, padded.shape[0] // cells
    return np.asarray(cv2.resize(padded, size, interpolation=cv2.INTER_AREA) > 0)


def _largest_part(mask: BoolMask) -> float:
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    parts = stats[1:, cv2.CC_STAT_AREA]
    return float(parts.max() / parts.sum())
