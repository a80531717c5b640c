"""What the policy sees of a pseudo-label, and what the truth says of it where there is truth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Views:
    """What a teacher and a prior say about B sentences; maps are [B, M, M] in [0, 1] and cover the whole image."""

    sent_id: NDArray[np.int64]  # [B]
    prob: FloatArray  # teacher's foreground probability, asked with the prior
    prob_flipped: FloatArray  # the same from the mirrored image and sentence, mirrored back
    prob_no_prior: FloatArray  # the same without the prior
    proposal: FloatArray  # soft proposal
    proposal_score: FloatArray  # [B], 0 where there is no prior
    words: NDArray[np.int64]  # [B] words in the sentence


@dataclass(frozen=True)
class Candidates:
    """N pseudo-labels as a policy sees them, on a grid of G x G cells."""

    sent_id: NDArray[np.int64]  # [N]
    cells: FloatArray  # [N, G, G, C]
    sentence: FloatArray  # [N, D]
    confidence: FloatArray  # [N] mean of max(p, 1 - p) over the label's foreground and its surroundings, in [0.5, 1]
    prior_iou: FloatArray  # [N] IoU of the label with the proposal cut at 0.5; 0 where there is no prior


@dataclass(frozen=True)
class Outcome:
    """The truth about N pseudo-labels; exists for labelled sentences only (and for the oracle)."""

    # [N, G, G, 4] shares of a cell's pixels: foreground right, foreground wrong, background right, background wrong
    cells: FloatArray
    iou: FloatArray  # [N] IoU of the label with the true mask
