"""Group sentences by object size and by error type, and compare two methods on the same sentences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from l2l_core.core.metrics import POSITIVE_IOU, iou_from_px

SIZES = ("small", "medium", "large")

BOUNDARY_IOU = 0.7
"""From this IoU on, the prediction is right. From POSITIVE_IOU to below this, the object is right but its boundary is
wrong."""

WRONG_IOU = 0.1
"""Below this IoU, mask and truth hardly overlap: the mask marks another object. The usual line of error analyses."""

SIZE_FACTOR = 2
"""A mask is too large (small) if its area is at least this factor above (below) the area of the truth."""

_PARTIAL = f"IoU from {WRONG_IOU} to below {POSITIVE_IOU}"

OUTCOMES = {
    "wrong object": f"IoU below {WRONG_IOU}, and the mask is not empty.",
    "empty": "Nothing was predicted, though there is an object.",
    "too large": f"{_PARTIAL}, the mask at least {SIZE_FACTOR} times the truth's area.",
    "too small": f"{_PARTIAL}, the truth at least {SIZE_FACTOR} times the mask's area.",
    "misplaced": f"{_PARTIAL}, and both areas are less than {SIZE_FACTOR} times apart.",
    "boundary": f"IoU from {POSITIVE_IOU} to below {BOUNDARY_IOU}: the right object, its outline off.",
    "right": f"IoU of at least {BOUNDARY_IOU}.",
}
"""Outcome -> its rule; every sentence has exactly one outcome."""

CHANGED_IOU = 0.05
"""A sentence is better or worse if its IoU changes by more than this; smaller changes are a few outline pixels."""

RESAMPLES = 2000
"""Bootstrap samples per interval: the ends then have a standard error of about 2 % of the interval's length."""


def outcomes(per_sentence: pd.DataFrame) -> pd.Series[str]:
    """The name in OUTCOMES of each row of records.PER_SENTENCE."""
    iou = iou_from_px(per_sentence["intersection_px"], per_sentence["union_px"])
    mask, truth = per_sentence["pred_area_px"].to_numpy(), per_sentence["gt_area_px"].to_numpy()
    rules = {
        "right": iou >= BOUNDARY_IOU,
        "boundary": iou >= POSITIVE_IOU,
        "empty": mask == 0,
        "wrong object": iou < WRONG_IOU,
        "too large": mask >= SIZE_FACTOR * truth,
        "too small": truth >= SIZE_FACTOR * mask,
    }
    named = np.select(list(rules.values()), list(rules), default="misplaced")  # the first rule that holds
    return pd.Series(named, per_sentence.index, dtype=str)


def size_limits(area_share: pd.Series[float]) -> tuple[float, float]:
    """Shares of the image area, 0..1, that cut objects into three equally large groups."""
    low, high = np.quantile(area_share, [1 / 3, 2 / 3])
    return float(low), float(high)


def sizes(area_share: pd.Series[float], limits: tuple[float, float]) -> pd.Series[str]:
    """The name in SIZES of each object: small below the lower limit, large from the upper one on."""
    return pd.Series(np.array(SIZES)[np.searchsorted(limits, area_share, side="right")], area_share.index, dtype=str)


def changes(before: pd.DataFrame, after: pd.DataFrame) -> dict[str, float]:
    """Compare two methods by their rows of records.PER_SENTENCE, which must list the same sentences in the same order.

    Counts of sentences: better, worse (by more than CHANGED_IOU), reached and lost (an IoU of POSITIVE_IOU); mean: of
    the IoU differences, in percent, which equals the difference of mIoU.
    """
    first, second = (iou_from_px(rows["intersection_px"], rows["union_px"]) for rows in (before, after))
    difference, good, still = second - first, first >= POSITIVE_IOU, second >= POSITIVE_IOU
    return {
        "better": float(np.sum(difference > CHANGED_IOU)),
        "worse": float(np.sum(difference < -CHANGED_IOU)),
        "reached": float(np.sum(~good & still)),
        "lost": float(np.sum(good & ~still)),
        "mean": 100 * float(difference.mean()),
    }


def mean_interval(values: NDArray[Any], clusters: NDArray[Any], seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of `values` [N]: draws whole clusters [N], with replacement.

    Errors on sentences about one image are correlated, so the image is the sampling unit.
    """
    groups = pd.Series(values).groupby(np.asarray(clusters))
    sums, counts = groups.sum().to_numpy(np.float64), groups.count().to_numpy(np.float64)
    generator = np.random.default_rng(seed)
    drawn = np.stack([generator.integers(len(sums), size=len(sums)) for _ in range(RESAMPLES)])
    low, high = np.quantile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), [0.025, 0.975])
    return float(low), float(high)
