"""Losses in which a dropped pixel has no say."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from l2l_core.model.segmenter import Output

REFINED_WEIGHT = 0.5
"""Weight of the refined proposal's loss: it steers the mask and must not outweigh it."""


@dataclass(frozen=True)
class Loss:
    """The parts of the loss, each a scalar tensor; `total` is what is minimised."""

    total: Tensor
    bce: Tensor
    dice: Tensor


def masked_bce(logits: Tensor, label: Tensor, keep: Tensor) -> Tensor:
    """Mean binary cross-entropy over each sample's kept pixels; [B, 1, H, W] x 3 -> [B]. Nothing kept gives 0."""
    pixels = F.binary_cross_entropy_with_logits(logits, label, reduction="none") * keep
    return pixels.flatten(1).sum(1) / keep.flatten(1).sum(1).clamp(min=1.0)


def masked_dice(logits: Tensor, label: Tensor, keep: Tensor) -> Tensor:
    """Soft Dice loss over each sample's kept pixels, in [0, 1]; [B, 1, H, W] x 3 -> [B]. Nothing kept gives 0.

    1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1), Milletari et al. 2016, smoothed by one pixel.
    """
    prob, truth = (logits.sigmoid() * keep).flatten(1), (label * keep).flatten(1)
    return 1 - (2 * (prob * truth).sum(1) + 1) / (prob.sum(1) + truth.sum(1) + 1)


def segmentation_loss(output: Output, label: Tensor, keep: Tensor) -> Loss:
    """BCE + Dice of the mask, plus BCE of the refined proposal against the label's share in each coarse cell.

    label, keep: [B, 1, S, S] float, 0 or 1. A sample with no kept pixel adds nothing; the mean is over the others.
    """
    teaches = (keep.flatten(1).sum(1) > 0).float()
    count = teaches.sum().clamp(min=1.0)
    size = (output.refined_logits.shape[-2], output.refined_logits.shape[-1])
    cell_keep = F.adaptive_avg_pool2d(keep, size)
    cell_label = F.adaptive_avg_pool2d(label * keep, size) / cell_keep.clamp(min=1e-6)
    cells = F.binary_cross_entropy_with_logits(output.refined_logits, cell_label, reduction="none") * cell_keep
    refined = cells.flatten(1).sum(1) / cell_keep.flatten(1).sum(1).clamp(min=1e-6)
    bce = (masked_bce(output.mask_logits, label, keep) * teaches).sum() / count
    dice = (masked_dice(output.mask_logits, label, keep) * teaches).sum() / count
    return Loss(bce + dice + REFINED_WEIGHT * (refined * teaches).sum() / count, bce.detach(), dice.detach())
