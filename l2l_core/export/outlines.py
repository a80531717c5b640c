"""Masks as COCO's `segmentation`: run lengths, or polygons that reproduce the mask exactly."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from contourpy import FillType, contour_generator
from numpy.typing import NDArray

from l2l_core.core.masks import BoolMask, decode_rle

Segmentation = dict[str, object] | list[list[float]]


def to_segmentation(rle_counts: bytes, height: int, width: int, *, polygons: bool) -> Segmentation:
    """Compressed counts of a mask -> `segmentation` of COCO files and the JSON lines of `dataset`, ready for JSON."""
    if polygons:
        return mask_to_polygons(decode_rle(rle_counts, height, width))
    return {"size": [height, width], "counts": rle_counts.decode("ascii")}


def mask_to_polygons(mask: BoolMask) -> list[list[float]]:
    """[H, W] mask -> COCO polygons, one per connected part: x, y, x, y, ... in pixels; none for an empty mask.

    Lines run halfway between the centers of inner and outer pixels: filling by pixel centers, as pycocotools does,
    restores the mask. A hole is part of its polygon, joined by a line that goes there and back.
    """
    # The border closes contours at the image's edge. A pixel's center is at + 0.5, and the border shifts by 1.
    bordered = np.pad(mask, 1).astype(np.float64)
    found = contour_generator(z=bordered, name="serial", fill_type=FillType.OuterOffset).filled(0.5, np.inf)
    polygons = []
    for points, offsets in zip(*found, strict=True):
        rings = [_corners(points[a:b]) - 0.5 for a, b in pairwise(offsets)]
        start = rings[0][:1]
        path = [rings[0], *(part for hole in rings[1:] for part in (start, hole, hole[:1]))]
        polygons.append(np.concatenate(path).ravel().tolist())
    return polygons


def _corners(ring: NDArray[np.float64]) -> NDArray[np.float64]:
    """A closed ring [N + 1, 2] without its last point and without points in the middle of a straight line."""
    step = np.diff(ring, axis=0)
    before = np.roll(step, 1, axis=0)
    return ring[:-1][step[:, 0] * before[:, 1] != step[:, 1] * before[:, 0]]
