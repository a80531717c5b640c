"""Fixed rules: rank the pseudo-labels by a score and accept the best fraction."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2l_core.core.arrays import BoolArray, FloatArray

MATCH_IOU = 0.5
"""A mask of SAM with a higher IoU replaces the teacher's mask (SemiRES)."""


def mean_rank(score: NDArray[np.floating[Any]]) -> FloatArray:
    """Ranks of scores [N], from 1 / N for the lowest to 1 for the highest. Ties get their mean rank."""
    _, group, sizes = np.unique(score, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    return ((last - (sizes - 1) / 2)[group] / max(len(score), 1)).astype(np.float32)


def rank_sum(confidence: FloatArray, prior_iou: FloatArray) -> FloatArray:
    """Mean rank by confidence and by agreement with the prior, [N] in (0, 1]."""
    return np.float32(0.5) * (mean_rank(confidence) + mean_rank(prior_iou))


def best_fraction(score: FloatArray, sent_id: NDArray[np.int64], fraction: float) -> BoolArray:
    """Mark the round(fraction * N) highest scores, at least one. The smaller sent_id wins ties. Returns bool [N]."""
    count = max(1, math.floor(fraction * len(score) + 0.5))
    accepted = np.zeros(len(score), dtype=bool)
    accepted[np.lexsort((sent_id, -score))[:count]] = True
    return accepted


def semires_weight(prob: FloatArray) -> FloatArray:
    """Pixel weight from the teacher's foreground probability in [0, 1]: any shape -> same shape.

    1.3 - N(p; mean 0.5, variance 0.1), a normal density: 0.038 if the teacher is undecided, 0.939 if it is certain.
    SemiRES ("SAM as the Guide", ICML 2024) applies this weight to pseudo-labels without a matching SAM mask.
    """
    density = np.exp(-((prob - 0.5) ** 2) / (2 * 0.1)) / math.sqrt(2 * math.pi * 0.1)
    return np.asarray(1.3 - density, dtype=np.float32)


def best_match(label: BoolArray, masks: BoolArray) -> int | None:
    """Index of the mask [K, M, M] with the highest IoU with the label [M, M], if it exceeds MATCH_IOU; else None.

    SemiRES's matching by IoU. Equal masks: the first.
    """
    if not len(masks):
        return None
    union = (masks | label).sum((1, 2))
    iou = (masks & label).sum((1, 2)) / np.maximum(union, 1)
    best = int(iou.argmax())
    return best if iou[best] > MATCH_IOU else None
