"""Prior swap: an augmentation that gives a training pair another sentence's box and proposal."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from l2l_core.data.pairs import Pairs

MAX_OVERLAP = 0.2
"""IoU of two proposals, cut at 0.5, up to which they mark different objects."""


def prior_rows(pairs: Pairs, rows: NDArray[np.int64], fraction: float, draws: np.random.Generator) -> NDArray[np.int64]:
    """Rows [B] -> rows [B] whose prior each pair gets: mostly its own, for `fraction` of the pairs another one.

    The other one is a sentence of the same image whose proposal marks another object, as when an MLLM picks the wrong
    object. If the image has none, it is any pair's. The label stays, so the network must check its prior against image
    and sentence instead of copying it.
    """
    is_swapped = draws.random(len(rows)) < fraction
    anyone, position = draws.integers(0, len(pairs), len(rows)), draws.random(len(rows))
    chosen = rows.copy()
    for place in is_swapped.nonzero()[0]:
        own = rows[place]
        of_image = (pairs.image_row == pairs.image_row[own]).nonzero()[0]
        others = [row for row in of_image if _overlap(pairs, row, own) < MAX_OVERLAP]
        chosen[place] = others[int(position[place] * len(others))] if others else anyone[place]
    return chosen


def _overlap(pairs: Pairs, first: int, second: int) -> float:
    """IoU of two proposals, cut at 0.5; 1 if both are empty."""
    one, other = pairs.proposal[first] > 127, pairs.proposal[second] > 127
    union = np.count_nonzero(one | other)
    return np.count_nonzero(one & other) / union if union else 1.0
