"""SAM's masks for pseudo-labels: the teacher's mask as a prompt, and its match among all masks of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from l2l_core.config import Params
from l2l_core.core.arrays import BoolArray, FloatArray
from l2l_core.core.images import read_image
from l2l_core.core.masks import encode_rle
from l2l_core.data.pairs import Pairs
from l2l_core.model.sam import EncodedImage, Masks, Prompts, Sam, load_sam
from l2l_core.pseudo_labels.features import LABEL_THRESHOLD
from l2l_core.pseudo_labels.rules import best_match

SMALLEST_PROB = 1e-6
"""Keeps the logit of a probability finite."""


@dataclass(frozen=True)
class Refined:
    """SAM's masks for B sentences."""

    mask: BoolArray  # [B, M, M]; empty where the teacher's mask is empty
    predicted_iou: FloatArray  # [B] SAM's own estimate; 0 where the mask is empty


@dataclass(frozen=True)
class Match:
    """A mask of SAM that matches a teacher's mask."""

    square: BoolArray  # [M, M]
    rle: bytes  # at the image's own size


@dataclass
class _CachedImage:
    """What is known of an image."""

    encoded: EncodedImage
    auto_masks: Masks | None = None  # its automatic masks, once they are needed


@dataclass(frozen=True)
class SamMasks:
    """SAM on the images of some pairs. Rows of one image should be consecutive: an image is then encoded once."""

    sam: Sam
    pairs: Pairs
    _held: dict[int, _CachedImage] = field(default_factory=dict)  # of the last batch, by image row

    def refine(self, rows: NDArray[np.int64], prob: FloatArray) -> Refined:
        """Prompt SAM with the teacher's masks: box, center, and the probabilities' logits as a rough mask.

        rows: [B] of the pairs. prob: [B, M, M] the teacher's foreground probability.
        """
        label = prob > LABEL_THRESHOLD
        mask, predicted_iou = np.zeros(label.shape, dtype=bool), np.zeros(len(rows), dtype=np.float32)
        image_row = self.pairs.image_row[rows]
        for image, held in self._encode_images(image_row).items():
            encoded = held.encoded
            mine = ((image_row == image) & label.any((1, 2))).nonzero()[0]
            if not len(mine):
                continue
            found = self.sam.segment(encoded, prompts_of(prob[mine], encoded.hw))
            side = label.shape[-1]
            mask[mine] = (self.sam.resize(found.logits, encoded, side, side) > 0).cpu().numpy()
            predicted_iou[mine] = found.predicted_iou
        return Refined(mask, predicted_iou)

    def match(self, rows: NDArray[np.int64], label: BoolArray) -> list[Match | None]:
        """The automatic mask of SAM that matches each label best, or None: see `best_match`.

        rows: [B] of the pairs. label: [B, M, M].
        """
        matches: list[Match | None] = [None] * len(rows)
        image_row = self.pairs.image_row[rows]
        side = label.shape[-1]
        is_labeled = label.any((1, 2))
        for image, held in self._encode_images(image_row).items():
            mine = ((image_row == image) & is_labeled).nonzero()[0]
            if not len(mine):
                continue
            encoded = held.encoded
            masks = held.auto_masks = held.auto_masks or self.sam.segment_everything(encoded)
            squares = (self.sam.resize(masks.logits, encoded, side, side) > 0).cpu().numpy()
            for row in mine.tolist():
                best = best_match(label[row], squares)
                if best is not None:
                    full = self.sam.resize(masks.logits[best : best + 1], encoded, *encoded.hw)
                    matches[row] = Match(squares[best], encode_rle((full[0] > 0).cpu().numpy()))
        return matches

    def _encode_images(self, image_row: NDArray[np.int64]) -> dict[int, _CachedImage]:
        """The images of a batch; those of the last batch are not encoded again, and all others are forgotten."""
        needed = np.unique(image_row).tolist()
        new = [image for image in needed if image not in self._held]
        encoded = self.sam.encode([read_image(self.pairs.image_path[image]) for image in new])
        known = self._held | {image: _CachedImage(one) for image, one in zip(new, encoded, strict=True)}
        self._held.clear()
        self._held.update({image: known[image] for image in needed})
        return self._held


def sam_masks_of(params: Params, pairs: Pairs) -> SamMasks | None:
    """SAM on the images of the pairs; None if the selection does not use it. Raises ConfigError if it cannot load."""
    model = params.proposals.model
    if not params.select.uses_sam(model):
        return None
    return SamMasks(load_sam(str(model), params.train.engine.device, "train.engine.device"), pairs)


def prompts_of(prob: FloatArray, image_hw: Sequence[int]) -> Prompts:
    """The teacher's probabilities [N, M, M] -> box and center of each mask, in pixels, and its logits.

    The center is the mask's pixel nearest to its centroid, which can lie outside of a bent mask. No mask may be empty.
    """
    label = prob > LABEL_THRESHOLD
    scale = np.array(image_hw[::-1]) / label.shape[-1]  # pixels per cell, x and y
    boxes, points = [], []
    for mask in label:
        y, x = mask.nonzero()
        boxes.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
        center = ((x - x.mean()) ** 2 + (y - y.mean()) ** 2).argmin()
        points.append([x[center] + 0.5, y[center] + 0.5])
    logits = torch.from_numpy(prob).logit(SMALLEST_PROB).numpy()
    return Prompts(np.array(boxes) * np.tile(scale, 2), np.array(points) * scale, logits)
