"""Prior swap: an augmentation that gives a training pair another sentence's box and proposal."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from l2l_core.core.metrics import iou_from_px
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
    for index in is_swapped.nonzero()[0]:
        own = rows[index]
        of_image = pairs.of_image(int(pairs.image_row[own]))
        mine, marked = pairs.proposal[own] > 127, pairs.proposal[of_image] > 127
        iou = iou_from_px((marked & mine).sum((1, 2)), (marked | mine).sum((1, 2)))
        others = of_image[iou < MAX_OVERLAP]
        chosen[index] = others[int(position[index] * len(others))] if len(others) else anyone[index]
    return chosen
