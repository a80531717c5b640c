"""One box, point or mask becomes a soft map: hand-computed values, symmetries, and cuts of drawn and real objects."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l2l_core.config import ProposalsParams
from l2l_core.core.images import read_image
from l2l_core.core.masks import decode_rle, segmentation_to_rle
from l2l_core.priors.renderers import grabcut_input, render_box, render_grabcut, render_mask, render_point

PARAMS = ProposalsParams(renderer="box", ring=0.1, core=0.0, size_px=48, falloff=0.15, inside_prob=0.9, flat_prob=0.1)
GRABCUT = PARAMS.model_copy(update={"renderer": "grabcut"})
HW = (240, 480)
# Boxes from fractions of the image, at least 3 cells of the map wide.
boxes = st.tuples(st.floats(0, 0.9), st.floats(0, 0.9), st.floats(0.07, 1), st.floats(0.07, 1)).map(
    lambda b: (b[0] * HW[1], b[1] * HW[0], min(b[0] + b[2], 1) * HW[1], min(b[1] + b[3], 1) * HW[0])
)


# --- boxes ---


def test_box_values_along_a_row_match_hand_computed_values() -> None:
    """Box 120..360 of 480 px is cells 12..36; the border is 0.15 * 24 = 3.6 cells wide, from 10.2 to 13.8."""
    row = render_box((120, 0, 360, 240), HW, PARAMS)[24]
    assert row[:10] == pytest.approx(0.1)  # up to the cell center 9.5
    assert row[14:34] == pytest.approx(0.9)
    assert row[38:] == pytest.approx(0.1)
    ramp = (11.5 - 10.2) / 3.6  # at cell 11
    assert row[11] == pytest.approx(0.1 + 0.8 * ramp**2 * (3 - 2 * ramp))
    assert row[11] + row[12] == pytest.approx(1.0)  # on either side of the edge at 12


@settings(deadline=None, max_examples=50)
@given(boxes)
def test_mirrored_boxes_give_mirrored_maps(box: tuple[float, float, float, float]) -> None:
    x1, y1, x2, y2 = box
    soft = render_box(box, HW, PARAMS)
    assert render_box((HW[1] - x2, y1, HW[1] - x1, y2), HW, PARAMS) == pytest.approx(soft[:, ::-1], abs=1e-5)
    assert render_box((x1, HW[0] - y2, x2, HW[0] - y1), HW, PARAMS) == pytest.approx(soft[::-1], abs=1e-5)
    assert render_box((y1, x1, y2, x2), HW[::-1], PARAMS) == pytest.approx(soft.T, abs=1e-5)


@settings(deadline=None)
@given(boxes)
def test_a_map_thresholded_at_half_is_the_box(box: tuple[float, float, float, float]) -> None:
    """Cells whose centers are inside the box, found by plain comparisons."""
    soft = render_box(box, HW, PARAMS)
    assert soft.min() >= 0.1 - 1e-6
    assert soft.max() <= 0.9 + 1e-6
    x, y = (np.arange(48) + 0.5) * 10, (np.arange(48) + 0.5) * 5
    distance = np.minimum.reduce(
        np.broadcast_arrays(x[None] - box[0], box[2] - x[None], 2 * (y[:, None] - box[1]), 2 * (box[3] - y[:, None]))
    )
    assert (soft[distance > 0.01] > 0.5).all()
    assert (soft[distance < -0.01] < 0.5).all()


@settings(deadline=None)
@given(boxes, st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_wider_falloff_is_softer(box: tuple[float, float, float, float], one: float, two: float) -> None:
    sharp, soft = (
        np.abs(render_box(box, HW, PARAMS.model_copy(update={"falloff": falloff})) - 0.5)
        for falloff in sorted((one, two))
    )
    assert (sharp >= soft - 1e-5).all()


def test_a_box_thinner_than_a_cell_still_marks_its_cell() -> None:
    soft = render_box((104.0, 51.0, 106.0, 53.0), HW, PARAMS)  # center 105, 52: cell 10 (105), row 10 (52.5)
    assert np.argwhere(soft > 0.5).tolist() == [[10, 10]]


def test_batched_boxes_equal_single_boxes() -> None:
    rng = np.random.default_rng(0)
    many = np.sort(rng.uniform(0, 240, (20, 2, 2)), axis=1).reshape(20, 4)
    sizes = np.tile([[240, 480], [640, 427]], (10, 1))
    together = render_box(many, sizes, PARAMS)
    assert together.shape == (20, 48, 48)
    for soft, box, hw in zip(together, many, sizes, strict=True):
        np.testing.assert_array_equal(soft, render_box(box, hw, PARAMS))


# --- points ---


def test_a_point_is_a_round_blob() -> None:
    """The value is halfway at 0.2 * sqrt(240 * 480) = 67.9 px from the point in every direction."""
    params = PARAMS.model_copy(update={"size_px": 240})
    soft = render_point((241.0, 120.5), HW, params)  # center of cell 120, 120; cells are 2 x 1 px
    assert np.unravel_index(soft.argmax(), soft.shape) == (120, 120)
    assert soft[120, 120] == pytest.approx(0.9)
    assert soft[120, 120 + 33] > 0.5 > soft[120, 120 + 35]  # 66 and 70 px to the right
    assert soft[120 + 67, 120] > 0.5 > soft[120 + 69, 120]  # 67 and 69 px below
    assert soft.min() >= 0.1 - 1e-6


# --- masks ---


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_cells_hold_exact_area_shares_at_any_image_size(height: int, width: int, seed: int) -> None:
    """Against the mask enlarged until every cell is a whole number of pixels; smaller and larger than the grid."""
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    mask[: height // 2, : width // 2] = True  # fills at least one cell, unless the image is smaller than the grid
    params = PARAMS.model_copy(update={"size_px": 16, "inside_prob": 1.0})
    large = mask.repeat(16, axis=0).repeat(16, axis=1)
    shares = large.reshape(16, height, 16, width).mean(axis=(1, 3))
    np.testing.assert_allclose(render_mask(mask, params), shares, atol=1e-5)


# --- GrabCut ---


def test_grabcut_improves_on_boxes_of_real_photos(real_data: Path) -> None:
    """Mean IoU with the true masks of RefCOCO objects in real photos, starting from their true boxes."""
    folder = real_data / "res_mini"
    instances = json.loads((folder / "refcoco/instances.json").read_text())
    images = {item["id"]: item for item in instances["images"]}
    scores = []
    for item in instances["annotations"]:
        photo = images[item["image_id"]]
        height, width = photo["height"], photo["width"]
        mask = decode_rle(segmentation_to_rle(item["segmentation"], height, width), height, width)
        x, y, w, h = item["bbox"]
        image = read_image(folder / "images/train2014" / photo["file_name"])
        soft = (
            render_box((x, y, x + w, y + h), (height, width), PARAMS),
            render_grabcut(grabcut_input(image), (x, y, x + w, y + h), (height, width), GRABCUT),
        )
        cuts = [cv2.resize(one, (width, height), interpolation=cv2.INTER_LINEAR) > 0.5 for one in soft]
        scores.append([(cut & mask).sum() / (cut | mask).sum() for cut in cuts])
    by_box, by_grabcut = np.mean(scores, axis=0)
    assert len(scores) >= 19
    assert by_grabcut > by_box + 0.02
