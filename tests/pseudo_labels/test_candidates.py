"""Checks candidates against a scene with known masks, set operations, and the masks behind the views."""

import numpy as np
import pytest
import torch
from simulated_views import simulated_views

from l2l_core.data.views import Views
from l2l_core.pseudo_labels.candidates import build_candidates, sharpen
from l2l_core.pseudo_labels.features import CANDIDATES

SIDE = 96


def disc(row, column, radius, side=SIDE):
    rows, columns = np.mgrid[:side, :side]
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


@pytest.fixture(scope="module")
def scene():
    """A red and a blue disc on a gray, slightly noisy background."""
    red, blue = disc(40, 30, 14), disc(60, 70, 12)
    image = np.full((SIDE, SIDE, 3), 120, dtype=np.int16)
    image[red], image[blue] = (200, 40, 40), (40, 60, 200)
    image += np.random.default_rng(0).integers(-8, 9, image.shape, dtype=np.int16)
    return image.clip(0, 255).astype(np.uint8), red, blue


def iou(first, second):
    return (first & second).sum() / (first | second).sum()


def views_of(image, prob, flipped, no_prior, proposal):
    maps = [np.asarray(values, dtype=np.float32)[None] for values in (prob, flipped, no_prior, proposal)]
    return Views(
        np.array([1]), image[None], *maps, np.ones(1, dtype=np.float32), np.zeros(1, dtype=np.float32), np.array([3])
    )


def test_sharpen_fits_a_rough_mask_to_its_object(scene):
    """The first disc is shifted and too small; the second is shifted and one pixel too large."""
    image, red, _ = scene
    for rough in (disc(43, 32, 12), disc(39, 29, 15)):
        fitted = sharpen(image, rough)
        assert iou(rough, red) < 0.86
        assert iou(fitted, red) > 0.95


def test_sharpen_stays_near_the_input_mask(scene):
    """It never includes the distant second object."""
    image, _, blue = scene
    assert not (sharpen(image, disc(40, 30, 12)) & blue).any()


def test_sharpen_leaves_degenerate_masks_unchanged(scene):
    """GrabCut cannot refine an empty mask, a mask of a few pixels, or a mask of the whole image."""
    image, *_ = scene
    for mask in (np.zeros((SIDE, SIDE), bool), disc(10, 10, 1), np.ones((SIDE, SIDE), bool)):
        np.testing.assert_array_equal(sharpen(image, mask), mask)


def test_sharpen_fits_masks_in_large_images(scene):
    """The image and its object are four times as large."""
    image, red, _ = scene
    large = image.repeat(4, 0).repeat(4, 1)
    fitted = sharpen(large, disc(43 * 4, 32 * 4, 12 * 4, 4 * SIDE))
    assert fitted.shape == (4 * SIDE, 4 * SIDE)
    assert iou(fitted, red.repeat(4, 0).repeat(4, 1)) > 0.95


def test_candidates_match_hand_computed_masks(scene):
    """The teacher marks a small red disc, nothing in the flipped view, and both discs without the prior. The
    proposal marks a blue disc."""
    image, red, _ = scene
    rough_red, rough_blue = disc(42, 31, 12), disc(61, 69, 11)
    views = views_of(image, 0.9 * rough_red, 0.2 * rough_red, 0.9 * (rough_red | rough_blue), 0.8 * rough_blue)
    by_sam, neighbor = disc(20, 20, 5), disc(60, 20, 5)
    made = dict(zip(CANDIDATES, build_candidates(views, CANDIDATES, by_sam[None], neighbor[None])[0], strict=True))
    np.testing.assert_array_equal(made["teacher"], rough_red)
    np.testing.assert_array_equal(made["ensemble"], rough_red)  # (0.9 + 0.2 + 0.9) / 3 on red, 0.3 on blue
    assert iou(made["sharpened"], red) > 0.95
    np.testing.assert_array_equal(made["prior"], rough_blue)
    assert not made["overlap"].any()
    np.testing.assert_array_equal(made["union"], made["sharpened"] | made["prior"])
    np.testing.assert_array_equal(made["sam"], by_sam)
    np.testing.assert_array_equal(made["neighbor"], neighbor)


@pytest.mark.parametrize(
    "names", [("teacher",), ("union", "prior"), ("overlap",), ("prior", "sam"), ("neighbor", "teacher")]
)
def test_candidates_follow_the_requested_order(names):
    views, _ = simulated_views(6, seed=0)
    by_sam, neighbor = np.random.default_rng(0).random((2, 6, 32, 32)) > 0.5
    everything = build_candidates(views, CANDIDATES, by_sam, neighbor)
    expected = everything[:, [CANDIDATES.index(name) for name in names]]
    np.testing.assert_array_equal(build_candidates(views, names, by_sam, neighbor), expected)
    assert everything.shape == (6, len(CANDIDATES), 32, 32)
    assert everything.dtype == bool


@pytest.mark.parametrize("name", ["sam", "neighbor"])
def test_candidates_from_outside_need_their_masks(name):
    views, _ = simulated_views(2, seed=0)
    with pytest.raises(ValueError, match=f"the candidate {name} needs its masks"):
        build_candidates(views, ("teacher", name))


def test_candidates_do_not_depend_on_the_thread_count():
    views, _ = simulated_views(12, seed=1)
    image = np.random.default_rng(2).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    views = Views(**(vars(views) | {"image": image}))
    threads = torch.get_num_threads()
    made = []
    for count in (1, 2):
        torch.set_num_threads(count)
        made.append(build_candidates(views, ("sharpened", "prior")))
    torch.set_num_threads(threads)
    np.testing.assert_array_equal(*made)
