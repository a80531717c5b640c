"""The candidate `neighbor`: the prior of another sentence of the image."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from l2l_core.core.arrays import BoolArray, FloatArray
from l2l_core.core.masks import resize_prob
from l2l_core.data.pairs import Pairs
from l2l_core.pseudo_labels.features import LABEL_THRESHOLD, soft_iou


class Neighbors:
    """Finds, for a sentence, the proposal of another sentence of its image that fits the teacher's prediction best.

    Many sentences of an image refer to the same object, and an MLLM that misreads one sentence may read another one
    right. Its proposal is then a correct mask that neither the teacher nor the sentence's own prior offers.
    """

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs

    def masks(self, rows: NDArray[np.int64], prob: FloatArray) -> BoolArray:
        """Rows [B] of the pairs and the teacher's probability [B, M, M] -> masks bool [B, M, M].

        A mask is empty if the image has no other sentence with a prior, or if none overlaps the prediction. In a tie,
        the first sentence wins.
        """
        return np.stack([self._mask(row, one) for row, one in zip(rows.tolist(), prob, strict=True)])

    def _mask(self, row: int, prob: FloatArray) -> BoolArray:
        others = self._pairs.of_image(int(self._pairs.image_row[row]))
        others = others[(others != row) & (self._pairs.proposal_score[others] > 0)]
        side, size = len(prob), self._pairs.proposal.shape[1]
        if not len(others):
            return np.zeros((side, side), dtype=bool)
        proposals = self._pairs.proposal[others].astype(np.float32) / 255
        small = cv2.resize(prob, (size, size), interpolation=cv2.INTER_AREA)
        fit = soft_iou(proposals, np.broadcast_to(np.asarray(small, dtype=np.float32), proposals.shape))
        return resize_prob(proposals[fit.argmax()], side, side) > LABEL_THRESHOLD
