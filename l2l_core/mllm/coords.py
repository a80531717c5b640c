"""Coordinate conventions of multimodal LLMs, and their conversion to original-image pixels."""

from __future__ import annotations

import math
import re
from pathlib import PurePosixPath
from typing import cast, get_args

import numpy as np
from numpy.typing import ArrayLike

from l2l_core.config import CoordScale, CoordSpace
from l2l_core.core.arrays import DoubleArray
from l2l_core.errors import ConfigError

COORD_SPACES: tuple[CoordSpace, ...] = get_args(CoordSpace)

_FAMILIES: tuple[tuple[str, CoordSpace], ...] = (
    ("refshapes-?vlm", "percent"),
    ("qwen-?25-?vl", "resized_pixel"),
    ("qwen-?vl-?chat|qwen-?[23]-?vl", "norm1000"),
    ("internvl-?(2|25|3|35)", "norm1000"),
    ("minicpm-?v-?(26|4|45)|minicpm-?o-?26", "norm1000"),
    ("florence-?2", "norm1000"),
    ("gemini-?(15|2|20|25|3)|gemini-robotics-er-1[56]", "norm1000_yx"),
    ("glm-?4[156]v|(doubao-|seed-?)1-?5-?(thinking-)?(vision|vl)", "norm1000"),
    ("deepseek-?vl-?2|cogvlm|rex-?omni", "norm999"),
    ("paligemma-?2?", "norm1024_yx"),
    (r"molmoe?(?=-\d+b)|minigpt-?v2", "percent"),
    ("molmo2", "norm1000"),
    ("llava-?v?-?15", "unit_square"),
    ("kosmos-?2|ovis-?25|moondream-?[23]", "unit"),
)
"""Pattern of a family name (see `_family_name`) -> the convention in its model card. Matches are exact: a successor may
use another convention, so its name must not match."""

MIN_SIDE_PX = 1.0
"""A box thinner than one pixel of the original image is unusable; it usually means a wrong coordinate space."""

_SPAN: dict[CoordScale, float] = {
    "norm1000": 1000.0,
    "norm999": 999.0,
    "norm1024": 1024.0,
    "percent": 100.0,
    "unit": 1.0,
}

# Qwen2.5-VL's image processor: patches of 14 px merged 2 x 2, the minimum area and the default maximum.
_QWEN_FACTOR_PX = 28
_QWEN_MIN_PX = 56 * 56
QWEN_MAX_PX = 28 * 28 * 1280


def resolve_coord_space(model: str, configured: str) -> CoordSpace:
    """The coordinate space of a model's responses: `configured`, or that of the model's family if it is `auto`.

    Only the last part of a path or hub id names the family. Raises ConfigError if the family is unknown.
    """
    for space in COORD_SPACES:
        if configured == space:
            return space
    name = _family_name(model)
    spaces = {space for form, space in _FAMILIES if re.search(rf"(?<![a-z0-9])(?:{form})(?![a-z0-9])", name)}
    if len(spaces) == 1:
        return spaces.pop()
    raise ConfigError(
        f"priors.coord_space: got {configured!r}, but the family of model {model!r} is unknown; "
        f"set it to {'|'.join(COORD_SPACES)}"
    )


def _family_name(model: str) -> str:
    """`Org/Qwen2.5_VL-7B` -> `qwen25-vl-7b`: no path, no point within a version, and hyphens for other separators."""
    last = PurePosixPath(model.replace("\\", "/")).name.lower()
    return re.sub(r"[\s_.:]+", "-", re.sub(r"(?<=\d)[._](?=\d)", "", last))


def is_y_first(space: CoordSpace) -> bool:
    """Whether y comes before x in boxes and points without named axes."""
    return space.endswith("_yx")


def scale_of(space: CoordSpace) -> CoordScale:
    """A coordinate space without the order of its axes."""
    return cast(CoordScale, space.removesuffix("_yx"))


def pixels_per_unit(space: CoordSpace, image_hw: ArrayLike, input_hw: ArrayLike | None = None) -> DoubleArray:
    """Original-image pixels per unit of a coordinate space along x and y; [..., 2] height, width -> [..., 2] x, y.

    input_hw: size of the image as the model saw it; required for `resized_pixel`, ignored otherwise.
    """
    image_wh, scale = np.asarray(image_hw, dtype=np.float64)[..., ::-1], scale_of(space)
    if scale == "pixel":
        return np.ones_like(image_wh)
    if scale == "resized_pixel":
        if input_hw is None:
            raise ValueError("resized_pixel needs the size of the image as the model saw it")
        return np.asarray(image_wh / np.asarray(input_hw, dtype=np.float64)[..., ::-1])
    if scale == "unit_square":
        return np.repeat(image_wh.max(axis=-1, keepdims=True), 2, axis=-1)
    return np.asarray(image_wh / _SPAN[scale])


def origin_px(space: CoordSpace, image_hw: ArrayLike) -> DoubleArray:
    """Origin of a coordinate space in the original image; [..., 2] height, width -> [..., 2] x, y in pixels.

    Only `unit_square` starts outside the image: in the border that centers the image in a square.
    """
    image_wh = np.asarray(image_hw, dtype=np.float64)[..., ::-1]
    if scale_of(space) != "unit_square":
        return np.zeros_like(image_wh)
    return np.asarray((image_wh - image_wh.max(axis=-1, keepdims=True)) / 2)


def write_boxes(
    xyxy: DoubleArray, space: CoordSpace, image_hw: ArrayLike, input_hw: ArrayLike | None = None
) -> DoubleArray:
    """Boxes [N, 4] x1 y1 x2 y2 in original-image pixels -> the notation of a coordinate space; sizes: [N, 2]."""
    scale, origin = pixels_per_unit(space, image_hw, input_hw), origin_px(space, image_hw)
    written = (xyxy - np.tile(origin, 2)) / np.tile(scale, 2)
    return np.asarray(written[:, [1, 0, 3, 2]] if is_y_first(space) else written)


def qwen_input_hw(height: int, width: int, max_px: int = QWEN_MAX_PX) -> tuple[int, int]:
    """Height and width to which Qwen2.5-VL's processor resizes an image of the given size.

    Both become multiples of 28 px; the area is kept between 56 x 56 px and max_px.
    """
    factor = _QWEN_FACTOR_PX
    rounded_hw = (max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor))
    area = rounded_hw[0] * rounded_hw[1]
    if _QWEN_MIN_PX <= area <= max_px:
        return rounded_hw
    shrinks = area > max_px
    scale = math.sqrt((max_px if shrinks else _QWEN_MIN_PX) / (height * width))
    to_multiple = math.floor if shrinks else math.ceil
    sides = [max(factor, to_multiple(side * scale / factor) * factor) for side in (height, width)]
    return sides[0], sides[1]


def sent_hw(space: CoordSpace, image_hw: tuple[int, int], max_px: int) -> tuple[int, int]:
    """Height and width of the image sent to a model that responds in `space`.

    resized_pixel: the size that the model's own processor would produce, so that the size behind the coordinates is
    known for every engine. unit_square: a square that contains the image. All others: the original size. All but
    `pixel` are shrunk to at most max_px.
    """
    (height, width), scale = image_hw, scale_of(space)
    if scale == "unit_square":
        side = min(max(image_hw), math.isqrt(max_px))
        return side, side
    if scale == "resized_pixel":
        return qwen_input_hw(height, width, max_px)
    if scale == "pixel" or height * width <= max_px:
        return image_hw
    shrink = math.sqrt(max_px / (height * width))
    return max(1, math.floor(height * shrink)), max(1, math.floor(width * shrink))
