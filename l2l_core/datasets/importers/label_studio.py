"""Importer of Label Studio's JSON export: tasks with an image and sentences, such as review tasks."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from l2l_core.artifacts.records import TRAIN
from l2l_core.core.arrays import BoolArray, DoubleArray
from l2l_core.core.images import project_path
from l2l_core.core.masks import BoolMask, decode_rle, segmentation_to_rle
from l2l_core.datasets.importers.entries import (
    Entry,
    Imported,
    UnknownShapeError,
    contradicts,
    drawn,
    image_size,
    left_out,
    mask_rle,
    number,
    points_of,
    read_json,
    rows_of,
    text,
    to_json_lines,
    whole_number,
)
from l2l_core.errors import InputError, short_repr

KINDS = "polygon, rectangle, ellipse or brush"
TEXT = "textarea"
GEOMETRY = frozenset({"points", "x", "y", "rle", "vertices", "imageDataURL"})
"""Keys of a value with a place in the image; results without any are relations, choices, ratings and the like."""
LOCAL_FILES = "?d="
"""Marker in the address of a local file; the path from the served folder follows it."""
UPLOAD_PREFIX = re.compile(r"[0-9a-f]{8}-")
"""Prefix that Label Studio adds to the name of an uploaded file."""

CHANNELS = 4  # a brush mask is an RGBA image; alpha holds the mask
HALF_COVERED = 128
"""Threshold of 255: a brush has a soft edge, and a pixel at least half covered belongs to the mask."""


def import_label_studio(export: Path, images: Path, out: Path, *, skip_unknown: bool = False) -> Imported:
    """A JSON export -> JSON lines for a file in the folder `out`.

    A task's data has image (an address, whose path is searched below `images`, without its first folders if needed),
    and optionally sentence, split and sent_id. Its sentence means the union of its regions. Without a sentence, a text
    written for a region means this region (regions with the same text are united), and a text written for the task
    means all regions. Of several annotations, the one marked as ground truth counts; skipped ones do not. A task
    without an annotation, or with an annotation without regions, gives a pair without a mask. A task without any text
    is left out and counted.
    skip_unknown: regions of other kinds are left out and counted. Raises InputError that lists every bad task.
    """
    source = project_path(export)
    tasks = read_json(export)
    if not isinstance(tasks, list):
        raise InputError(f"{source}: got {short_repr(tasks)}, expected a list of tasks (export as JSON)")
    entries: list[Entry] = []
    problems: list[str] = []
    unknown: Counter[str] | None = Counter() if skip_unknown else None
    silent = 0
    for position, task in enumerate(tasks, start=1):
        where = f"{source}: task {task.get('id', position) if isinstance(task, dict) else position}"
        try:
            found = _entries(task, where, images, unknown)
            entries += found
            silent += not found
        except UnknownShapeError as error:
            problems.append(f"{where}: type: {error}")
        except ValueError as error:
            problems.append(f"{where}: {error}")
    warnings = left_out("region(s) of an unknown kind", unknown or Counter(), source)
    if silent:
        warnings.append(f"{source}: {silent} task(s) without a sentence left out")
    return to_json_lines(entries, out, source, problems, warnings)


def brush_alpha(rle: object, height: int, width: int) -> NDArray[np.uint8]:
    """The bytes of a brush's `rle` -> its alpha channel [height, width], 0..255.

    The format is that of @thi.ng/rle-pack. Header: number of values (32 bits), bits per value - 1 (5), bits of the four
    kinds of length - 1 (4 each). Then entries: a bit (set: one repeated value; else: separate values), the kind
    (2 bits), length - 1, value or values. Raises ValueError if the format or the size is different.
    """
    if not isinstance(rle, list) or not all(type(byte) is int and 0 <= byte <= 255 for byte in rle):
        raise ValueError(f"rle: got {short_repr(rle)}, expected a list of bytes")
    bits = "".join(f"{byte:08b}" for byte in rle)
    position = 0

    def read(width: int) -> int:
        nonlocal position
        position += width
        if position > len(bits):
            raise ValueError(f"rle: ends after {len(rle)} bytes in the middle of an entry")
        return int(bits[position - width : position], 2)

    count, value_bits, length_bits = read(32), read(5) + 1, [read(4) + 1 for _ in range(4)]
    if count != height * width * CHANNELS or value_bits != 8:
        raise ValueError(
            f"rle: got {count} values of {value_bits} bits, expected {height * width * CHANNELS} of 8 bits "
            f"for {width}x{height} px"
        )
    values = np.empty(count, np.uint8)
    done = 0
    while done < count:
        is_repeated, length = read(1), read(length_bits[read(2)]) + 1
        if done + length > count:
            raise ValueError(f"rle: holds more than the {count} values that it announces")
        values[done : done + length] = read(8) if is_repeated else [read(8) for _ in range(length)]
        done += length
    return values.reshape(height, width, CHANNELS)[..., 3]


def _entries(task: Any, where: str, images: Path, unknown: Counter[str] | None) -> list[Entry]:
    """A task's pairs; unknown: counter of regions of other kinds (None: they raise UnknownShapeError)."""
    if not isinstance(task, dict) or not isinstance(task.get("annotations"), list):
        raise ValueError("annotations: missing, expected a list (export as JSON, not as JSON-MIN)")
    data: Any = task.get("data")
    image = _find_image(text(data, "image"), images)
    results = _results(task["annotations"])
    regions = [row for row in results if _is_region(row, unknown)]
    has_own = "sentence" in data
    meant = {text(data, "sentence"): regions} if has_own else _written(results, regions)
    found = []
    for sentence, of_it in meant.items():
        size_hw, rle = _mask(of_it, image) if of_it else (None, None)
        found.append(
            Entry(
                where=where,
                image=image,
                sentence=sentence,
                size_hw=size_hw,
                rle=rle,
                split=text(data, "split") if "split" in data else TRAIN,
                id=whole_number(data, "sent_id") if has_own and "sent_id" in data else None,
            )
        )
    return found


def _is_region(row: Any, unknown: Counter[str] | None) -> bool:
    """Whether a result is a shape. Raises UnknownShapeError for a shape of another kind, unless these are counted."""
    kind = row.get("type") if isinstance(row, dict) else None
    if not isinstance(kind, str):
        raise ValueError(f"result: got {short_repr(row)}, expected an object with a type")
    if _kind(kind) in ("polygon", "rectangle", "ellipse", "brush"):
        return True
    value = row.get("value")
    if not isinstance(value, dict) or not GEOMETRY & value.keys():
        return False
    # Annotations of a region repeat the region's place, with `choices`, `rating` or `labels` under their own names.
    if kind in (TEXT, "labels") or (kind in value and not kind.endswith("labels")):
        return False
    if unknown is None:
        raise UnknownShapeError(kind, KINDS)
    unknown[kind] += 1
    return False


def _kind(kind: str) -> str:
    """The kind of a type with or without labels: polygonlabels is a polygon."""
    return kind.removesuffix("labels")


def _written(results: list[Any], regions: list[Any]) -> dict[str, list[Any]]:
    """Written texts, used if the task has no sentence -> the regions that they mean."""
    by_id = {_id(row): row for row in regions if row.get("id") is not None}
    said = [(_id(row), one) for row in results if row.get("type") == TEXT for one in _texts(row)]
    meant: dict[str, list[Any]] = {}
    for region_id, one in said:
        if region_id in by_id:
            of_it = meant.setdefault(one, [])
            if by_id[region_id] not in of_it:
                of_it.append(by_id[region_id])
    if not meant:
        meant = {one: regions for _, one in said}
    silent = [row for row in regions if not any(row in of_it for of_it in meant.values())]
    if silent:
        raise ValueError(
            f"{len(silent)} region(s) without a text, expected `sentence` in the task's data, or a textarea that says "
            "what each region is"
        )
    return meant


def _id(row: dict[str, Any]) -> str:
    """A region's id in a form that can be a key, whatever it is."""
    return json.dumps(row.get("id"))


def _texts(row: dict[str, Any]) -> list[str]:
    value = row.get("value")
    said = value.get("text") if isinstance(value, dict) else None
    said = [said] if isinstance(said, str) else said
    if not isinstance(said, list) or not all(isinstance(one, str) for one in said):
        raise ValueError(f"text: got {short_repr(said)}, expected texts")
    return [one.strip() for one in said if one.strip()]


def _results(annotations: list[Any]) -> list[Any]:
    """The results of the annotation that counts; empty without an annotation."""
    finished = [one for one in annotations if not (isinstance(one, dict) and one.get("was_cancelled"))]
    if len(finished) > 1:
        finished = [one for one in finished if isinstance(one, dict) and one.get("ground_truth")]
        if len(finished) != 1:
            raise ValueError(
                f"annotations: got {len(annotations)}, {len(finished)} of them marked as ground truth, expected one"
            )
    return rows_of(finished[0], "result") if finished else []


def _mask(regions: list[Any], image: Path) -> tuple[tuple[int, int], bytes]:
    height, width = image_size(regions[0], "original_height", "original_width")
    if contradicts(image, None, (height, width)):
        return (height, width), b""
    mask: BoolMask = np.zeros((height, width), dtype=bool)
    for region in regions:
        stated = image_size(region, "original_height", "original_width")
        if stated != (height, width):
            raise ValueError(f"original_height, original_width: got {stated}, and {(height, width)} in another region")
        if region.get("image_rotation"):
            raise ValueError(
                f"image_rotation: got {short_repr(region['image_rotation'])}, expected 0: save the image turned"
            )
        mask |= _drawn(region.get("value"), _kind(region["type"]), height, width)
    return (height, width), mask_rle(mask)


def _drawn(value: Any, kind: str, height: int, width: int) -> BoolMask:
    """The mask of one region; its coordinates are percent of the image's sides."""
    match kind:
        case "brush":
            return brush_alpha(value.get("rle") if isinstance(value, dict) else value, height, width) >= HALF_COVERED
        case "polygon":
            corners = np.array(points_of(value)) / 100 * (width, height)
        case _:
            angle = math.radians(number(value, "rotation", 0))  # clockwise, about x, y
            along = np.array([math.cos(angle), math.sin(angle)])
            across = np.array([-math.sin(angle), math.cos(angle)])
            start = np.array([number(value, "x") / 100 * width, number(value, "y") / 100 * height])
            if kind == "ellipse":
                radii = number(value, "radiusX") / 100 * width, number(value, "radiusY") / 100 * height
                if min(radii) <= 0:
                    raise ValueError(f"radiusX, radiusY: got {short_repr(value)}, expected numbers above 0")

                def is_inside(x: DoubleArray, y: DoubleArray) -> BoolArray:
                    u, v = (x * along[0] + y * along[1]) / radii[0], (x * across[0] + y * across[1]) / radii[1]
                    return np.asarray(u**2 + v**2 <= 1)

                return drawn((start[0], start[1]), max(radii), height, width, is_inside)
            along = along * (number(value, "width") / 100 * width)
            across = across * (number(value, "height") / 100 * height)
            corners = np.array([start, start + along, start + along + across, start + across])
    return decode_rle(segmentation_to_rle([corners.ravel().tolist()], height, width), height, width)


def _find_image(address: str, folder: Path) -> Path:
    """The file below a folder that an address means, matched by the longest existing end of the address's path."""
    path = address.partition(LOCAL_FILES)[2] if LOCAL_FILES in address else urlsplit(address).path
    parts = [part for part in unquote(path).replace("\\", "/").split("/") if part not in ("", ".", "..")]
    names = ["/".join(parts[start:]) for start in range(len(parts))]
    names += [parts[-1][9:]] if parts and UPLOAD_PREFIX.match(parts[-1]) else []
    for name in names:
        if os.path.isfile(folder / name):  # Path.is_file raises for impossible names
            return folder / name
    raise ValueError(f"image: got {short_repr(address)}, expected the address of a file below {project_path(folder)}")
