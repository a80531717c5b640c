"""GrabCut on drawn disks with known ground truth."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from l2l_core.core.grabcut import grabcut

SIDE = 96
Y, X = np.mgrid[:SIDE, :SIDE]


def noisy(colors: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 8, colors.shape)
    return np.clip(colors + noise, 0, 255).astype(np.uint8)


def disk_and_trimap(center_yx: tuple[int, int], radius: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """A disk [H, W] and its trimap: a box of probable foreground inside a ring of probable background."""
    (y, x), reach = center_yx, radius + 3
    trimap = np.full((SIDE, SIDE), cv2.GC_BGD, dtype=np.uint8)
    trimap[max(0, y - reach - 4) : y + reach + 5, max(0, x - reach - 4) : x + reach + 5] = cv2.GC_PR_BGD
    trimap[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1] = cv2.GC_PR_FGD
    return (Y - y) ** 2 + (X - x) ** 2 <= radius**2, trimap


@pytest.mark.parametrize("center_yx", [(48, 48), (14, 70), (90, 92), (4, 4)])
def test_segments_a_disk_anywhere_in_the_image(center_yx):
    disk, trimap = disk_and_trimap(center_yx)
    cut = grabcut(noisy(np.where(disk[..., None], [200, 60, 40], [60, 120, 180])), trimap)
    assert cut is not None
    assert cut.shape == disk.shape
    assert (cut & disk).sum() / (cut | disk).sum() > 0.9


def test_distant_pixels_do_not_change_the_mask():
    disk, trimap = disk_and_trimap((30, 30))
    image = noisy(np.where(disk[..., None], [200, 60, 40], [60, 120, 180]))
    far = ((Y >= 70) | (X >= 70))[..., None]
    other = np.where(far, noisy(np.full((SIDE, SIDE, 3), (200, 60, 40))), image)  # in the disk's color
    first, second = grabcut(image, trimap), grabcut(other, trimap)
    assert first is not None
    assert second is not None
    assert (first == second).all()


def test_does_not_modify_the_trimap():
    _, trimap = disk_and_trimap((48, 48))
    before = trimap.copy()
    grabcut(noisy(np.full((SIDE, SIDE, 3), 128.0)), trimap)
    assert (trimap == before).all()


@pytest.mark.parametrize("value", [cv2.GC_BGD, cv2.GC_PR_FGD, cv2.GC_FGD])
def test_returns_none_for_a_trimap_of_only_foreground_or_background(value):
    trimap = np.full((SIDE, SIDE), value, dtype=np.uint8)
    assert grabcut(noisy(np.full((SIDE, SIDE, 3), 128.0)), trimap) is None
