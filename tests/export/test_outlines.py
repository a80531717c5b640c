"""Checks polygons by drawing them with pycocotools."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask

from l2l_core.export.outlines import mask_to_polygons

RING = np.array([[0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 1, 0, 1, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]], bool)


def drawn(polygons: list[list[float]], height: int, width: int) -> np.ndarray:
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))).astype(bool)


@settings(deadline=None, max_examples=300)
@given(arrays(bool, st.tuples(st.integers(1, 14), st.integers(1, 14))))
def test_polygons_reproduce_any_mask(mask):
    polygons = mask_to_polygons(mask)
    assert bool(polygons) == mask.any()
    if polygons:
        np.testing.assert_array_equal(drawn(polygons, *mask.shape), mask)


def test_polygons_reproduce_large_masks_with_holes_and_islands():
    noise = np.random.default_rng(0).random((40, 60)).repeat(9, axis=0).repeat(7, axis=1)
    for share in (0.1, 0.5, 0.9):
        np.testing.assert_array_equal(drawn(mask_to_polygons(noise < share), 360, 420), noise < share)


def test_a_rectangle_becomes_a_polygon_with_cut_corners():
    mask = np.zeros((9, 12), bool)
    mask[2:7, 3:11] = True
    (polygon,) = mask_to_polygons(mask)
    points = {tuple(point) for point in np.reshape(polygon, (-1, 2)).tolist()}
    assert points == {(3, 2.5), (3.5, 2), (10.5, 2), (11, 2.5), (11, 6.5), (10.5, 7), (3.5, 7), (3, 6.5)}


def test_each_part_becomes_one_polygon_and_holes_add_none():
    assert len(mask_to_polygons(RING)) == 1
    assert len(mask_to_polygons(np.concatenate([RING, RING]))) == 2
    assert mask_to_polygons(np.zeros((3, 3), bool)) == []


@pytest.mark.parametrize("turns", range(4))
def test_ring_polygon_has_the_area_of_its_pixels_minus_the_cut_corners(turns):
    """The shoelace formula by hand: 3 x 3 minus four corners of 1/8 each and a hole of half a pixel."""
    (polygon,) = mask_to_polygons(np.rot90(RING, turns))
    x, y = np.reshape(polygon, (-1, 2)).T
    assert abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2 == pytest.approx(9 - 4 / 8 - 1 / 2)
