"""Importer of COCO annotations with a file of sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from l2l_core.artifacts.records import TRAIN
from l2l_core.core.images import project_path
from l2l_core.core.json_lines import json_object, numbered_lines
from l2l_core.core.masks import decode_rle, segmentation_to_rle
from l2l_core.datasets.importers.entries import (
    Entry,
    Imported,
    image_size,
    mask_rle,
    read_json,
    rows_of,
    text,
    to_json_lines,
    whole_number,
)
from l2l_core.errors import InputError, short_repr

ANNOTATION_KEYS = ("annotation_id", "ann_id")
SENTENCE_KEYS = ("sentence", "caption")


def import_coco(instances: Path, sentences: Path, images: Path, out: Path) -> Imported:
    """COCO instances and sentences -> JSON lines for a file in the folder `out`.

    instances: file with `images` (id, file_name, height, width) and `annotations` (id, image_id, segmentation).
    sentences: JSON lines, a JSON list, or an object with the list `annotations` as in COCO captions. An entry has
    annotation_id (or ann_id), or only image_id for a pair without a mask; sentence (or caption); and optionally
    split, style and sent_id. images: folder of the file_names. Raises InputError that lists every bad entry.
    """
    source = project_path(instances)
    document = read_json(instances)
    try:
        image_rows, annotations = (rows_by_id(document, key) for key in ("images", "annotations"))
    except ValueError as error:
        raise InputError(f"{source}: {error}") from None
    entries: list[Entry] = []
    problems: list[str] = []
    for where, row in _sentence_rows(sentences):
        try:
            entries.append(_entry(row, where, image_rows, annotations, images))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    return to_json_lines(entries, out, project_path(sentences), problems)


def rows_by_id(document: Any, key: str) -> dict[int, Any]:
    """The rows of a list in a COCO file, by their id. Raises ValueError if an id is missing or occurs twice."""
    found: dict[int, Any] = {}
    for position, row in enumerate(rows_of(document, key), start=1):
        try:
            row_id = whole_number(row, "id")
        except ValueError as error:
            raise ValueError(f"{key}: entry {position}: {error}") from None
        if row_id in found:
            raise ValueError(f"{key}: entry {position}: id {row_id} is taken, expected each id once")
        found[row_id] = row
    return found


def _sentence_rows(path: Path) -> list[tuple[str, Any]]:
    """The entries of the sentences file, each with its name in error messages."""
    source = project_path(path)
    if path.suffix != ".jsonl":
        document = read_json(path)
        rows = document.get("annotations") if isinstance(document, dict) else document
        if not isinstance(rows, list):
            raise InputError(f"{source}: got {short_repr(document)}, expected a list, or an object with `annotations`")
        return [(f"{source}: entry {position}", row) for position, row in enumerate(rows, start=1)]
    try:
        lines = numbered_lines(path)
    except FileNotFoundError:
        raise InputError(f"{source}: not found, expected a file of sentences") from None
    found: list[tuple[str, Any]] = []
    for line_number, line in lines:
        where = f"{source}: line {line_number}"
        try:
            found.append((where, json_object(line)))
        except ValueError as error:
            raise InputError(f"{where}: {error}") from None
    return found


def _entry(row: Any, where: str, images: dict[int, Any], annotations: dict[int, Any], folder: Path) -> Entry:
    key = next((key for key in ANNOTATION_KEYS if isinstance(row, dict) and key in row), None)
    annotation = None
    if key is None:
        image_id = whole_number(row, "image_id")
    else:
        ann_id = whole_number(row, key)
        if ann_id not in annotations:
            raise ValueError(f"{key}: got {ann_id}, which no annotation has")
        annotation = annotations[ann_id]
        image_id = whole_number(annotation, "image_id")
        if row.get("image_id", image_id) != image_id:
            raise ValueError(
                f"image_id: got {short_repr(row['image_id'])}, but annotation {ann_id} is of image {image_id}"
            )
    if image_id not in images:
        raise ValueError(f"image_id: got {image_id}, which no image has")
    image = images[image_id]
    height, width = image_size(image, "height", "width")
    rle = None
    if annotation is not None:
        try:
            counts = segmentation_to_rle(annotation.get("segmentation"), height, width)
            rle = mask_rle(decode_rle(counts, height, width))
        except ValueError as error:
            raise ValueError(f"annotation {annotation['id']}: {error}") from None
    return Entry(
        where=where,
        image=folder / text(image, "file_name"),
        sentence=text(row, next((key for key in SENTENCE_KEYS if key in row), SENTENCE_KEYS[0])),
        size_hw=(height, width),
        rle=rle,
        split=text(row, "split") if "split" in row else TRAIN,
        style=text(row, "style") if "style" in row else "",
        id=whole_number(row, "sent_id") if "sent_id" in row else None,
    )
