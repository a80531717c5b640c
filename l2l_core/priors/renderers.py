"""Renderers: a box, a point or a mask -> soft map, a square grid of probabilities of the object over the image.

They need no model; `proposals.py` chooses among them and SAM.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from l2l_core.config import ProposalsParams
from l2l_core.core import grabcut
from l2l_core.core.arrays import DoubleArray
from l2l_core.core.masks import BoolMask, cell_shares

Map = NDArray[np.float32]
Image = NDArray[np.uint8]

POINT_SIDE = 0.4
"""Assumed side of the object around a point, as a share of sqrt(height * width): the median of sqrt(box area) over
RefCOCO's val, testA and testB objects is 0.39 of it."""
FULL_SHARE = 0.6
"""A mask whose largest share of a cell is below this may vanish at a threshold of 0.5, so its shares are scaled up."""


def render_box(box_xyxy: ArrayLike, image_hw: ArrayLike, params: ProposalsParams) -> Map:
    """Boxes [..., 4] in pixels of images [..., 2] (height, width) -> maps [..., S, S] with S = size_px.

    The value is inside_prob inside, 1 - inside_prob outside and exactly 0.5 on the box's border. It changes smoothly
    over `falloff` of the box's side (at least a cell). A box thinner than a cell is widened to one.

    >>> from l2l_core.config import load_params
    >>> render_box([0, 0, 240, 480], (480, 640), load_params("params.yaml").proposals).shape
    (48, 48)
    """
    box, size_wh = np.asarray(box_xyxy, dtype=np.float64), np.asarray(image_hw, dtype=np.float64)[..., ::-1]
    profiles = []
    for axis in (1, 0):  # rows, columns
        cell = params.size_px / size_wh[..., axis]
        low, high = box[..., axis] * cell, box[..., axis + 2] * cell
        half = np.maximum(high - low, 1.0) / 2
        centers = np.arange(params.size_px) + 0.5
        depth = half[..., None] - np.abs(centers - ((low + high) / 2)[..., None])
        width = np.maximum(params.falloff * 2 * half, 1.0)[..., None]
        profiles.append(_smooth_step(0.5 + depth / width))
    inside = np.minimum(profiles[0][..., :, None], profiles[1][..., None, :])
    return _to_prob(inside, params)


def render_point(point_xy: ArrayLike, image_hw: ArrayLike, params: ProposalsParams) -> Map:
    """Points [..., 2] in pixels -> Gaussian blobs [..., S, S], 0.5 at the border of a disc of width POINT_SIDE.

    >>> from l2l_core.config import load_params
    >>> soft = render_point([320, 240], (480, 640), load_params("params.yaml").proposals)
    >>> soft.shape, bool(soft[24, 24] > 0.8)
    ((48, 48), True)
    """
    point, hw = np.asarray(point_xy, dtype=np.float64), np.asarray(image_hw, dtype=np.float64)
    radius_px = POINT_SIDE / 2 * np.sqrt(hw[..., 0] * hw[..., 1])
    squares = []
    for axis in (1, 0):
        centers = (np.arange(params.size_px) + 0.5) * (hw[..., 1 - axis] / params.size_px)[..., None]
        squares.append(((centers - point[..., axis, None]) / radius_px[..., None]) ** 2)
    distance2 = squares[0][..., :, None] + squares[1][..., None, :]
    return _to_prob(np.exp2(-distance2), params)


def render_mask(mask: BoolMask, params: ProposalsParams) -> Map:
    """A mask [H, W] -> map [S, S] of the share of each cell's area that the mask covers.

    The value is inside_prob in a covered cell, 1 - inside_prob in a free one, and in between at the mask's border. A
    mask that fills no cell, such as a thin pole, would vanish at 0.5: its shares are relative to the largest one.
    """
    share = cell_shares(mask, params.size_px, params.size_px)
    peak = float(share.max())
    return _to_prob(share / peak if 0 < peak < FULL_SHARE else share, params)


def grabcut_input(image: Image) -> Image:
    """An RGB image [H, W, 3] as GrabCut gets it: BGR, its longer side at most GRABCUT_SIDE_PX pixels."""
    height, width = image.shape[:2]
    image_bgr = np.ascontiguousarray(image[..., ::-1])
    scale = min(1.0, grabcut.GRABCUT_SIDE_PX / max(height, width))
    size_wh = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(image_bgr, size_wh, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def render_grabcut(image_bgr: Image, box_xyxy: ArrayLike, image_hw: tuple[int, int], params: ProposalsParams) -> Map:
    """Segment the object in a box [4] of an image with GrabCut -> map [S, S].

    image_bgr: as `grabcut_input` returns it. box_xyxy: in pixels of the image of size image_hw.
    The map is that of GrabCut's mask. If GrabCut finds almost nothing, the result is the box's map. Raises ValueError
    if ring or core of `params` are not fitted yet.
    """
    if params.ring == "fit" or params.core == "fit":
        raise ValueError("proposals.ring and proposals.core must be numbers here; see l2l_core/priors/fit.py")
    (height, width), (small_height, small_width) = image_hw, image_bgr.shape[:2]
    box = np.asarray(box_xyxy, dtype=np.float64)
    scaled = box * np.tile(np.array((small_width, small_height)) / (width, height), 2)
    cut = grabcut.grabcut(image_bgr, grabcut.box_trimap(small_height, small_width, scaled, params.ring, params.core))
    if cut is None:
        return render_box(box, image_hw, params)
    return render_mask(cut, params)


def _smooth_step(ramp: DoubleArray) -> DoubleArray:
    """0 below 0, 1 above 1, and a cubic with flat ends in between; 0.5 stays 0.5."""
    t = np.clip(ramp, 0.0, 1.0)
    return np.asarray(t * t * (3 - 2 * t))


def _to_prob(inside: NDArray[np.floating[Any]], params: ProposalsParams) -> Map:
    """Coverage of a cell, 0..1 -> probability between 1 - inside_prob and inside_prob."""
    low = 1 - params.inside_prob
    return np.asarray(low + (params.inside_prob - low) * inside, dtype=np.float32)
