"""What a decision is worth: the utility of the kept pixels, and how far agreement may stand in for the truth."""

from __future__ import annotations

from torch import Tensor

from l2l_core.core.metrics import auroc
from l2l_core.pseudo_labels.features import FloatArray

RIGHT_IOU = 0.5
"""A label whose IoU with the truth exceeds this is right; at wrong_cost 1 keeping all of it has a utility > 0."""

SMALLEST_SHARE = 1e-6
"""Lower bound of a denominator, far below one pixel's share of an image: only an empty mask reaches it."""


def utility(cells: Tensor, keep: Tensor, wrong_cost: float) -> Tensor:
    """How much the kept pixels teach, in [-wrong_cost, 1]; 0 where nothing is kept.

    u = r (1 + b) / 2 - wrong_cost * w, with the kept shares, out of all the label's pixels of that kind,
    r: right foreground over the union of label and truth, so that small objects count like large ones,
    w: wrong pixels of both kinds over the same union,
    b: right background over all right background. It only counts times r: background alone is worth nothing.
    All kept: u = (1 + wrong_cost) IoU - wrong_cost.

    cells: [..., G, G, 4] as in Outcome; keep: [..., G, G] in [0, 1], leading axes broadcast; returns [...].
    """
    return utility_of_sums(_total(cells * keep[..., None]), _total(cells), wrong_cost)


def utility_of_sums(kept: Tensor, whole: Tensor, wrong_cost: float) -> Tensor:
    """`utility`, from a label's cells [..., 4] summed over those that are kept and over all; returns [...]."""
    right_foreground, wrong_foreground, right_background, wrong_background = whole.unbind(-1)
    union = (right_foreground + wrong_foreground + wrong_background).clamp_min(SMALLEST_SHARE)
    r = kept[..., 0] / union
    w = (kept[..., 1] + kept[..., 3]) / union
    b = kept[..., 2] / right_background.clamp_min(SMALLEST_SHARE)
    return r * (1 + b) / 2 - wrong_cost * w


def agreement_reliability(agreement_utility: FloatArray, iou: FloatArray) -> float:
    """How well the utility by agreement tells right labels from wrong ones: max(0, 2 AUROC - 1) in [0, 1].

    Both [N], of labelled sentences. 0 where all labels are right or all are wrong: then nothing is known about it.
    """
    percent = auroc(agreement_utility, iou > RIGHT_IOU)
    return 0.0 if percent is None else max(0.0, 2 * percent / 100 - 1)


def _total(cells: Tensor) -> Tensor:
    """Sum over both sides of the grid: [..., G, G, 4] -> [..., 4]."""
    return cells.sum((-3, -2))
