"""Box functions against hand-computed values and pycocotools."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from l2l_core.core.boxes import area_xyxy, clip_xyxy, iou_xyxy, xywh_to_xyxy

coordinate = st.integers(0, 50)
xywh = st.tuples(coordinate, coordinate, st.integers(1, 30), st.integers(1, 30))


def test_converts_xywh_to_xyxy():
    np.testing.assert_array_equal(xywh_to_xyxy([[2, 3, 10, 20], [0, 0, 0, 0]]), [[2, 3, 12, 23], [0, 0, 0, 0]])


def test_clipped_boxes_match_hand_computed_values():
    boxes = [[-5, -5, 5, 5], [10, 2, 40, 30], [25, 3, 28, 9], [1, 2, 3, 4]]
    expected = [[0, 0, 5, 5], [10, 2, 20, 12], [20, 3, 20, 9], [1, 2, 3, 4]]
    clipped = clip_xyxy(boxes, height=12, width=20)

    np.testing.assert_array_equal(clipped, expected)
    np.testing.assert_array_equal(area_xyxy(clipped), [25, 100, 0, 4])  # a box outside the image becomes empty


def test_areas_match_hand_computed_values():
    np.testing.assert_array_equal(area_xyxy([[0, 0, 4, 5], [3, 3, 3, 9], [5, 5, 1, 1]]), [20, 0, 0])


def test_ious_match_hand_computed_values():
    """Two 2 x 2 boxes that share one of seven pixels, touching boxes, equal boxes and empty boxes."""
    a = [[0, 0, 2, 2], [0, 0, 2, 2], [1, 1, 3, 4], [1, 1, 1, 1]]
    b = [[1, 1, 3, 3], [2, 0, 4, 2], [1, 1, 3, 4], [1, 1, 1, 1]]
    np.testing.assert_allclose(iou_xyxy(a, b), [1 / 7, 0, 1, 0])


@given(a=st.lists(xywh, min_size=1, max_size=6), b=st.lists(xywh, min_size=1, max_size=6))
def test_ious_agree_with_pycocotools(a, b):
    theirs = coco_mask.iou(np.array(a, dtype=float), np.array(b, dtype=float), [0] * len(b))
    first, second = xywh_to_xyxy(a), xywh_to_xyxy(b)

    ours = iou_xyxy(first[:, None], second[None])  # boxes broadcast
    np.testing.assert_allclose(ours, theirs)
    np.testing.assert_allclose(iou_xyxy(second[:, None], first[None]), theirs.T)


@given(box=xywh, height=st.integers(1, 60), width=st.integers(1, 60))
def test_clipped_area_equals_the_pixel_count_inside_the_image(box, height, width):
    x1, y1, x2, y2 = xywh_to_xyxy(box).astype(int)
    canvas = np.zeros((100, 100), dtype=bool)
    canvas[y1:y2, x1:x2] = True

    clipped = clip_xyxy(xywh_to_xyxy(box), height, width)
    assert area_xyxy(clipped) == pytest.approx(canvas[:height, :width].sum())
    np.testing.assert_array_equal(clip_xyxy(clipped, height, width), clipped)
