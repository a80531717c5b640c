"""Common output of all importers: entries of another tool's files, checked as in ingest, as JSON lines."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from l2l_core.artifacts import records
from l2l_core.core.arrays import BoolArray, DoubleArray
from l2l_core.core.files import read_file
from l2l_core.core.images import MAX_PIXELS, ImageFile, header_hw, inspect_content, inspect_images, project_path
from l2l_core.core.masks import BoolMask, encode_rle
from l2l_core.datasets.index import (
    NO_MASK,
    Mask,
    Sentence,
    data_warnings,
    exif_rotation_note,
    is_utf8,
    overlap_problems,
    sentence_problems,
)
from l2l_core.errors import InputError, raise_all, short_repr

FILE_NAME = "pairs.jsonl"


@dataclass(frozen=True)
class Entry:
    """One pair from another tool."""

    where: str  # file and entry, for messages
    image: Path
    sentence: str
    size_hw: tuple[int, int] | None  # height, width of the image stated in the file; None: not stated
    rle: bytes | None  # COCO compressed run lengths at that size; None: no mask
    split: str = records.TRAIN
    style: str = ""  # kind of sentence; "": not named
    id: int | None = None
    photo: bytes | None = None  # of an embedded image; `image` is then its output path


@dataclass(frozen=True)
class Imported:
    """The result of an importer."""

    lines: str  # of FILE_NAME
    photos: dict[str, bytes]  # name in the folder of FILE_NAME -> content, for embedded images
    warnings: list[str]  # one line each; includes what was left out


class UnknownShapeError(ValueError):
    """A shape of a kind without a mask; --skip-unknown leaves such shapes out."""

    def __init__(self, kind: object, expected: str) -> None:
        super().__init__(f"got {short_repr(kind)}, expected {expected}; --skip-unknown leaves such shapes out")
        self.kind = kind if isinstance(kind, str) else short_repr(kind)


def left_out(what: str, counts: Counter[str], source: str) -> list[str]:
    """One line with the counts of what was left out, by kind; empty if nothing was."""
    kinds = ", ".join(f"{kind} {count}" for kind, count in counts.most_common())
    return [f"{source}: {counts.total()} {what} left out: {kinds}"] if counts else []


def to_json_lines(
    entries: Sequence[Entry], out: Path, source: str, problems: Sequence[str], warnings: Sequence[str] = ()
) -> Imported:
    """Entries -> JSON lines: image (relative to the folder `out`), sentence, mask, split, optional style and id.

    problems: errors of unreadable entries. warnings: what was left out. Every image is decoded. Raises InputError that
    lists the problems and everything that ingest would refuse.
    """
    paths = list(dict.fromkeys(entry.image for entry in entries))
    photos = {entry.image: entry.photo for entry in entries if entry.photo is not None}
    stored = [path for path in paths if path not in photos]
    files = dict(zip(stored, inspect_images(stored, 1), strict=True))
    files |= {path: inspect_content(photo, path, 1) for path, photo in photos.items()}
    image_ids = {path: image_id for image_id, path in enumerate(paths)}
    sentences = _sentences_of(entries, image_ids)
    found = list(problems)
    if not entries and not found:
        found.append(f"{source}: no pairs in it, expected at least one")
    found += _problems_of(entries, files, photos)
    found += sentence_problems(sentences)
    found += overlap_problems(sentences, {image_id: project_path(path) for path, image_id in image_ids.items()}, source)
    raise_all(found)
    masks = {
        index: Mask(*entry.size_hw, entry.rle)
        for index, entry in enumerate(entries)
        if entry.rle is not None and entry.size_hw is not None
    }
    by_id = {image_ids[path]: file for path, file in files.items() if isinstance(file, ImageFile)}
    doubts = [*warnings, *data_warnings(by_id, sentences, masks, source)]
    lines = "".join(json.dumps(_line_of(entry, out), ensure_ascii=False) + "\n" for entry in entries)
    return Imported(lines, {path.name: photo for path, photo in photos.items()}, doubts)


def _problems_of(
    entries: Sequence[Entry], files: Mapping[Path, ImageFile | str], photos: Mapping[Path, bytes]
) -> list[str]:
    """What is wrong with single entries. files: each image, or why it cannot be used. photos: images out of entries."""
    first_use = {entry.image: entry.where for entry in reversed(entries)}
    found = [f"{path}: exists, but {first_use[path]} holds its photo; remove it" for path in photos if path.exists()]
    found += [f"{first_use[path]}: {file}" for path, file in files.items() if isinstance(file, str)]
    for entry in entries:
        file = files[entry.image]
        if not isinstance(file, str) and entry.size_hw not in (None, (file.height, file.width)):
            height, width = entry.size_hw or (0, 0)
            found.append(
                f"{entry.where}: size: got {width}x{height}, but {file.file_name} has {file.width}x{file.height} px"
            )
        if not isinstance(file, str) and entry.rle is not None and file.is_exif_rotated:
            found.append(f"{entry.where}: {exif_rotation_note([file.file_name])}, and draw its mask again")
        if entry.rle is None and entry.split in records.EVAL_SPLITS:
            found.append(f"{entry.where}: mask: missing, expected one because split is {entry.split}")
    without_id = [entry.where for entry in entries if entry.id is None]
    if 0 < len(without_id) < len(entries):
        found.append(f"{without_id[0]}: sent_id: missing, but others have one; give it everywhere or nowhere")
    return found


def _sentences_of(entries: Sequence[Entry], image_ids: Mapping[Path, int]) -> list[Sentence]:
    """Entries as sentences; the id of a mask is its entry's position. If an entry has no id, all are numbered."""
    are_numbered = any(entry.id is None for entry in entries)
    return [
        Sentence(
            where=entry.where,
            sent_id=index if are_numbered or entry.id is None else entry.id,
            ref_id=index,
            ann_id=NO_MASK if entry.rle is None else index,
            image_id=image_ids[entry.image],
            category="",
            sentence=entry.sentence,
            style=entry.style,
            split=entry.split,
            bbox=None,
        )
        for index, entry in enumerate(entries)
    ]


def _line_of(entry: Entry, out: Path) -> dict[str, object]:
    """The line of pairs.jsonl in the folder `out` for an entry."""
    line: dict[str, object] = {
        "image": Path(os.path.relpath(entry.image, out)).as_posix(),
        "sentence": entry.sentence,
    }
    if entry.rle is not None and entry.size_hw is not None:
        line["mask"] = {"size": list(entry.size_hw), "counts": entry.rle.decode("ascii")}
    line["split"] = entry.split
    if entry.style:
        line["style"] = entry.style
    if entry.id is not None:
        line["id"] = entry.id
    return line


def read_json(path: Path) -> Any:
    """A JSON document. Raises InputError if it cannot be read."""
    try:
        return json.loads(read_file(path))
    except FileNotFoundError:
        raise InputError(f"{project_path(path)}: not found, expected a JSON file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{project_path(path)}: not JSON: {error}") from None


def whole_number(row: Any, key: str, low: int = 0) -> int:
    """row[key]. Raises ValueError if it is not an integer from low to 2**63 - 1."""
    value = _value(row, key)
    if type(value) is not int or not low <= value < 2**63:
        limits = f">= {low}" if type(value) is not int or value < low else f"< {2**63}"
        raise ValueError(f"{key}: got {short_repr(value)}, expected a whole number {limits}")
    return value


def text(row: Any, key: str) -> str:
    """row[key]. Raises ValueError if it is not a non-empty string."""
    value = _value(row, key)
    if not isinstance(value, str) or not value or not is_utf8(value):
        raise ValueError(f"{key}: got {short_repr(value)}, expected a text")
    return value


def rows_of(row: Any, key: str) -> list[Any]:
    """row[key]. Raises ValueError if it is not a list."""
    value = _value(row, key)
    if not isinstance(value, list):
        raise ValueError(f"{key}: got {short_repr(value)}, expected a list")
    return value


def image_size(row: Any, height_key: str, width_key: str) -> tuple[int, int]:
    """Height and width of an image, stated in a row. Raises ValueError if they are not a valid image size."""
    height, width = whole_number(row, height_key, 1), whole_number(row, width_key, 1)
    if height * width > MAX_PIXELS:  # the mask is built before the image is read
        raise ValueError(f"{height_key}, {width_key}: got {height}, {width}, expected an image's size")
    return height, width


def points_of(row: Any, key: str = "points") -> list[tuple[float, float]]:
    """row[key] as points x, y. Raises ValueError if it is not a list of pairs of numbers."""
    points = rows_of(row, key)
    for point in points:
        # Exact types: a bool is not a coordinate.
        if not isinstance(point, list) or len(point) != 2 or not all(map(_is_number, point)):
            raise ValueError(f"{key}: got {short_repr(point)}, expected pairs of numbers x, y")
    return [(float(x), float(y)) for x, y in points]


def number(row: Any, key: str, default: float | None = None) -> float:
    """row[key] as a number; default: value of a missing key. Raises ValueError if it is not a number."""
    value = _value(row, key)
    if value is None and default is not None:
        return default
    if not _is_number(value):
        raise ValueError(f"{key}: got {short_repr(value)}, expected a number")
    return float(value)


def contradicts(image: Path, photo: bytes | None, size_hw: tuple[int, int]) -> bool:
    """Whether an image's header states another size. `to_json_lines` refuses it, so its mask need not be drawn."""
    stated = header_hw(image if photo is None else io.BytesIO(photo))
    return stated is not None and stated != size_hw


def drawn(
    center_xy: tuple[float, float],
    reach: float,
    height: int,
    width: int,
    is_inside: Callable[[DoubleArray, DoubleArray], BoolArray],
) -> BoolMask:
    """The pixels [height, width] whose centers lie in a shape that extends at most `reach` pixels from its center.

    is_inside: of offsets x [1, w] and y [h, 1] from the center. The work grows with the shape, not with the image.
    Raises ValueError for a shape that reaches as far out of the image as no polygon may.
    """
    mask: BoolMask = np.zeros((height, width), dtype=bool)
    side = max(height, width)
    ends = [position + sign * reach for position in center_xy for sign in (-1, 1)]
    if not all(-side <= end <= 2 * side for end in ends):
        shown = ", ".join(f"{value:.6g}" for value in (*center_xy, reach))
        raise ValueError(
            f"got a shape with center x, y and radius {shown}, expected it in or near an image of "
            f"{width}x{height} pixels"
        )
    left, right = (int(np.clip(center_xy[0] + side, 0, width)) for side in (-reach - 1, reach + 1))
    top, bottom = (int(np.clip(center_xy[1] + side, 0, height)) for side in (-reach - 1, reach + 1))
    rows, columns = np.ogrid[top:bottom, left:right]
    mask[top:bottom, left:right] = is_inside(columns + 0.5 - center_xy[0], rows + 0.5 - center_xy[1])
    return mask


def mask_rle(mask: BoolMask) -> bytes:
    """A mask as run lengths. Raises ValueError if it is empty."""
    if not mask.any():
        raise ValueError("mask: empty, expected at least one pixel inside the image")
    return encode_rle(mask)


def _is_number(value: object) -> bool:
    """Whether a value is a number, excluding bools and integers that float cannot hold."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _value(row: Any, key: str) -> Any:
    if not isinstance(row, dict):
        raise ValueError(f"got {short_repr(row)}, expected an object")
    return row.get(key)
