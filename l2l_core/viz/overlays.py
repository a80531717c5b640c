"""Small pictures of the model's input, its output and its errors: image, box, soft map, mask, kept pixels, errors."""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray

from l2l_core.core.masks import BoolMask

Picture = NDArray[np.uint8]  # [H, W, 3] RGB
Color = tuple[int, int, int]

JPEG_QUALITY = 75
"""Out of 100: at the size of a report's pictures no difference is visible, and a page is a third smaller than at 88."""

BOX: Color = (255, 212, 0)
MASK: Color = (176, 58, 255)
RIGHT: Color = (38, 166, 65)
WRONG: Color = (224, 49, 49)
MISSED: Color = (25, 113, 240)
OUTLINE: Color = (255, 255, 255)
SOFT_MAP = "viridis"  # perceptually uniform, in color, in gray and for color-blind readers

TINT = 0.6
"""Opacity of a mask's color: the mask stands out, and the image below stays visible."""

DIMMED = 0.25
"""Brightness of pixels that do not train the network."""


def fit(image: Picture, longest_px: int) -> Picture:
    """Resize the image so that its longer side is `longest_px`; all lines drawn on it then have the same width."""
    height, width = image.shape[:2]
    scale = longest_px / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC), np.uint8)


def with_boxes(
    image: Picture, boxes_xyxy: Iterable[NDArray[np.float64]], points_xy: Iterable[NDArray[np.float64]]
) -> Picture:
    """Draw boxes x1 y1 x2 y2 and points x y, both as shares 0..1 of the width and height, on a copy."""
    picture, (height, width) = image.copy(), image.shape[:2]
    for box in boxes_xyxy:
        left, top, right, bottom = np.round(box * [width, height, width, height]).astype(int).tolist()
        corners = (left, top), (max(right - 1, left), max(bottom - 1, top))
        cv2.rectangle(picture, *corners, (0, 0, 0), 4)  # a dark rim: the line must be visible on any image
        cv2.rectangle(picture, *corners, BOX, 2)
    for point in points_xy:
        center = tuple(np.round(point * [width, height]).astype(int).tolist())
        cv2.circle(picture, center, 5, (0, 0, 0), -1)
        cv2.circle(picture, center, 3, BOX, -1)
    return picture


def with_outlines(image: Picture, masks: Iterable[BoolMask]) -> Picture:
    """Outline masks [H, W] of any size over the whole image, in the color of a prior, on a copy."""
    picture = image.copy()
    for mask in masks:
        contours, _ = cv2.findContours(_like(mask, image).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, contours, -1, (0, 0, 0), 4)  # a dark rim, as around boxes
        cv2.drawContours(picture, contours, -1, BOX, 2)
    return picture


def with_soft_map(image: Picture, soft: NDArray[np.uint8]) -> Picture:
    """A soft map [h, w] (0..255 is 0..1, over the whole image) as a heat map over the gray image."""
    height, width = image.shape[:2]
    large = cv2.resize(soft, (width, height), interpolation=cv2.INTER_LINEAR)
    heat = 255 * colormaps[SOFT_MAP](large)[..., :3]
    return _bytes(TINT * heat + (1 - TINT) * _gray(image))


def with_mask(image: Picture, mask: BoolMask) -> Picture:
    """A mask [H, W] of any size over the whole image, tinted and outlined."""
    mask = _like(mask, image)
    return _outlined(_tinted(image, mask, MASK), mask)


def with_kept(image: Picture, mask: BoolMask, keep: BoolMask) -> Picture:
    """The valid pixels of a label: its foreground tinted, its background unchanged, invalid pixels dark."""
    mask, keep = _like(mask, image), _like(keep, image)
    picture = _tinted(image, mask & keep, MASK)
    return _bytes(np.where(keep[..., None], picture, DIMMED * _gray(image)))


def with_errors(image: Picture, mask: BoolMask, truth: BoolMask) -> Picture:
    """A mask against the truth: right, wrong and missed foreground in three colors, the truth outlined."""
    mask, truth = _like(mask, image), _like(truth, image)
    picture = _tinted(_bytes(np.repeat(_gray(image), 3, axis=2)), mask & truth, RIGHT)  # gray: the colors stand out
    picture = _tinted(picture, mask & ~truth, WRONG)
    return _outlined(_tinted(picture, truth & ~mask, MISSED), truth)


def jpeg(picture: Picture) -> bytes:
    """The picture as a JPEG file; color at full resolution, since thin colored lines smear otherwise."""
    sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY, *sampling]
    return bytes(cv2.imencode(".jpg", picture[..., ::-1], options)[1])


def _like(mask: BoolMask, image: Picture) -> BoolMask:
    height, width = image.shape[:2]
    return np.asarray(cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST), bool)


def _gray(image: Picture) -> NDArray[np.float64]:
    return np.asarray(image.mean(axis=2, keepdims=True))


def _tinted(image: Picture, mask: BoolMask, color: Color) -> Picture:
    mixed = TINT * np.array(color) + (1 - TINT) * image
    return _bytes(np.where(mask[..., None], mixed, image))


def _outlined(image: Picture, mask: BoolMask) -> Picture:
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return np.asarray(cv2.drawContours(image.copy(), contours, -1, OUTLINE, 1), np.uint8)


def _bytes(values: NDArray[np.float64]) -> Picture:
    return np.asarray(np.clip(np.round(values), 0, 255), np.uint8)
