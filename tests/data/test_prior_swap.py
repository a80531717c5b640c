"""Checks which sentence's prior a pair gets, on hand-made proposals."""

from dataclasses import replace

import numpy as np
import pytest
from toy_pairs import FLAT_PROB, SIZE_PX, toy_pairs

from l2l_core.data.pairs import BatchMaker
from l2l_core.data.prior_swap import prior_rows

LEFT, TOO_CLOSE, RIGHT, ALONE = range(4)


@pytest.fixture
def pairs(tmp_path):
    """Three sentences of one image, of which two mark nearly the same place, and one sentence of another image."""
    pairs, _ = toy_pairs(tmp_path)
    proposal = np.zeros((4, 16, 16), np.uint8)
    proposal[LEFT, :, :8] = proposal[TOO_CLOSE, :, :7] = proposal[RIGHT, :, 8:] = proposal[ALONE, :2] = 255
    return replace(pairs, image_row=np.array([0, 0, 0, 1]), proposal=proposal)


def drawn(pairs, row, fraction, count=400):
    return prior_rows(pairs, np.full(count, row), fraction, np.random.default_rng(0))


def test_swaps_the_given_fraction(pairs):
    swapped = drawn(pairs, LEFT, 0.3) != LEFT
    assert swapped.mean() == pytest.approx(0.3, abs=0.07)  # 3 standard deviations of 400 draws
    assert (drawn(pairs, LEFT, 0.0) == LEFT).all()


def test_takes_the_prior_of_another_object_in_the_same_image(pairs):
    assert set(drawn(pairs, LEFT, 1.0)) == {RIGHT}
    assert set(drawn(pairs, RIGHT, 1.0)) == {LEFT, TOO_CLOSE}


def test_takes_any_prior_if_the_image_has_no_other_object(pairs):
    assert set(drawn(pairs, ALONE, 1.0)) == {LEFT, TOO_CLOSE, RIGHT, ALONE}


def test_batch_gets_the_other_box_and_proposal_but_keeps_image_sentence_and_label(pairs, tmp_path):
    pairs, targets = toy_pairs(tmp_path)
    batches = BatchMaker(pairs, SIZE_PX, FLAT_PROB)
    own, other = batches(np.array([0]), targets), batches(np.array([1]), targets)
    swapped = batches(np.array([0]), targets, prior_rows=np.array([1]))
    for name in ("box", "has_box", "proposal", "proposal_score"):
        assert getattr(swapped, name).equal(getattr(other, name))
    assert not swapped.box.equal(own.box)
    for name in ("image", "label", "keep"):
        assert getattr(swapped, name).equal(getattr(own, name))
    assert (swapped.sentence, swapped.prior_text) == (own.sentence, own.prior_text)


def test_hides_a_swapped_prior_too(pairs, tmp_path):
    pairs, targets = toy_pairs(tmp_path)
    hidden = BatchMaker(pairs, SIZE_PX, FLAT_PROB)(np.array([0]), targets, np.array([True]), prior_rows=np.array([1]))
    assert not hidden.has_box.any()
    assert hidden.proposal_score.item() == 0
    np.testing.assert_allclose(hidden.proposal, FLAT_PROB, atol=1 / 255)
