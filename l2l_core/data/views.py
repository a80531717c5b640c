"""A teacher's predictions for a batch of sentences, passed from the predictor to the policy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2l_core.core.arrays import FloatArray


@dataclass(frozen=True)
class Views:
    """Teacher predictions and priors for B sentences; maps are [B, M, M] in [0, 1] and cover the whole image."""

    sent_id: NDArray[np.int64]  # [B]
    image: NDArray[np.uint8]  # [B, M, M, 3] RGB
    prob: FloatArray  # teacher's foreground probability with the prior
    prob_flipped: FloatArray  # the same for the mirrored image and sentence, mirrored back
    prob_no_prior: FloatArray  # the same without the prior
    proposal: FloatArray  # soft proposal
    proposal_score: FloatArray  # [B], 0 without a prior
    predicted_iou: FloatArray  # [B] the renderer's own estimate of the proposal's IoU; 0 if it has none
    words: NDArray[np.int64]  # [B] words in the sentence
