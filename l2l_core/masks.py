"""Binary masks as COCO compressed run lengths, through pycocotools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

BoolMask = NDArray[np.bool_]


def encode_rle(mask: NDArray[Any]) -> bytes:
    """[H, W] mask (nonzero is foreground) -> COCO compressed counts."""
    return bytes(coco_mask.encode(np.asfortranarray(np.asarray(mask) != 0).astype(np.uint8))["counts"])


def decode_rle(counts: bytes, height: int, width: int) -> BoolMask:
    """COCO compressed counts -> [H, W] bool. The counts must belong to a mask of that size."""
    return np.asarray(coco_mask.decode({"size": [height, width], "counts": counts}), dtype=bool)


def rle_area_px(counts: bytes, height: int, width: int) -> int:
    """Foreground pixels of a mask, without decoding it."""
    return int(coco_mask.area({"size": [height, width], "counts": counts}))


def intersection_union_px(
    first: Sequence[bytes], second: Sequence[bytes], sizes_hw: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Pixels in the intersection and in the union of mask pairs, on the run lengths; N pairs -> [N, 2] int64.

    sizes_hw: [N, 2] height and width that both masks of a pair share.
    """
    result = np.empty((len(first), 2), dtype=np.int64)
    for row, (a, b, (height, width)) in enumerate(zip(first, second, sizes_hw.tolist(), strict=True)):
        pair = [{"size": [height, width], "counts": a}, {"size": [height, width], "counts": b}]
        result[row, 0] = coco_mask.area(coco_mask.merge(pair, intersect=True))
        result[row, 1] = coco_mask.area(coco_mask.merge(pair, intersect=False))
    return result


def segmentation_to_rle(segmentation: object, height: int, width: int) -> bytes:
    """A COCO `segmentation` (polygons, compressed or uncompressed RLE) -> compressed counts.

    Several polygons are united. Raises ValueError that says what is wrong with it.
    """
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if size != [height, width]:
            raise ValueError(f"segmentation.size: got {size}, expected [{height}, {width}] (the image's height, width)")
        if isinstance(counts, list):
            if any(not isinstance(run, int) or run < 0 for run in counts) or sum(counts) != height * width:
                raise ValueError(f"segmentation.counts: runs must be >= 0 and add up to {height * width}")
            return bytes(coco_mask.frPyObjects(segmentation, height, width)["counts"])
        if isinstance(counts, str | bytes):
            return _checked_counts(counts.encode("ascii") if isinstance(counts, str) else counts, height, width)
        raise ValueError(f"segmentation.counts: got {type(counts).__name__}, expected a string or a list of runs")
    if isinstance(segmentation, list) and segmentation:
        for polygon in segmentation:
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                raise ValueError("segmentation: each polygon needs x, y for at least 3 points")
            if not all(isinstance(value, int | float) and np.isfinite(value) for value in polygon):
                raise ValueError("segmentation: polygon coordinates must be finite numbers")
        parts = coco_mask.frPyObjects(segmentation, height, width)
        return bytes(coco_mask.merge(parts)["counts"])
    raise ValueError(f"segmentation: got {'an empty list' if segmentation == [] else type(segmentation).__name__}")


def resize_mask(mask: BoolMask, height: int, width: int) -> BoolMask:
    """Nearest-neighbour resize of a [H, W] mask."""
    resized = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    return np.asarray(resized, dtype=bool)


def _checked_counts(counts: bytes, height: int, width: int) -> bytes:
    """Refuse compressed counts whose runs do not fill the image: the C decoder would read or write out of bounds."""
    runs: list[int] = []
    run, shift, position = 0, 0, 0
    while position < len(counts):
        chunk = counts[position] - 48
        if not 0 <= chunk < 64:
            raise ValueError("segmentation.counts: not a COCO compressed run-length string")
        run |= (chunk & 0x1F) << shift
        shift += 5
        position += 1
        if not chunk & 0x20:
            if chunk & 0x10:
                run |= -1 << shift
            runs.append(run + (runs[-2] if len(runs) > 2 else 0))
            run, shift = 0, 0
    if shift or any(run < 0 for run in runs) or sum(runs) != height * width:
        raise ValueError(f"segmentation.counts: runs must be complete and add up to {height * width} pixels")
    return counts
