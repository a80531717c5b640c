"""Segmentation metrics from intersection and union pixels; ranking and calibration of probabilities.

All shares are in percent, as is usual in the field.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from l2l_core.core.arrays import DoubleArray

PR_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""IoU thresholds of Pr@X; the five that are usual in the field."""

POSITIVE_IOU = 0.5
"""IoU with the ground truth that separates correct masks from wrong ones: the field's usual threshold (Pr@0.5)."""


def iou_from_px(intersection_px: ArrayLike, union_px: ArrayLike) -> DoubleArray:
    """Intersection over union in [0, 1], shape [N]; two empty masks agree, so 0 / 0 gives 1."""
    intersection, union = np.asarray(intersection_px, np.float64), np.asarray(union_px, np.float64)
    return np.asarray(np.divide(intersection, union, out=np.ones_like(union), where=union > 0))


def segmentation_scores(intersection_px: ArrayLike, union_px: ArrayLike) -> dict[str, float]:
    """Scores of N sentences in percent; both arguments have one entry per sentence (pixels at original resolution).

    miou: mean IoU over sentences ("gIoU" in some papers). oiou: sum of intersections / sum of unions ("cIoU"; large
    objects weigh more). pr50 .. pr90: share of sentences with IoU >= 0.5 .. 0.9.
    Raises ValueError if there are no sentences.

    >>> scores = segmentation_scores([50, 10], [100, 100])
    >>> scores["miou"], scores["oiou"], scores["pr50"]
    (30.0, 30.0, 50.0)
    """
    intersection, union = np.asarray(intersection_px), np.asarray(union_px)
    # 64-bit division rounds correctly: an IoU of exactly 3 / 5 reaches 0.6. A stored 32-bit value would not.
    iou = iou_from_px(intersection, union)
    if not iou.size:
        raise ValueError("scores of no sentence are undefined")
    oiou = float(iou_from_px(intersection.sum(), union.sum()))
    reached = {f"pr{round(100 * x)}": 100 * float(np.mean(iou >= x)) for x in PR_THRESHOLDS}
    return {"miou": 100 * float(iou.mean()), "oiou": 100 * oiou, **reached}


def auroc(score: ArrayLike, positive: ArrayLike) -> float | None:
    """Percent of (positive, negative) pairs that the score [N] ranks correctly; a tie counts half.

    None if all entries are of one class.
    """
    truth = np.asarray(positive, dtype=bool)
    if truth.all() or not truth.any():
        return None
    from sklearn.metrics import roc_auc_score  # takes a second to import

    return 100 * float(roc_auc_score(truth, np.asarray(score)))


def precision_by_coverage(score: ArrayLike, value: ArrayLike, points: int) -> pd.DataFrame:
    """Mean value of the entries with the highest scores, as a function of the share taken; both in percent.

    score, value: [N], value in [0, 1]. Columns coverage, precision; at most `points` rows, evenly spaced up to 100 %.
    Entries of equal score count with their mean value, which is the expectation over random orders.
    """
    frame = pd.DataFrame({"score": np.asarray(score), "value": np.asarray(value, np.float64)})
    by_score = frame.groupby("score")["value"]
    expected = pd.DataFrame({"score": frame["score"], "value": by_score.transform("mean")})
    best_first = expected.sort_values("score", ascending=False, kind="stable")["value"].to_numpy()
    taken = np.unique(-(-np.arange(1, points + 1) * len(frame) // points))  # rounded up
    taken = taken[taken > 0]
    precision = np.cumsum(best_first)[taken - 1] / taken
    return pd.DataFrame({"coverage": 100 * taken / max(len(frame), 1), "precision": 100 * precision})


def reliability(prob: ArrayLike, positive: ArrayLike, bins: int) -> pd.DataFrame:
    """Reliability of a probability [N] in [0, 1]: one row for each non-empty interval of `bins` equal ones.

    Columns prob (mean in the interval) and share (of positives), both in percent, and count.
    """
    prob, positive = np.asarray(prob, np.float64), np.asarray(positive, np.float64)
    interval = np.minimum((prob * bins).astype(np.int64), bins - 1)
    frame = pd.DataFrame({"interval": interval, "prob": 100 * prob, "share": 100 * positive})
    groups = frame.groupby("interval")
    table = groups[["prob", "share"]].mean()
    return table.assign(count=groups.size()).reset_index(drop=True)
