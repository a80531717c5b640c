"""Losses with a weight per pixel that is relative to its sample; dropped pixels have weight 0."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from l2l_core.model.segmenter import Output

REFINED_WEIGHT = 0.5
"""Weight of the refined proposal's loss, which guides the mask and must not outweigh it."""

SMALLEST_SUM = 1e-6
"""Least divisor of a weighted mean: far below the share of one pixel of weight 1/255 in a sum or in a cell's mean."""


@dataclass(frozen=True)
class Loss:
    """The parts of the loss, each a scalar tensor; training minimizes `total`."""

    total: Tensor
    bce: Tensor
    dice: Tensor


def masked_bce(logits: Tensor, label: Tensor, keep: Tensor) -> Tensor:
    """Mean binary cross-entropy of each sample's pixels, weighted by keep; [B, 1, H, W] x 3 -> [B].

    keep in [0, 1]: with 0 and 1 this is the mean over the kept pixels. The sum is divided by the sample's total weight,
    so that only the proportions of the weights count. If nothing is kept, the loss is 0.
    """
    pixels = F.binary_cross_entropy_with_logits(logits, label, reduction="none") * keep
    return pixels.flatten(1).sum(1) / keep.flatten(1).sum(1).clamp(min=SMALLEST_SUM)


def masked_dice(logits: Tensor, label: Tensor, keep: Tensor) -> Tensor:
    """Soft Dice loss of each sample's pixels, weighted by keep, in [0, 1]; [B, 1, H, W] x 3 -> [B].

    1 - (2 sum(w p t) + 1) / (sum(w p) + sum(w t) + 1), Milletari et al. 2016 with weights w = keep in [0, 1]: a pixel
    of weight 1/2 is half a pixel. Smoothed by one whole pixel. If nothing is kept, the loss is 0.
    """
    prob, truth, weight = logits.sigmoid().flatten(1), label.flatten(1), keep.flatten(1)
    kept = prob * weight
    return 1 - (2 * (kept * truth).sum(1) + 1) / (kept.sum(1) + (truth * weight).sum(1) + 1)


def has_valid_pixels(keep: Tensor) -> Tensor:
    """1 for every sample with a pixel of nonzero weight, else 0; [B, 1, H, W] -> [B] float."""
    return (keep.flatten(1).sum(1) > 0).float()


def segmentation_loss(output: Output, label: Tensor, keep: Tensor, count: Tensor | None = None) -> Loss:
    """BCE + Dice of the mask, plus BCE of the refined proposal against the label's share in each coarse cell.

    label: [B, 1, S, S] float, 0 or 1; keep: the same shape, pixel weights in [0, 1]. A sample without kept pixels adds
    nothing. All other samples have equal weight. count: their number
    in the whole batch, if this is a part of one; the losses of all parts then add up to the loss of the batch.
    """
    counts = has_valid_pixels(keep)
    count = (counts.sum() if count is None else count).clamp(min=1.0)
    size = (output.refined_logits.shape[-2], output.refined_logits.shape[-1])
    cell_keep = F.adaptive_avg_pool2d(keep, size)
    cell_label = F.adaptive_avg_pool2d(label * keep, size) / cell_keep.clamp(min=SMALLEST_SUM)
    cells = F.binary_cross_entropy_with_logits(output.refined_logits, cell_label, reduction="none") * cell_keep
    refined = cells.flatten(1).sum(1) / cell_keep.flatten(1).sum(1).clamp(min=SMALLEST_SUM)
    bce = (masked_bce(output.mask_logits, label, keep) * counts).sum() / count
    dice = (masked_dice(output.mask_logits, label, keep) * counts).sum() / count
    return Loss(bce + dice + REFINED_WEIGHT * (refined * counts).sum() / count, bce.detach(), dice.detach())
