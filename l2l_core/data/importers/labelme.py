"""LabelMe's annotations: a JSON file beside every image."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from l2l_core.data.images import project_path
from l2l_core.data.importers.entries import (
    Entry,
    image_size,
    mask_rle,
    points_of,
    read_json,
    rows_of,
    shown,
    text,
    to_json_lines,
)
from l2l_core.errors import InputError
from l2l_core.masks import BoolMask, decode_rle, segmentation_to_rle
from l2l_core.records import TRAIN


def import_labelme(folder: Path, out: Path) -> str:
    """The *.json of a folder -> JSON lines for a file in the folder `out`.

    Each shape is a pair: its sentence is its `description`, or its `label` where that is empty. Shapes of an image with
    one sentence and one group_id are one mask. A text `split` among the file's flags names the split of its image.
    Raises InputError that lists every bad file and shape.
    """
    source = project_path(folder)
    files = sorted(folder.glob("*.json"))
    if not files:
        raise InputError(f"{source}: got a folder without *.json, expected one with LabelMe's files")
    entries: list[Entry] = []
    problems: list[str] = []
    for file in files:
        try:
            entries += _entries(read_json(file), file, problems)
        except InputError as error:
            problems.append(str(error))
        except ValueError as error:
            problems.append(f"{project_path(file)}: {error}")
    return to_json_lines(entries, out, source, problems)


def _entries(document: Any, file: Path, problems: list[str]) -> list[Entry]:
    shapes = rows_of(document, "shapes")
    image = file.parent / text(document, "imagePath").replace("\\", "/")  # as written on Windows
    height, width = image_size(document, "imageHeight", "imageWidth")
    flags = document.get("flags")
    split = text(flags, "split") if isinstance(flags, dict) and "split" in flags else TRAIN
    masks: dict[tuple[str, object], BoolMask] = {}
    first: dict[tuple[str, object], str] = {}
    for number, shape in enumerate(shapes, start=1):
        where = f"{project_path(file)}: shape {number}"
        try:
            sentence = text(shape, "description" if isinstance(shape, dict) and shape.get("description") else "label")
            group = shape.get("group_id")
            key = sentence, f"shape {number}" if group is None else repr(group)
            drawn = _mask(shape, height, width)
            masks[key] = masks[key] | drawn if key in masks else drawn
            first.setdefault(key, where)
        except ValueError as error:
            problems.append(f"{where}: {error}")
    found = []
    for (sentence, group), mask in masks.items():
        where = first[sentence, group]
        try:
            found.append(Entry(where, image, sentence, (height, width), mask_rle(mask), split))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    return found


def _mask(shape: Any, height: int, width: int) -> BoolMask:
    points, kind = points_of(shape), shape.get("shape_type", "polygon")
    match kind:
        case "polygon":
            polygon = points
        case "rectangle":
            (x1, y1), (x2, y2) = _two(points, "two opposite corners")
            polygon = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
        case "circle":
            (x, y), edge = _two(points, "the centre and a point on the edge")
            rows, columns = np.mgrid[:height, :width] + 0.5  # pixels whose centres lie in it
            return np.asarray((columns - x) ** 2 + (rows - y) ** 2 <= math.dist((x, y), edge) ** 2)
        case _:
            raise ValueError(f"shape_type: got {shown(kind)}, expected polygon, rectangle or circle")
    corners = [value for point in polygon for value in point]
    return decode_rle(segmentation_to_rle([corners], height, width), height, width)


def _two(points: list[tuple[float, float]], what: str) -> tuple[tuple[float, float], tuple[float, float]]:
    if len(points) != 2:
        raise ValueError(f"points: got {len(points)}, expected {what}")
    return points[0], points[1]
