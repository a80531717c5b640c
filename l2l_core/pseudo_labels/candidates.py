"""Candidate masks: several masks per sentence, from which the policy chooses the pseudo-label."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from l2l_core.core.arrays import BoolArray
from l2l_core.core.grabcut import GRABCUT_SIDE_PX, grabcut
from l2l_core.core.masks import resize_prob, square_px
from l2l_core.data.views import Views
from l2l_core.pseudo_labels.features import LABEL_THRESHOLD

CORE = 1 / 48
"""Sharpening keeps pixels that are deeper inside a mask than this fraction of the image side. A teacher's borders are
soft by a pixel or two of its coarse output."""

REACH = 1 / 16
"""How far a sharpened mask may extend beyond the original, as a fraction of the image side."""


def build_candidates(
    views: Views, names: Sequence[str], sam: BoolArray | None = None, neighbor: BoolArray | None = None
) -> BoolArray:
    """Build the K candidates `names` (of features.CANDIDATES) for each of B sentences: bool [B, K, M, M].

    teacher: probability above 0.5, the threshold of evaluation.
    ensemble: mean of the teacher's three views (with prior, mirrored, without prior) above 0.5.
    sharpened: mean of the two views with the prior above 0.5, fitted to the image's colors (`sharpen`).
    prior: the proposal above 0.5. It can be right even if the teacher ignores it.
    overlap, union: intersection and union of sharpened and prior.
    neighbor: priors [B, M, M] of other sentences of the images (neighbors.py).
    sam: SAM's masks [B, M, M] for the teacher's masks as prompts (sam_masks.py).

    Raises ValueError if `names` has one of the last two without its masks.
    """
    made: dict[str, BoolArray] = {}
    for name, masks in (("neighbor", neighbor), ("sam", sam)):
        if name in names:
            if masks is None:
                raise ValueError(f"the candidate {name} needs its masks")
            made[name] = masks
    if "teacher" in names:
        made["teacher"] = views.prob > LABEL_THRESHOLD
    if "ensemble" in names:
        made["ensemble"] = (views.prob + views.prob_flipped + views.prob_no_prior) / 3 > LABEL_THRESHOLD
    if not {"sharpened", "overlap", "union"}.isdisjoint(names):
        made["sharpened"] = _sharpen_all(views.image, (views.prob + views.prob_flipped) / 2 > LABEL_THRESHOLD)
    if not {"prior", "overlap", "union"}.isdisjoint(names):
        made["prior"] = views.proposal > LABEL_THRESHOLD
    if "overlap" in names:
        made["overlap"] = made["sharpened"] & made["prior"]
    if "union" in names:
        made["union"] = made["sharpened"] | made["prior"]
    return np.stack([made[name] for name in names], axis=1)


def sharpen(image: NDArray[np.uint8], mask: BoolArray) -> BoolArray:
    """Fit a mask [M, M] to the colors of its image [M, M, 3] (RGB) by GrabCut.

    Pixels deeper inside the mask than CORE stay. GrabCut decides the rest of the mask and a ring of REACH around it.
    If GrabCut fails, the mask is returned unchanged.
    """
    side = mask.shape[0]
    work = min(side, GRABCUT_SIDE_PX)
    if work < side:
        image = np.asarray(cv2.resize(image, (work, work), interpolation=cv2.INTER_AREA), dtype=np.uint8)
    small = _resized(mask, work)
    rough = small.astype(np.uint8)
    trimap = np.where(cv2.dilate(rough, square_px(REACH * work)) > 0, cv2.GC_PR_BGD, cv2.GC_BGD).astype(np.uint8)
    trimap[small] = cv2.GC_PR_FGD
    trimap[cv2.erode(rough, square_px(CORE * work)) > 0] = cv2.GC_FGD
    cut = grabcut(np.ascontiguousarray(image[..., ::-1]), trimap)
    return mask if cut is None else _resized(cut, side)


def _sharpen_all(images: NDArray[np.uint8], masks: BoolArray) -> BoolArray:
    """`sharpen` for B pairs, in threads: OpenCV releases Python's global lock."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return np.stack(list(pool.map(sharpen, images, masks)))


def _resized(mask: BoolArray, side: int) -> BoolArray:
    """[m, m] -> [side, side], bilinear, thresholded at 0.5."""
    return resize_prob(mask.astype(np.float32), side, side) > LABEL_THRESHOLD
