"""Label Studio's JSON export of tasks with an image and a sentence, such as those for review."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

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
    whole_number,
)
from l2l_core.errors import InputError
from l2l_core.masks import BoolMask, decode_rle, segmentation_to_rle
from l2l_core.records import TRAIN

POLYGON, BRUSH = "polygonlabels", "brushlabels"
LOCAL_FILES = "?d="
"""In an address of a local file, comes before its path from the served folder."""
UPLOAD_PREFIX = re.compile(r"[0-9a-f]{8}-")
"""What Label Studio puts before the name of an uploaded file."""

CHANNELS = 4  # a brush's mask is an RGBA image, of which alpha says where the brush was
HALF_COVERED = 128
"""Of 255: a brush's rim is soft, and a pixel belongs to the mask from half on."""


def import_label_studio(export: Path, images: Path, out: Path) -> str:
    """A JSON export -> JSON lines for a file in the folder `out`.

    A task's data has image (an address, of which the path is looked for below `images`, without its first folders where
    it is not found), sentence, and optionally split and sent_id. Its regions, polygons and brushes, are united. Of
    several annotations the one marked as ground truth counts; skipped ones do not. A task that is not annotated, or
    whose annotation is empty, gives a pair without a mask. Raises InputError that lists every bad task.
    """
    source = project_path(export)
    tasks = read_json(export)
    if not isinstance(tasks, list):
        raise InputError(f"{source}: got {shown(tasks)}, expected a list of tasks (export as JSON)")
    entries: list[Entry] = []
    problems: list[str] = []
    for number, task in enumerate(tasks, start=1):
        where = f"{source}: task {task.get('id', number) if isinstance(task, dict) else number}"
        try:
            entries.append(_entry(task, where, images))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    return to_json_lines(entries, out, source, problems)


def brush_alpha(rle: object, height: int, width: int) -> NDArray[np.uint8]:
    """The bytes of a brush's `rle` -> its alpha channel [height, width], 0..255.

    The format is @thi.ng/rle-pack's. Head: number of values (32 bits), bits of a value - 1 (5), bits of the four kinds
    of length - 1 (4 each). Then entries: a bit (set: one value that is repeated; else: each value by itself), the kind
    (2 bits), length - 1, value or values. Raises ValueError where it is another format, or of another size.
    """
    if not isinstance(rle, list) or not all(type(byte) is int and 0 <= byte <= 255 for byte in rle):
        raise ValueError(f"rle: got {shown(rle)}, expected a list of bytes")
    bits = "".join(f"{byte:08b}" for byte in rle)
    place = 0

    def read(width: int) -> int:
        nonlocal place
        place += width
        if place > len(bits):
            raise ValueError(f"rle: ends after {len(rle)} bytes in the middle of an entry")
        return int(bits[place - width : place], 2)

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


def _entry(task: Any, where: str, images: Path) -> Entry:
    if not isinstance(task, dict) or not isinstance(task.get("annotations"), list):
        raise ValueError("annotations: missing, expected a list (export as JSON, not as JSON-MIN)")
    data: Any = task.get("data")
    regions = _regions(task["annotations"])
    size_hw, rle = _mask(regions) if regions else (None, None)
    return Entry(
        where=where,
        image=_find_image(text(data, "image"), images),
        sentence=text(data, "sentence"),
        size_hw=size_hw,
        rle=rle,
        split=text(data, "split") if "split" in data else TRAIN,
        id=whole_number(data, "sent_id") if "sent_id" in data else None,
    )


def _regions(annotations: list[Any]) -> list[Any]:
    """The regions of the annotation that counts; none where there is no annotation."""
    finished = [one for one in annotations if not (isinstance(one, dict) and one.get("was_cancelled"))]
    if len(finished) > 1:
        finished = [one for one in finished if isinstance(one, dict) and one.get("ground_truth")]
        if len(finished) != 1:
            raise ValueError(
                f"annotations: got {len(annotations)}, {len(finished)} of them marked as ground truth, expected one"
            )
    return rows_of(finished[0], "result") if finished else []


def _mask(regions: list[Any]) -> tuple[tuple[int, int], bytes]:
    height, width = image_size(regions[0], "original_height", "original_width")
    mask: BoolMask = np.zeros((height, width), dtype=bool)
    for region in regions:
        stated = image_size(region, "original_height", "original_width")
        if stated != (height, width):
            raise ValueError(f"original_height, original_width: got {stated}, and {(height, width)} in another region")
        if region.get("image_rotation"):
            raise ValueError(
                f"image_rotation: got {shown(region['image_rotation'])}, expected 0: save the image turned"
            )
        value, kind = region.get("value"), region.get("type")
        if kind == POLYGON:
            corners = np.array(points_of(value)) / 100 * (width, height)
            mask |= decode_rle(segmentation_to_rle([corners.ravel().tolist()], height, width), height, width)
        elif kind == BRUSH:
            mask |= brush_alpha(value.get("rle") if isinstance(value, dict) else value, height, width) >= HALF_COVERED
        else:
            raise ValueError(f"type: got {shown(kind)}, expected {POLYGON} or {BRUSH}")
    return (height, width), mask_rle(mask)


def _find_image(address: str, folder: Path) -> Path:
    """The file below a folder that an address means: with as much of the address's path as is there."""
    path = address.partition(LOCAL_FILES)[2] if LOCAL_FILES in address else urlsplit(address).path
    parts = [part for part in unquote(path).split("/") if part not in ("", ".", "..")]
    names = ["/".join(parts[start:]) for start in range(len(parts))]
    names += [parts[-1][9:]] if parts and UPLOAD_PREFIX.match(parts[-1]) else []
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"image: got {shown(address)}, expected the address of a file below {project_path(folder)}")
