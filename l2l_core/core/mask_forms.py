"""A mask in the forms that JSON lines hold: the path of a PNG, polygons, COCO run lengths, or a list of its parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from l2l_core.core.images import project_path
from l2l_core.core.masks import BoolMask, encode_rle, rle_area_px, segmentation_to_rle, union_rle

MASK_FORMS = (
    "the path of a PNG, polygons as [[x1, y1, x2, y2, x3, y3, ...], ...], or run lengths as "
    '{"size": [height, width], "counts": ...}'
)
MASK_MODES = ("1", "L", "P", "I", "I;16")
"""Pillow's modes of one channel, where "not 0" is unambiguous; a color image would need a guess."""
OVERSHOOT = 0.1
"""Polygons may reach beyond the border by this share of the image's side. Annotation tools overshoot by a few pixels;
coordinates of another space, such as 0..1000, reach further in some line of a file."""


def read_mask(mask: object, folder: Path, height: int, width: int) -> bytes:
    """A mask in any form -> run lengths at the image's size.

    mask: the path of a PNG of one channel (relative to `folder`; not 0 is foreground), polygons (bare or as
    {"polygon": ...}), a COCO run-length object, or a list of paths and objects, which are parts of one mask. PNGs and
    run lengths may be empty. Polygons must enclose a pixel and stay within OVERSHOOT of the image. Raises ValueError
    with a one-line description of the problem.
    """
    if isinstance(mask, list) and any(isinstance(part, str | dict) for part in mask):
        return union_rle([_read_part(part, folder, height, width) for part in mask], height, width)
    return _read_part(mask, folder, height, width)


def mask_paths(mask: object, folder: Path) -> list[Path]:
    """The files that a mask names, whether they exist or not; see `read_mask`."""
    parts = mask if isinstance(mask, list) else [mask]
    return [folder / part for part in parts if isinstance(part, str)]


def _read_part(mask: object, folder: Path, height: int, width: int) -> bytes:
    if isinstance(mask, str):
        return encode_rle(_mask_image(folder / mask, height, width))
    segmentation = _segmentation(mask)
    counts = segmentation_to_rle(segmentation, height, width)
    if isinstance(segmentation, list):
        _check_inside(segmentation, height, width)
        if not rle_area_px(counts, height, width):
            raise ValueError("empty: the polygons enclose no pixel of the image; expected coordinates in pixels")
    return counts


def _check_inside(polygons: list[list[float]], height: int, width: int) -> None:
    xy = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in polygons])
    low, high, size = xy.min(axis=0), xy.max(axis=0), np.array([width, height])
    if (low < -OVERSHOOT * size).any() or (high > (1 + OVERSHOOT) * size).any():
        raise ValueError(
            f"the polygons reach from x {low[0]:g}, y {low[1]:g} to x {high[0]:g}, y {high[1]:g}, outside the image of "
            f"{width}x{height} px; expected coordinates in pixels of the stored image"
        )


def _segmentation(mask: object) -> object:
    """COCO polygons or run lengths. Raises ValueError that names the form found instead."""
    if isinstance(mask, dict) and {"size", "counts"} & set(mask):
        return mask
    if isinstance(mask, dict) and set(mask) != {"polygon"}:
        raise ValueError(f"got an object with the keys {', '.join(map(repr, mask)) or 'none'}, expected {MASK_FORMS}")
    polygons = mask["polygon"] if isinstance(mask, dict) else mask
    if not isinstance(polygons, list):
        raise ValueError(f"polygon: got {type(polygons).__name__}, expected {MASK_FORMS}")
    is_one = bool(polygons) and not any(isinstance(part, list) for part in polygons)
    return [polygons] if is_one else polygons


def _mask_image(path: Path, height: int, width: int) -> BoolMask:
    name = project_path(path)
    try:
        if path.exists() and not path.is_file():  # opening a pipe may never end
            raise ValueError("not a regular file")
        with Image.open(path, formats=("PNG",)) as image:
            mode, size = image.mode, image.size
            # Decoded only if it has the image's size, which is within MAX_PIXELS.
            values = np.asarray(image) if size == (width, height) else None
    except FileNotFoundError:
        raise ValueError(f"{name} not found") from None
    except Exception as error:  # decoders raise many exception types on a damaged file
        raise ValueError(f"{name} is not a readable PNG: {error}") from None
    if mode not in MASK_MODES:
        raise ValueError(f"{name} has mode {mode}, expected one channel in which 0 is background")
    if size != (width, height):
        raise ValueError(f"{name} is {size[0]}x{size[1]} px, expected {width}x{height} like the image")
    return np.asarray(np.asarray(values) != 0)
