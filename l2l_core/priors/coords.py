"""How multimodal LLMs write coordinates, and how these become original-image pixels."""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from l2l_core.errors import ConfigError
from l2l_core.geometry import FloatArray

CoordSpace = Literal["pixel", "resized_pixel", "norm1000", "percent", "unit"]
"""pixel: of the original image; resized_pixel: of the image as the model saw it; the others span the whole image."""
COORD_SPACES: tuple[CoordSpace, ...] = get_args(CoordSpace)

FAMILY_COORD_SPACES: dict[str, CoordSpace] = {
    "refshapesvlm": "percent",  # first: a folder above it may be called after another family
    "qwen25vl": "resized_pixel",
    "qwen2vl": "norm1000",
    "qwen3vl": "norm1000",
    "internvl": "norm1000",
    "molmo": "percent",
    "llava": "unit",
}
"""Part of a model's name (lower case, letters and digits only) -> what its model card or its answers show."""

MIN_SIDE_PX = 1.0
"""A box thinner than a pixel of the original image marks nothing; it is the usual trace of a wrong coordinate space."""

_SPAN: dict[CoordSpace, float] = {"norm1000": 1000.0, "percent": 100.0, "unit": 1.0}

# Qwen2.5-VL's image processor: patches of 14 px merged 2 x 2, the least area and the usual budget.
_QWEN_FACTOR_PX = 28
_QWEN_MIN_PX = 56 * 56
QWEN_MAX_PX = 28 * 28 * 1280


def resolve_coord_space(model: str, configured: str) -> CoordSpace:
    """The coordinate space of a model's answers: as configured, or by the model's family where that is `auto`.

    Raises ConfigError where the family is unknown.
    """
    for space in COORD_SPACES:
        if configured == space:
            return space
    name = "".join(letter for letter in model.lower() if letter.isalnum())
    for family, space in FAMILY_COORD_SPACES.items():
        if family in name:
            return space
    raise ConfigError(
        f"priors.coord_space: got {configured!r}, but the family of model {model!r} is unknown; "
        f"set it to {'|'.join(COORD_SPACES)}"
    )


def pixels_per_unit(space: CoordSpace, image_hw: ArrayLike, input_hw: ArrayLike | None = None) -> FloatArray:
    """Original-image pixels per unit of a coordinate space along x and y; [..., 2] height, width -> [..., 2] x, y.

    input_hw: size of the image as the model saw it; only `resized_pixel` reads it, and it must be given there.
    """
    image_wh = np.asarray(image_hw, dtype=np.float64)[..., ::-1]
    if space == "pixel":
        return np.ones_like(image_wh)
    if space == "resized_pixel":
        if input_hw is None:
            raise ValueError("resized_pixel needs the size of the image as the model saw it")
        return np.asarray(image_wh / np.asarray(input_hw, dtype=np.float64)[..., ::-1])
    return np.asarray(image_wh / _SPAN[space])


def qwen_input_hw(height: int, width: int, max_px: int = QWEN_MAX_PX) -> tuple[int, int]:
    """Height and width to which Qwen2.5-VL's processor resizes an image of that size.

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
    """Height and width in which an image is sent to a model that answers in `space`.

    resized_pixel: what the model's own processor would make of it, so that the size which the answer refers to is known
    whatever serves the model. pixel: as it is. Else as it is, or shrunk to max_px.
    """
    height, width = image_hw
    if space == "resized_pixel":
        return qwen_input_hw(height, width, max_px)
    if space == "pixel" or height * width <= max_px:
        return image_hw
    scale = math.sqrt(max_px / (height * width))
    return max(1, math.floor(height * scale)), max(1, math.floor(width * scale))
