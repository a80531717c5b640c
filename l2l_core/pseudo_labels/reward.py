"""The reward: the utility of the kept pixels, and the reliability of agreement as a substitute for the truth."""

from __future__ import annotations

from torch import Tensor

from l2l_core.core.arrays import FloatArray
from l2l_core.core.metrics import POSITIVE_IOU, auroc

SMALLEST_SHARE = 1e-6
"""Lower bound of a denominator. It is far below the area fraction of one pixel, so only an empty mask reaches it."""


def utility(cells: Tensor, keep: Tensor, wrong_cost: float) -> Tensor:
    """Utility of the kept pixels, in [-wrong_cost, 1]; 0 if nothing is kept.

    u = r (1 + b) / 2 - wrong_cost * w, where
    r: kept correct foreground over the union of mask and truth, so that small objects count like large ones,
    w: kept wrong pixels, foreground and background, over the same union,
    b: kept correct background over all correct background. It counts only times r: background alone is worth nothing.
    If all pixels are kept: u = (1 + wrong_cost) IoU - wrong_cost. At wrong_cost 1, this is > 0 above POSITIVE_IOU.

    cells: [..., G, G, 4] as in CandidateTruth; keep: [..., G, G] in [0, 1], leading axes broadcast; returns [...].
    """
    return utility_of_sums(_total(cells * keep[..., None]), _total(cells), wrong_cost)


def utility_of_sums(kept: Tensor, whole: Tensor, wrong_cost: float) -> Tensor:
    """`utility` from sums over the kept cells and over all cells, both [..., 4]; returns [...]."""
    right_foreground, wrong_foreground, right_background, wrong_background = whole.unbind(-1)
    union = (right_foreground + wrong_foreground + wrong_background).clamp_min(SMALLEST_SHARE)
    r = kept[..., 0] / union
    w = (kept[..., 1] + kept[..., 3]) / union
    b = kept[..., 2] / right_background.clamp_min(SMALLEST_SHARE)
    return r * (1 + b) / 2 - wrong_cost * w


def agreement_reliability(agreement_utility: FloatArray, iou: FloatArray) -> float:
    """How well the agreement utility separates correct from wrong masks: max(0, 2 AUROC - 1) in [0, 1].

    Both inputs are [N], from labeled sentences. Returns 0 if all masks are correct or all are wrong, since AUROC is
    then undefined.
    """
    percent = auroc(agreement_utility, iou > POSITIVE_IOU)
    return 0.0 if percent is None else max(0.0, 2 * percent / 100 - 1)


def _total(cells: Tensor) -> Tensor:
    """Sum over both sides of the grid: [..., G, G, 4] -> [..., 4]."""
    return cells.sum((-3, -2))
