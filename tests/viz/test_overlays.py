"""Overlay pictures, checked pixel by pixel on tiny images."""

import io

import numpy as np
import pytest
from PIL import Image

from l2l_core.viz import overlays

GREY = np.full((8, 12, 3), 100, np.uint8)


def left(columns: int) -> np.ndarray:
    mask = np.zeros((8, 12), bool)
    mask[:, :columns] = True
    return mask


def hue(pixel: np.ndarray) -> str:
    return "rgb"[int(np.argmax(pixel))]


def test_colors_errors_green_red_and_blue_and_outlines_the_truth() -> None:
    truth = np.zeros((8, 12), bool)
    truth[:, 4:] = True  # mask covers 0..7, so 0..3 is wrong, 4..7 right, 8..11 missed
    picture = overlays.with_errors(GREY, left(8), truth)
    assert [hue(picture[3, x]) for x in (1, 6, 9)] == ["r", "g", "b"]
    assert (picture[:, 4] == overlays.OUTLINE).all()


def test_tints_only_the_mask() -> None:
    picture = overlays.with_mask(GREY, left(5))
    assert (picture[:, 5:] == GREY[:, 5:]).all()
    assert (picture[3, 2] != GREY[3, 2]).any()


def test_darkens_dropped_pixels_and_keeps_valid_background() -> None:
    picture = overlays.with_kept(GREY, left(4), left(8))
    assert (picture[:, 8:] == 25).all()  # 100 dimmed to a quarter
    assert (picture[:, 4:8] == 100).all()
    assert (picture[:, :4] != 100).any(axis=2).all()


def test_soft_map_covers_the_whole_image() -> None:
    soft = np.zeros((4, 4), np.uint8)
    soft[:, 2:] = 255
    picture = overlays.with_soft_map(GREY, soft).astype(int)
    low, high = picture[:, 0], picture[:, -1]
    assert (low[:, 2] > low[:, 1]).all()  # viridis begins blue
    assert (high[:, 1] > high[:, 2]).all()  # and ends yellow


def test_draws_a_box_at_relative_coordinates() -> None:
    picture = overlays.with_boxes(np.zeros((100, 200, 3), np.uint8), [np.array([0.25, 0.2, 0.75, 0.8])], [])
    ys, xs = np.nonzero((picture == overlays.BOX).all(axis=2))
    assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == pytest.approx((50, 20, 150, 80), abs=2)


def test_outlines_a_mask_of_any_size_where_it_is() -> None:
    """A mask of twice the picture's size from 25 % to 75 % of its width and 20 % to 80 % of its height."""
    mask = np.zeros((200, 400), bool)
    mask[40:160, 100:300] = True
    picture = overlays.with_outlines(np.full((100, 200, 3), 90, np.uint8), [mask])
    ys, xs = np.nonzero((picture == overlays.BOX).all(axis=2))
    assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == pytest.approx((50, 20, 150, 80), abs=2)
    assert (picture[50, 100] == 90).all()  # the inside stays visible


@pytest.mark.parametrize("shape", [(10, 40), (400, 100), (30, 30)])
def test_fits_pictures_to_the_requested_size_and_keeps_their_aspect_ratio(shape: tuple[int, int]) -> None:
    picture = overlays.fit(np.zeros((*shape, 3), np.uint8), 80)
    assert max(picture.shape[:2]) == 80
    assert picture.shape[0] / picture.shape[1] == pytest.approx(shape[0] / shape[1], rel=0.05)


def test_accepts_masks_larger_than_the_picture() -> None:
    mask = np.zeros((80, 120), bool)
    mask[:, :50] = True
    assert (overlays.with_mask(GREY, mask) == overlays.with_mask(GREY, left(5))).all()


def test_jpeg_preserves_colors() -> None:
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[..., 0] = 200
    back = np.asarray(Image.open(io.BytesIO(overlays.jpeg(picture))))
    assert np.abs(back.astype(int) - picture).max() < 8
