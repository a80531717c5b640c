"""GrabCut (Rother et al., 2004): segment an object by its colors, starting from a rough estimate."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from l2l_core.core.arrays import DoubleArray
from l2l_core.core.boxes import clip_xyxy

Image = NDArray[np.uint8]
Mask = NDArray[np.bool_]

GRABCUT_SIDE_PX = 256
"""Longer side of the image for GrabCut. With shifted boxes, 128, 192, 256 and 320 px gave a mean IoU of 0.51, 0.54,
0.56 and 0.57; the box alone gave 0.49. Time grows with the area (`python -m bench.priors`)."""
GRABCUT_ITERATIONS = 1
"""More iterations take twice as long and gain nothing (`python -m bench.priors`)."""
GRABCUT_MARGIN = 0.5
"""Margin around the uncertain pixels, as a share of their height and width. On photos this margin gave a mean IoU of
0.63 from true boxes and 0.56 from shifted ones; the whole image (100) gave 0.60 and 0.57 (`python -m bench.priors`).
It saves time for small objects."""
MIN_SHARE = 0.1
"""A result smaller than this share of the initial foreground has lost the object."""

_MIN_PX = 16
_MIN_MARGIN_PX = 4


def grabcut(image_bgr: Image, trimap: NDArray[np.uint8]) -> Mask | None:
    """Foreground [H, W] of a BGR image [H, W, 3] from a trimap [H, W] of cv2.GC_*.

    None if foreground or background has too few pixels, or if almost none of the initial foreground remains.
    """
    cut = np.zeros(trimap.shape, dtype=np.bool_)
    around = _neighborhood(trimap)
    image_bgr, trimap = np.ascontiguousarray(image_bgr[around]), trimap[around].copy()  # OpenCV writes into it
    first_px = int(np.isin(trimap, (cv2.GC_FGD, cv2.GC_PR_FGD)).sum())
    # The color mixtures have five components and need at least as many pixels of foreground and of background.
    if min(first_px, trimap.size - first_px) < _MIN_PX:
        return None
    cv2.setRNGSeed(0)  # the mixtures start from random centers
    background, foreground = np.zeros((1, 65)), np.zeros((1, 65))  # the layout that OpenCV requires
    whole = (0, 0, trimap.shape[1], trimap.shape[0])  # ignored when a trimap is given
    cv2.grabCut(image_bgr, trimap, whole, background, foreground, GRABCUT_ITERATIONS, cv2.GC_INIT_WITH_MASK)
    cut[around] = np.isin(trimap, (cv2.GC_FGD, cv2.GC_PR_FGD))
    return cut if cut.sum() >= MIN_SHARE * first_px else None


def box_trimap(height: int, width: int, box_xyxy: DoubleArray, ring: float, core: float) -> NDArray[np.uint8]:
    """Trimap [height, width] of cv2.GC_* from a box in pixels.

    The box is probable foreground. A ring around it, `ring` of its sides wide, is probable background. The center of
    the box, with `core` of its sides, is sure foreground. Everything beyond the ring is sure background.
    """
    sides = np.tile(box_xyxy[2:] - box_xyxy[:2], 2)
    trimap = np.full((height, width), cv2.GC_BGD, dtype=np.uint8)
    for grown, value in ((ring, cv2.GC_PR_BGD), (0.0, cv2.GC_PR_FGD), ((core - 1) / 2, cv2.GC_FGD)):
        if value == cv2.GC_FGD and core == 0:
            continue
        moved = clip_xyxy(box_xyxy + grown * sides * [-1, -1, 1, 1], height, width)
        x1, y1, x2, y2 = (int(edge) for edge in np.rint(moved))
        trimap[y1:y2, x1:x2] = value
    return trimap


def _neighborhood(trimap: NDArray[np.uint8]) -> tuple[slice, slice]:
    """Rows and columns of the pixels that are not sure background, with GRABCUT_MARGIN on each side."""
    unsure = trimap != cv2.GC_BGD
    slices = []
    for axis in (1, 0):
        occupied = unsure.any(axis=axis).nonzero()[0]
        if not len(occupied):
            return slice(None), slice(None)
        margin = max(_MIN_MARGIN_PX, int(GRABCUT_MARGIN * (occupied[-1] - occupied[0] + 1)))
        slices.append(slice(max(0, occupied[0] - margin), occupied[-1] + 1 + margin))
    return slices[0], slices[1]
