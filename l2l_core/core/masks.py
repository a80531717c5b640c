"""Binary masks as COCO compressed run lengths, through pycocotools."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from l2l_core.errors import short_repr

BoolMask = NDArray[np.bool_]

MAX_MASK_PX = 2**27
"""Pixels of the largest mask, more than an image may have (core/images.py). pycocotools counts them in 32 bits."""
MAX_EDGES_PX = 2**21
"""Length of all edges of a mask's polygons. pycocotools takes memory for it, about 100 bytes per pixel, unchecked."""

_MAX_RUN = 2**32 - 1  # pycocotools stores runs as 32-bit unsigned integers
_MAX_CHUNKS = 7  # most 5-bit characters that a 32-bit run needs


def encode_rle(mask: NDArray[Any]) -> bytes:
    """[H, W] mask (nonzero is foreground) -> COCO compressed counts.

    >>> encode_rle(np.array([[0, 1], [0, 1]]))
    b'22'
    """
    return bytes(coco_mask.encode(np.asfortranarray(np.asarray(mask) != 0).astype(np.uint8))["counts"])


def decode_rle(counts: bytes, height: int, width: int) -> BoolMask:
    """COCO compressed counts -> [H, W] bool. The counts must belong to a mask of that size.

    >>> decode_rle(b"22", 2, 2).tolist()
    [[False, True], [False, True]]
    """
    return np.asarray(coco_mask.decode({"size": [height, width], "counts": counts}), dtype=bool)


def rle_area_px(counts: bytes, height: int, width: int) -> int:
    """Foreground pixels of a mask, without decoding it."""
    return int(coco_mask.area({"size": [height, width], "counts": counts}))


def rle_area_px_all(counts: Sequence[bytes], sizes_hw: NDArray[np.int64]) -> NDArray[np.int64]:
    """Foreground pixels of N masks, without decoding them; sizes_hw: [N, 2] height, width -> [N] int64."""
    # One by one: pycocotools 2.0.11 under numpy 2 fails on a list of more than 255 masks.
    areas = (coco_mask.area({"size": size, "counts": one}) for one, size in zip(counts, sizes_hw.tolist(), strict=True))
    return np.fromiter(areas, dtype=np.int64, count=len(counts))


def rle_box_xyxy(counts: bytes, height: int, width: int) -> tuple[float, float, float, float]:
    """Tight box x1 y1 x2 y2 (end-exclusive, pixels) around a non-empty mask."""
    x, y, box_width, box_height = coco_mask.toBbox({"size": [height, width], "counts": counts}).tolist()
    return x, y, x + box_width, y + box_height


def union_rle(counts: Sequence[bytes], height: int, width: int) -> bytes:
    """The union of at least one mask of one size.

    >>> union_rle([encode_rle(np.array([[1, 0], [0, 0]])), encode_rle(np.array([[0, 1], [0, 1]]))], 2, 2) == encode_rle(
    ...     np.array([[1, 1], [0, 1]])
    ... )
    True
    """
    return bytes(coco_mask.merge([{"size": [height, width], "counts": one} for one in counts])["counts"])


def intersection_union_px(
    first: Sequence[bytes], second: Sequence[bytes], sizes_hw: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Pixels in the intersection and in the union of mask pairs, from the run lengths; N pairs -> [N, 2] int64.

    sizes_hw: [N, 2] height and width of both masks of each pair.
    """
    intersection = rle_area_px_all(_common(first, second, sizes_hw), sizes_hw)
    union = rle_area_px_all(first, sizes_hw) + rle_area_px_all(second, sizes_hw) - intersection
    return np.stack([intersection, union], axis=1)


def wrong_kept_px(
    label: Sequence[bytes], truth: Sequence[bytes], keep: Sequence[bytes], sizes_hw: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Kept pixels, and kept pixels where label and truth differ; N triples of masks -> [N, 2] int64.

    sizes_hw: [N, 2] height and width of the three masks of each triple.
    """
    kept_label, kept_truth = _common(keep, label, sizes_hw), _common(keep, truth, sizes_hw)
    kept_both = rle_area_px_all(_common(kept_label, kept_truth, sizes_hw), sizes_hw)
    wrong = rle_area_px_all(kept_label, sizes_hw) + rle_area_px_all(kept_truth, sizes_hw) - 2 * kept_both
    return np.stack([rle_area_px_all(keep, sizes_hw), wrong], axis=1)


_POLYGONS = "each polygon needs one flat list: x1, y1, x2, y2, x3, y3, ..."


def segmentation_to_rle(segmentation: object, height: int, width: int) -> bytes:
    """A COCO `segmentation` (polygons, compressed or uncompressed RLE) -> compressed counts.

    The result is the union of all polygons. All input is checked here, because pycocotools' C code trusts its input.
    Raises ValueError with a description of the problem.
    """
    if isinstance(segmentation, dict):
        if not {"size", "counts"} & set(segmentation):
            keys = ", ".join(map(repr, segmentation)) or "none"
            raise ValueError(f"segmentation: got an object with the keys {keys}, expected polygons or size and counts")
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if size != [height, width]:
            raise ValueError(
                f"segmentation.size: got {short_repr(size)}, expected [{height}, {width}] (the image's height, width)"
            )
        if isinstance(counts, list):
            return _runs_to_rle(_listed_runs(counts), height, width)
        if isinstance(counts, str | bytes):
            return _runs_to_rle(_compressed_runs(counts), height, width)
        raise ValueError(f"segmentation.counts: got {type(counts).__name__}, expected a string or a list of runs")
    if isinstance(segmentation, list) and segmentation:
        if all(isinstance(part, list) and len(part) == 2 for part in segmentation):
            raise ValueError(f"segmentation: got points as [x, y]; {_POLYGONS}")
        _check_size(height, width)
        for polygon in segmentation:
            _check_polygon(polygon, height, width)
        if (length := sum(map(_edges_px, segmentation))) > MAX_EDGES_PX:
            raise ValueError(
                f"segmentation: the edges of the polygons are {length:.0f} px long, expected at most {MAX_EDGES_PX}"
            )
        return bytes(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))["counts"])
    got = "an empty list" if segmentation == [] else type(segmentation).__name__
    raise ValueError(f"segmentation: got {got}, expected polygons or run lengths")


def resize_mask(mask: BoolMask, height: int, width: int) -> BoolMask:
    """Nearest-neighbor resize of a [H, W] mask: each new pixel takes the old pixel that contains its center."""
    # Not INTER_NEAREST: it takes the old pixel at the new pixel's corner, which shifts a shrunk mask against its image
    # by half a new pixel.
    resized = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(resized, dtype=bool)


def resize_prob(prob: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Bilinear resize of a [H, W] probability map."""
    if prob.shape == (height, width):
        return prob
    return np.asarray(cv2.resize(prob, (width, height), interpolation=cv2.INTER_LINEAR), dtype=np.float32)


def cell_shares(mask: BoolMask, height: int, width: int) -> NDArray[np.float32]:
    """A mask [H, W] -> map [height, width] of the share of each cell's area that the mask covers, 0..1.

    >>> cell_shares(np.array([[True, False], [True, True]]), 1, 2).tolist()
    [[1.0, 0.5]]
    """
    for axis, side in enumerate((height, width)):  # OpenCV's area shares are exact only if no side grows
        mask = mask.repeat(-(-side // mask.shape[axis]), axis)
    shares = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(shares, dtype=np.float32)


def cut_proposal(soft: NDArray[np.uint8], height: int, width: int) -> bytes:
    """A soft map [h, w] uint8 (0..255 is 0..1) -> run lengths of the pixels above 0.5 at the image's size, bilinear."""
    # Resized transposed: run lengths are column-major, so this order avoids a copy.
    large = cv2.resize(soft.T.astype(np.float32), (height, width), interpolation=cv2.INTER_LINEAR)
    return encode_rle((large > 127.5).T)


def square_px(reach: float) -> NDArray[np.uint8]:
    """Square structuring element for dilation and erosion by `reach` pixels (at least one) to each side."""
    size = 2 * max(1, round(reach)) + 1
    return np.ones((size, size), dtype=np.uint8)


def _common(first: Sequence[bytes], second: Sequence[bytes], sizes_hw: NDArray[np.int64]) -> list[bytes]:
    """The intersections of mask pairs."""
    return [
        coco_mask.merge([{"size": size, "counts": a}, {"size": size, "counts": b}], intersect=True)["counts"]
        for a, b, size in zip(first, second, sizes_hw.tolist(), strict=True)
    ]


def _check_size(height: int, width: int) -> None:
    if not 1 <= height * width <= MAX_MASK_PX:
        raise ValueError(f"segmentation: got an image of {width}x{height} px, expected 1 to {MAX_MASK_PX} pixels")


def _check_polygon(polygon: object, height: int, width: int) -> None:
    if not isinstance(polygon, list):
        raise ValueError(f"segmentation: got {type(polygon).__name__} for a polygon; {_POLYGONS}")
    if any(isinstance(part, list | dict) for part in polygon):
        raise ValueError(f"segmentation: got a polygon of lists or objects; {_POLYGONS}")
    if len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(f"segmentation: each polygon needs x, y for at least 3 points, got {len(polygon)} numbers")
    # Exact types: a bool is not a coordinate, and numpy would accept a string.
    if not set(map(type, polygon)) <= {int, float}:
        raise ValueError("segmentation: polygon coordinates must be numbers")
    # Annotation tools overshoot the border by a few pixels, never by a whole image.
    low, high = min(polygon), max(polygon)
    side = max(height, width)
    if not (-side <= low and high <= 2 * side and all(map(math.isfinite, polygon))):
        raise ValueError(
            f"segmentation: polygon coordinates reach from {_short(low)} to {_short(high)}, expected numbers in or "
            f"near an image of {width}x{height} pixels"
        )


def _short(value: float) -> str:
    """A number for an error message, cut because an integer may have hundreds of digits."""
    text = str(value)
    return text if len(text) <= 20 else f"{text[:20]}... ({len(text)} characters)"


def _edges_px(polygon: list[float]) -> float:
    """Length of the closed outline as pycocotools walks it: the longer of width and height of each edge, rounded up."""
    corners = np.reshape(np.asarray(polygon, dtype=np.float64), (-1, 2))
    return float(np.ceil(np.abs(np.roll(corners, -1, axis=0) - corners).max(axis=1) + 1).sum())


def _listed_runs(counts: list[object]) -> NDArray[np.int64]:
    """Uncompressed counts as an array."""
    if not all(type(run) is int and 0 <= run <= _MAX_RUN for run in counts):
        raise ValueError("segmentation.counts: the runs must be whole numbers >= 0")
    return np.array(counts, dtype=np.int64)


def _compressed_runs(counts: str | bytes) -> NDArray[np.int64]:
    """The runs in COCO's compressed counts.

    Each run is a sequence of 6-bit characters, offset by "0": 5 bits of a two's complement number, lowest first, and a
    flag that more follow. From the fourth run on, the number is the difference from the run two places earlier.
    """
    raw = counts.encode("utf-8", "surrogatepass") if isinstance(counts, str) else counts
    chunks = np.frombuffer(raw, dtype=np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(chunks & 0x20 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    if (chunks < 0).any() or (chunks > 63).any() or not len(last) or last[-1] != len(chunks) - 1:
        raise ValueError("segmentation.counts: not a COCO compressed run-length string, or cut off")
    length = last - first + 1
    if (length > _MAX_CHUNKS).any():
        raise ValueError("segmentation.counts: a run is longer than any image")
    position = np.arange(len(chunks)) - np.repeat(first, length)
    runs = np.add.reduceat((chunks & 0x1F) << (5 * position), first)
    runs -= np.where(chunks[last] & 0x10, np.int64(1) << (5 * length), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return np.asarray(runs)


def _runs_to_rle(runs: NDArray[np.int64], height: int, width: int) -> bytes:
    """Alternating background and foreground runs -> compressed counts, with empty runs merged away."""
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"segmentation.counts: runs must be >= 0 and add up to {height * width} pixels")
    _check_size(height, width)
    # If two masks both have an empty run at one place, pycocotools' merge stops there. So drop empty runs, then add up
    # neighboring runs of the same kind.
    kind = np.arange(len(runs)) % 2
    runs, kind = runs[runs > 0], kind[runs > 0]
    starts = np.flatnonzero(np.diff(kind, prepend=-1))
    merged = np.add.reduceat(runs, starts).tolist()
    whole = {"size": [height, width], "counts": [0, *merged] if kind[0] else merged}
    return bytes(coco_mask.frPyObjects(whole, height, width)["counts"])
