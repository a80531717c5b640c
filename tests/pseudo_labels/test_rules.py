import numpy as np
import pytest
from scipy.stats import norm

from l2l_core.pseudo_labels.rules import best_match, semires_weight


def test_semires_gives_uncertain_pixels_the_lowest_weight():
    """At 0.5 the density is 1 / sqrt(0.2 pi) = 1.2616; 0.25 away it is that times exp(-0.3125), 0.5 away exp(-1.25)."""
    weight = semires_weight(np.array([[0.0, 0.25, 0.5], [1.0, 0.75, 0.5]], dtype=np.float32))
    assert weight.dtype == np.float32
    row = [1.3 - 1.26157 * 0.286505, 1.3 - 1.26157 * 0.731616, 1.3 - 1.26157]
    assert row == pytest.approx([0.9386, 0.3770, 0.0384], abs=1e-4)
    np.testing.assert_allclose(weight, [row, row], atol=1e-5)


def test_semires_weight_matches_scipy_and_lies_between_zero_and_one():
    prob = np.linspace(0, 1, 1001, dtype=np.float32)
    weight = semires_weight(prob)
    np.testing.assert_allclose(weight, 1.3 - norm.pdf(prob, loc=0.5, scale=0.1**0.5), atol=1e-6)
    assert weight.min() >= 0
    assert weight.max() <= 1


def test_best_match_has_the_highest_iou_above_one_half():
    """A label of four pixels against masks of IoU 2/4, 3/5, 3/4 and 0."""
    label = np.zeros((4, 4), dtype=bool)
    label[0] = True
    masks = np.zeros((4, 4, 4), dtype=bool)
    masks[0, 0, :2] = masks[1, 0, :3] = masks[1, 1, 0] = masks[2, 0, 1:] = masks[3, 3] = True
    assert best_match(label, masks) == 2
    assert best_match(label, masks[:2]) == 1
    assert best_match(label, masks[:1]) is None  # exactly one half is not enough
    assert best_match(label, masks[3:]) is None
    assert best_match(label, masks[:0]) is None
    assert best_match(np.zeros_like(label), np.zeros_like(masks)) is None
