"""Importer of LabelMe, X-AnyLabeling and ReasonSeg annotations: a JSON file next to every image."""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from l2l_core.artifacts.records import TRAIN
from l2l_core.core.images import project_path, read_image, visible
from l2l_core.core.masks import BoolMask, decode_rle, encode_rle, segmentation_to_rle, union_rle
from l2l_core.datasets.importers.entries import (
    Entry,
    Imported,
    UnknownShapeError,
    contradicts,
    drawn,
    image_size,
    left_out,
    mask_rle,
    points_of,
    read_json,
    rows_of,
    text,
    to_json_lines,
)
from l2l_core.errors import InputError, short_repr

RESERVED = re.compile(r"_+\w+_+|ignore|background|void|unlabeled", re.IGNORECASE)
"""Labels that name no object: LabelMe's `__ignore__` and `_background_`, and their usual synonyms."""
REASONSEG_LABELS = {"target", "ignore", "flag"}
"""ReasonSeg's labels: the target of its `text`, ignored areas, and what its readers skip."""
KINDS = "polygon, rectangle, rotation, circle or mask"


@dataclass
class _Object:
    """The union of the shapes that are parts of one object."""

    where: str  # of the first
    label: str
    rle: bytes  # b"": not drawn
    descriptions: list[str] = field(default_factory=list)  # each once


@dataclass
class _Report:
    """Problems of shapes, and counts of what was left out."""

    skip_unknown: bool
    problems: list[str] = field(default_factory=list)
    reserved: Counter[str] = field(default_factory=Counter)  # by label
    unknown: Counter[str] = field(default_factory=Counter)  # by shape_type


def import_labelme(folder: Path, out: Path, *, skip_unknown: bool = False) -> Imported:
    """The *.json of a folder -> JSON lines for a file in the folder `out`.

    Each shape is a pair: its sentence is its `description`, or its `label` if that is empty. Shapes of an image with
    the same group_id and label (or description) are parts of one object: one mask, and one pair per description.
    In ReasonSeg files, each sentence of `text` means all shapes except ignored ones. Reserved labels are left out and
    counted. A text `split` in the file's flags names the split of its image. An image missing at `imagePath` is taken
    from `imageData`.
    skip_unknown: shapes of other kinds are left out and counted. Raises InputError that lists every bad file and shape.
    """
    source = project_path(folder)
    files = visible(folder.glob("*.json"))
    if not files:
        raise InputError(f"{source}: got a folder without *.json, expected one with LabelMe's files")
    entries: list[Entry] = []
    report = _Report(skip_unknown)
    for file in files:
        try:
            entries += _entries(read_json(file), file, out, report)
        except InputError as error:
            report.problems.append(str(error))
        except ValueError as error:
            report.problems.append(f"{project_path(file)}: {error}")
    skipped = left_out("shape(s) with a reserved label", report.reserved, source)
    skipped += left_out("shape(s) of an unknown kind", report.unknown, source)
    return to_json_lines(entries, out, source, report.problems, skipped)


def _entries(document: Any, file: Path, out: Path, report: _Report) -> list[Entry]:
    shapes = rows_of(document, "shapes")
    sentences = _reasonseg_sentences(document, shapes)
    image, photo = _image(document, file, out)
    if sentences is not None and document.get("imageHeight") is None and photo is None:
        height, width = read_image(image).shape[:2]  # ReasonSeg files state no size
    else:
        height, width = image_size(document, "imageHeight", "imageWidth")
    flags = document.get("flags")
    split = text(flags, "split") if isinstance(flags, dict) and "split" in flags else TRAIN
    is_drawn = not contradicts(image, photo, (height, width))
    objects = _objects(shapes, file, (height, width), sentences is not None, report, is_drawn=is_drawn)
    found = []
    for one in objects:
        try:
            rle = mask_rle(decode_rle(one.rle, height, width)) if one.rle else b""
        except ValueError as error:
            report.problems.append(f"{one.where}: {error}")
            continue
        for sentence in sentences or one.descriptions or [one.label]:
            found.append(Entry(one.where, image, sentence, (height, width), rle, split, photo=photo))
    return found


def _reasonseg_sentences(document: dict[str, Any], shapes: list[Any]) -> list[str] | None:
    """ReasonSeg's sentences for all shapes together; None for a file of another tool."""
    labels = {label if isinstance(label := _get(shape, "label"), str) else None for shape in shapes}
    described = any(_get(shape, "description") for shape in shapes)
    if "text" not in document and (described or "target" not in labels or not labels <= REASONSEG_LABELS):
        return None
    said = document.get("text")
    said = [said] if isinstance(said, str) else said
    if not isinstance(said, list) or not said or not all(isinstance(one, str) and one for one in said):
        raise ValueError(
            f"text: got {short_repr(said)}, expected ReasonSeg's sentences, as its shapes are named target; "
            "in a file of your own, write what is meant as description"
        )
    return said


def _get(shape: Any, key: str) -> Any:
    """shape[key]; None if there is none."""
    return shape.get(key) if isinstance(shape, dict) else None


def _image(document: dict[str, Any], file: Path, out: Path) -> tuple[Path, bytes | None]:
    """The image file; if only `imageData` holds the image, its output path and its content."""
    if document.get("imagePath") is None and "text" in document:  # ReasonSeg images share the names of their files
        beside = [path for path in visible(file.parent.glob(f"{file.stem}.*")) if path != file]
        if len(beside) != 1:
            raise ValueError(f"image: found {len(beside)} files {file.stem}.* beside it, expected one")
        return beside[0], None
    image = file.parent / text(document, "imagePath").replace("\\", "/")  # Windows paths
    data = document.get("imageData")
    if not data or os.path.isfile(image):  # Path.is_file raises for impossible names
        return image, None
    return out / f"{file.stem}{image.suffix}", _from_base64(data, "imageData")


def _objects(
    shapes: list[Any], file: Path, size_hw: tuple[int, int], is_reasonseg: bool, report: _Report, *, is_drawn: bool
) -> list[_Object]:
    """The objects of an image; shapes that cannot be read become problems."""
    objects: list[_Object] = []
    groups: dict[str, list[_Object]] = {}
    for shape_number, shape in enumerate(shapes, start=1):
        where = f"{project_path(file)}: shape {shape_number}"
        try:
            label = text(shape, "label")
            if RESERVED.fullmatch(label) or (is_reasonseg and label == "flag"):
                report.reserved[label] += 1
                continue
            said = text(shape, "description") if shape.get("description") else ""
            rle = _rle(shape, *size_hw) if is_drawn else b""
        except UnknownShapeError as error:
            if report.skip_unknown:
                report.unknown[error.kind] += 1
            else:
                report.problems.append(f"{where}: shape_type: {error}")
            continue
        except ValueError as error:
            report.problems.append(f"{where}: {error}")
            continue
        own = f"shape {shape_number}" if shape.get("group_id") is None else repr(shape["group_id"])
        group = "" if is_reasonseg else own
        same = groups.setdefault(group, [])
        known = (one for one in same if is_reasonseg or one.label == label or (said and said in one.descriptions))
        one = next(known, None)
        if one is None:
            one = _Object(where, label, rle)
            same.append(one)
            objects.append(one)
        if is_drawn:
            one.rle = union_rle([one.rle, rle], *size_hw)
        if said and said not in one.descriptions:
            one.descriptions.append(said)
    return objects


def _rle(shape: Any, height: int, width: int) -> bytes:
    points, kind = points_of(shape), shape.get("shape_type", "polygon")
    match kind:
        case "polygon":
            polygon = points
        case "rotation":  # X-AnyLabeling's rotated rectangle
            polygon = _corners(points, 4, "four corners")
        case "rectangle" if len(points) == 4:  # X-AnyLabeling's form
            polygon = points
        case "rectangle":
            (x1, y1), (x2, y2) = _corners(points, 2, "two opposite corners, or four corners")
            polygon = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
        case "circle":
            center, edge = _corners(points, 2, "the center and a point on the edge")
            radius = math.dist(center, edge)
            return encode_rle(drawn(center, radius, height, width, lambda x, y: x**2 + y**2 <= radius**2))
        case "mask":
            return encode_rle(_pasted(shape, _corners(points, 2, "two opposite corners"), height, width))
        case _:
            raise UnknownShapeError(kind, KINDS)
    corners = [value for point in polygon for value in point]
    return segmentation_to_rle([corners], height, width)


def _pasted(shape: dict[str, Any], corners: list[tuple[float, float]], height: int, width: int) -> BoolMask:
    """Paste a mask that is stored as an image of its bounding box. corners: the first and the last pixel of the box."""
    (x1, y1), (x2, y2) = corners
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        raise ValueError("points: expected finite numbers")
    left, top = round(min(x1, x2)), round(min(y1, y2))
    right, bottom = round(max(x1, x2)) + 1, round(max(y1, y2)) + 1
    if left < 0 or top < 0 or right > width or bottom > height:
        raise ValueError(f"points: got {short_repr(shape['points'])}, expected a box inside {width}x{height} px")
    content = _from_base64(shape.get("mask"), "mask")
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as picture:
            size = picture.size
            drawn = np.asarray(picture.convert("L")) if size == (right - left, bottom - top) else None
    except Exception as error:  # decoders raise many exception types on a damaged file
        raise ValueError(f"mask: not a readable PNG: {error}") from None
    if drawn is None:
        raise ValueError(f"mask: {size[0]}x{size[1]} px, expected {right - left}x{bottom - top} as its points say")
    mask: BoolMask = np.zeros((height, width), dtype=bool)
    mask[top:bottom, left:right] = drawn > 0
    return mask


def _from_base64(data: object, key: str) -> bytes:
    if not isinstance(data, str) or not data:
        raise ValueError(f"{key}: got {short_repr(data)}, expected a file in base64")
    try:
        return base64.b64decode(data)
    except (binascii.Error, ValueError):
        raise ValueError(f"{key}: got {short_repr(data)}, expected a file in base64") from None


def _corners(points: list[tuple[float, float]], count: int, what: str) -> list[tuple[float, float]]:
    if len(points) != count:
        raise ValueError(f"points: got {len(points)}, expected {what}")
    return points
