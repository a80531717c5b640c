"""Evolving proposals: a training pair's proposal is its prior's, fused with the round's pseudo-label."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from l2l_core.core.masks import BoolMask, cell_shares


def fuse(proposal: NDArray[np.uint8], label: BoolMask, label_prob: float) -> NDArray[np.uint8]:
    """Proposal [P, P], 0..255 is probability 0..1, and pseudo-label [H, W] of the same image -> fused [P, P].

    label_prob: probability in 0..1 that the label is right. The fused probability of a cell is that of a mixture:
    label_prob * (share of the cell that the label covers) + (1 - label_prob) * proposal.

    >>> proposal, label = np.array([[0, 100]], np.uint8), np.array([[True, False]])
    >>> fuse(proposal, label, 0.8).tolist()
    [[204, 20]]
    """
    share = cell_shares(label.T, *proposal.T.shape).T  # decoded masks are column-major: transposed, without a copy
    return np.rint(255 * label_prob * share + (1 - label_prob) * proposal).astype(np.uint8)
