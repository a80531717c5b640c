"""GrabCut (Rother et al., 2004): which pixels belong together by their colours, from a rough idea of the object."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Mask = NDArray[np.bool_]

GRABCUT_SIDE_PX = 256
"""Longer side of the image that GrabCut works on. From moved boxes 128, 192, 256 and 320 px gave a mean IoU of 0.52,
0.55, 0.57 and 0.57, in time that grows with the area; the box alone 0.49 (`python -m bench.priors`)."""
GRABCUT_ITERATIONS = 1
"""More take twice as long and gain a point at most (`python -m bench.priors`)."""
MIN_SHARE = 0.1
"""A cut smaller than this share of the first idea has lost the object."""

_MIN_PX = 16


def grabcut(image_bgr: Image, trimap: NDArray[np.uint8]) -> Mask | None:
    """Foreground [H, W] found in an image [H, W, 3] from a trimap [H, W] of cv2.GC_*, which is changed in place.

    None where there is too little to read on either side, or where next to nothing is left of the first idea.
    """
    first_px = int(np.isin(trimap, (cv2.GC_FGD, cv2.GC_PR_FGD)).sum())
    # Its colour mixtures have five components and need at least as many pixels on either side.
    if min(first_px, trimap.size - first_px) < _MIN_PX:
        return None
    cv2.setRNGSeed(0)  # the mixtures start from random centres
    background, foreground = np.zeros((1, 65)), np.zeros((1, 65))  # the layout that OpenCV wants
    whole = (0, 0, trimap.shape[1], trimap.shape[0])  # not read where the labels are given
    cv2.grabCut(image_bgr, trimap, whole, background, foreground, GRABCUT_ITERATIONS, cv2.GC_INIT_WITH_MASK)
    cut = np.isin(trimap, (cv2.GC_FGD, cv2.GC_PR_FGD))
    return cut if cut.sum() >= MIN_SHARE * first_px else None
