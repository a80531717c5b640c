"""Checks which other sentence's prior a sentence is offered, on hand-made proposals."""

from dataclasses import replace

import numpy as np
import pytest
from toy_pairs import toy_pairs

from l2l_core.pseudo_labels.neighbors import Neighbors

LEFT, RIGHT, NO_PRIOR, TOP, ALONE = range(5)
SIDE = 32


@pytest.fixture
def pairs(tmp_path):
    """Four sentences of image 3, and one of image 2; the fourth has no prior."""
    pairs, _ = toy_pairs(tmp_path, 5)
    proposal = np.zeros((5, 16, 16), np.uint8)
    proposal[LEFT, :, :8] = proposal[RIGHT, :, 8:] = proposal[TOP, :8] = proposal[NO_PRIOR] = 255
    proposal[ALONE, :2] = 255
    score = np.array([1, 1, 0, 0.5, 1], dtype=np.float32)
    return replace(pairs, image_row=np.array([3, 3, 3, 3, 2]), proposal=proposal, proposal_score=score)


def halves(*names):
    masks = {"left": np.s_[:, : SIDE // 2], "right": np.s_[:, SIDE // 2 :], "top": np.s_[: SIDE // 2]}
    made = np.zeros((len(names), SIDE, SIDE), dtype=np.float32)
    for mask, name in zip(made, names, strict=True):
        mask[masks[name]] = 1
    return made


def test_offers_the_other_prior_that_fits_the_prediction_best(pairs):
    """The left sentence's own prior and the one without a prior never count, even if they fit better."""
    neighbors = Neighbors(pairs)
    offered = neighbors.masks(np.array([LEFT, LEFT, RIGHT]), halves("right", "top", "left"))
    np.testing.assert_array_equal(offered, halves("right", "top", "left") > 0.5)
    own = neighbors.masks(np.array([LEFT]), 0.9 * halves("left") + 0.1 * halves("right"))
    np.testing.assert_array_equal(own, halves("top") > 0.5)  # IoU 0.4 of the top, 0.1 of the right half


def test_offers_nothing_without_another_sentence(pairs):
    assert not Neighbors(pairs).masks(np.array([ALONE]), halves("top")).any()


def test_does_not_depend_on_the_order_of_the_pairs(pairs):
    shuffled = np.array([ALONE, TOP, LEFT, NO_PRIOR, RIGHT])
    row = int((shuffled == LEFT).nonzero()[0][0])
    np.testing.assert_array_equal(
        Neighbors(pairs.take(shuffled)).masks(np.array([row]), halves("right")),
        Neighbors(pairs).masks(np.array([LEFT]), halves("right")),
    )
