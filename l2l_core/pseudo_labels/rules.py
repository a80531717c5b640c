"""Fixed rules: rank the labels by a score and accept the best share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2l_core.pseudo_labels.features import BoolArray, Candidates, FloatArray


def mean_rank(score: NDArray[np.floating[Any]]) -> FloatArray:
    """Rank of each score, 1 / N for the lowest to 1 for the highest; equal scores share the mean of theirs. [N]."""
    _, group, sizes = np.unique(score, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    return ((last - (sizes - 1) / 2)[group] / max(len(score), 1)).astype(np.float32)


def rank_sum(candidates: Candidates) -> FloatArray:
    """Mean of the ranks by confidence and by agreement with the prior, [N] in (0, 1]."""
    return np.float32(0.5) * (mean_rank(candidates.confidence) + mean_rank(candidates.prior_iou))


def best_fraction(score: FloatArray, sent_id: NDArray[np.int64], fraction: float) -> BoolArray:
    """Mark the round(fraction * N) highest scores, at least one; of equal scores the smaller sent_id goes first."""
    count = max(1, math.floor(fraction * len(score) + 0.5))
    accepted = np.zeros(len(score), dtype=bool)
    accepted[np.lexsort((sent_id, -score))[:count]] = True
    return accepted


def semires_weight(prob: FloatArray) -> FloatArray:
    """How much a pixel teaches, from the teacher's foreground probability; any shape in [0, 1], same shape out.

    1.3 - N(p; mean 0.5, variance 0.1), a normal density: 0.038 where the teacher is undecided, 0.939 where it is sure.
    SemiRES ("SAM as the Guide", ICML 2024) weighs so the pixels of labels for which it finds no matching mask of SAM.
    """
    density = np.exp(-((prob - 0.5) ** 2) / (2 * 0.1)) / math.sqrt(2 * math.pi * 0.1)
    return np.asarray(1.3 - density, dtype=np.float32)
