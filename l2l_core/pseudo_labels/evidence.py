"""Image evidence: does a candidate look like one object? Independent of the teacher and the prior."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from l2l_core.core.masks import square_px

EVIDENCE = (
    "contrast",  # distance between the mean colors of the mask's rim and of its surroundings
    "border_gradient",  # mean color gradient on the mask's border
    "border_edges",  # fraction of the border on the image's strongest edges
    "spread",  # standard deviation of the colors inside the mask
    "spread_outside",  # standard deviation of the colors in its surroundings
    "largest_part",  # fraction of the mask's area in its largest connected component
    "box_fill",  # fraction of its bounding box that the mask covers
    "at_image_edge",  # fraction of the mask's outermost pixels on the image's edge
)
"""Columns of `image_evidence`, each in [0, 1]; 0 if the mask is empty. Colors are Lab, each channel in [0, 1].
Distances and gradients are divided by their maximum."""

LARGEST_DISTANCE = 3**0.5
"""Maximum distance between two colors of three channels in [0, 1]."""
LARGEST_GRADIENT = 4 * 6**0.5
"""Maximum gradient of OpenCV's 3 x 3 Sobel filters: 4 in each of three channels and two directions."""

RIM = 1 / 32
"""Width of the rim inside a mask and of the surroundings outside, as a fraction of the image side."""
STRONG_EDGE = 0.9
"""An edge is strong above this quantile of the image's gradients."""


def image_evidence(images: NDArray[np.uint8], candidate_masks: NDArray[np.bool_]) -> NDArray[np.float32]:
    """RGB images uint8 [B, M, M, 3] and their candidates bool [B, K, M, M] -> EVIDENCE float32 [B, K, 8]."""
    return np.stack([_of_image(image, masks) for image, masks in zip(images, candidate_masks, strict=True)])


def _of_image(image: NDArray[np.uint8], masks: NDArray[np.bool_]) -> NDArray[np.float32]:
    """[M, M, 3] and [K, M, M] -> [K, 8]."""
    colors = cv2.cvtColor(image, cv2.COLOR_RGB2LAB).astype(np.float32) / np.float32(255)
    right, down = cv2.Sobel(colors, cv2.CV_32F, 1, 0), cv2.Sobel(colors, cv2.CV_32F, 0, 1)
    gradient = np.sqrt((right**2 + down**2).sum(-1)).astype(np.float32)
    strong = (gradient > np.quantile(gradient, STRONG_EDGE)).astype(np.uint8)
    return np.stack([_of_label(colors, gradient, strong, mask.astype(np.uint8)) for mask in masks])


def _of_label(
    colors: NDArray[np.float32], gradient: NDArray[np.float32], strong: NDArray[np.uint8], label: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """Evidence of one mask of zeros and ones. OpenCV's masked means are several times faster than NumPy's indexing."""
    area = cv2.countNonZero(label)
    if not area:
        return np.zeros(len(EVIDENCE), dtype=np.float32)
    wide, thin = square_px(RIM * len(label)), square_px(1)
    outside, rim = cv2.dilate(label, wide) - label, label - cv2.erode(label, wide)
    core = cv2.erode(label, thin, borderValue=0)
    border, outermost = cv2.dilate(label, thin) - core, label - core
    # A mask of the whole image has no surroundings.
    around, spread_outside = cv2.meanStdDev(colors, mask=outside if outside.any() else label)
    inner, _ = cv2.meanStdDev(colors, mask=rim if rim.any() else label)
    _, spread = cv2.meanStdDev(colors, mask=label)
    parts = cv2.connectedComponentsWithStats(label, connectivity=8)[2][1:, cv2.CC_STAT_AREA]
    _, _, width, height = cv2.boundingRect(label)
    rest = cv2.countNonZero(outermost[1:-1, 1:-1])  # of the outermost pixels, those off the image's edge
    return np.array(
        [
            np.linalg.norm(inner - around) / LARGEST_DISTANCE,
            cv2.mean(gradient, mask=border)[0] / LARGEST_GRADIENT,
            cv2.mean(strong, mask=border)[0],
            spread.mean(),
            spread_outside.mean(),
            parts.max() / area,
            area / (width * height),
            1 - rest / cv2.countNonZero(outermost),
        ],
        dtype=np.float32,
    )
