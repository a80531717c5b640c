"""Checks image evidence on images of two flat colors with known borders and color spreads."""

import numpy as np
import pytest

from l2l_core.pseudo_labels.evidence import EVIDENCE, image_evidence

SIDE = 64


def evidence(image, *masks):
    """Return one dict per mask."""
    found = image_evidence(image[None], np.stack(masks)[None])[0]
    return [dict(zip(EVIDENCE, row.tolist(), strict=True)) for row in found]


def square(top, left, side):
    mask = np.zeros((SIDE, SIDE), bool)
    mask[top : top + side, left : left + side] = True
    return mask


@pytest.fixture
def scene():
    """A white square on black."""
    mask = square(20, 20, 24)
    return np.where(mask[..., None], 255, 0).astype(np.uint8).repeat(3, axis=-1), mask


def test_evidence_supports_a_perfect_mask(scene):
    """White and black differ by 1 in lightness alone (OpenCV's Lab: 255 against 0). The maximum is the square root
    of 3."""
    image, mask = scene
    (found,) = evidence(image, mask)
    assert found["contrast"] == pytest.approx(1 / np.sqrt(3), abs=0.01)
    assert found["border_edges"] > 0.9
    assert max(found["spread"], found["spread_outside"]) < 1e-5
    assert found["largest_part"] == found["box_fill"] == 1.0
    assert found["at_image_edge"] == 0.0


def test_evidence_is_weak_for_a_misplaced_mask(scene):
    """A mask beside the object has no contrast. A mask half on the object has mixed colors and few edges at its
    border."""
    image, mask = scene
    beside, half, whole = evidence(image, square(46, 46, 16), square(20, 8, 24), mask)
    assert beside["contrast"] == beside["border_gradient"] == beside["border_edges"] == pytest.approx(0.0, abs=0.05)
    assert half["spread"] > 0.1 > whole["spread"]
    assert half["border_edges"] < 0.5 * whole["border_edges"]


def test_shape_evidence_matches_hand_computed_values(scene):
    """Two squares of 8 and 4 pixels a side have parts of 64 and 16 of 80 pixels, in a box of 20 x 8. Another square
    lies in the image corner."""
    image, _ = scene
    two = square(0, 0, 8) | square(0, 16, 4)
    parts, corner, empty = evidence(image, two, square(0, 0, 8), np.zeros((SIDE, SIDE), bool))
    assert parts["largest_part"] == pytest.approx(64 / 80)
    assert parts["box_fill"] == pytest.approx(80 / 160)
    assert corner["at_image_edge"] == pytest.approx(15 / 28)  # of the 28 outermost pixels of 8 x 8
    assert set(empty.values()) == {0.0}


def test_evidence_lies_between_zero_and_one_for_any_mask():
    rng = np.random.default_rng(0)
    image = rng.choice(np.array([[0, 255, 0], [0, 0, 255], [255, 0, 0]], dtype=np.uint8), (SIDE, SIDE))  # pure colors
    masks = [rng.random((SIDE, SIDE)) < share for share in (0.001, 0.1, 0.9, 1.0)]
    found = image_evidence(image[None], np.stack(masks)[None])
    assert found.shape == (1, 4, len(EVIDENCE))
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert 0 <= found.min() <= found.max() <= 1 + 1e-6
