"""Fuses hand-made proposals and labels, with values computed by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from l2l_core.core.masks import cell_shares
from l2l_core.data.evolve import fuse

PROPOSAL = np.array([[0, 200], [100, 255]], np.uint8)


def test_fuses_by_the_share_of_a_cell_that_the_label_covers():
    """A label of 4 x 4 pixels: a cell is 2 x 2 of them."""
    label = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 1, 0]], bool)
    # 0.6 * 255 * (1, 1/4, 0, 3/4) + 0.4 * (0, 200, 100, 255)
    assert fuse(PROPOSAL, label, 0.6).tolist() == [[153, 118], [40, 217]]


def test_label_that_is_smaller_than_the_grid():
    """Each pixel is two cells wide."""
    label = np.array([[True, False]])
    assert fuse(np.full((2, 4), 100, np.uint8), label, 0.5).tolist() == [[178, 178, 50, 50]] * 2


@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))), st.floats(0, 1))
def test_stays_between_proposal_and_label(label, prob):
    fused, share = fuse(PROPOSAL, label, prob).astype(float), 255 * cell_shares(label, 2, 2)
    assert (fused >= np.floor(np.minimum(PROPOSAL, share))).all()
    assert (fused <= np.ceil(np.maximum(PROPOSAL, share))).all()
    assert (fuse(PROPOSAL, label, 0.0) == PROPOSAL).all()
    np.testing.assert_allclose(fuse(PROPOSAL, label, 1.0), share, atol=0.51)


@pytest.mark.parametrize(("height", "width"), [(5, 7), (3, 11), (16, 2)])
def test_cell_shares_keep_the_share_of_the_whole_mask(height, width):
    mask = np.random.default_rng(0).random((8, 9)) < 0.4
    assert cell_shares(mask, height, width).mean() == pytest.approx(mask.mean(), abs=1e-5)
