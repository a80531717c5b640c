"""Reader of user data: one JSON object per line with an image, a sentence and an optional mask."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2l_core.artifacts import records
from l2l_core.core.images import ImageFile, inspect_images, project_path
from l2l_core.core.json_lines import json_object, numbered_lines
from l2l_core.core.mask_forms import read_mask
from l2l_core.core.masks import rle_area_px, rle_box_xyxy
from l2l_core.core.progress import progress
from l2l_core.datasets.index import (
    NO_MASK,
    Index,
    Mask,
    Object,
    Sentence,
    build_index,
    data_warnings,
    is_utf8,
    overlap_problems,
    sentence_problems,
)
from l2l_core.errors import InputError, raise_all, short_repr

KEYS = ("image", "sentence", "mask", "split", "style", "id")


@dataclass(frozen=True)
class _Pair:
    """One line of the file, with checked types."""

    where: str
    image: Path
    sentence: str
    mask: object
    split: str
    style: str
    id: int | None


def read_jsonl(path: Path, images: str = "auto", min_image_side_px: int = 1) -> Index:
    """Read and check a file of pairs.

    Keys of a line: `image` (path, relative to the file's folder, or to `images` if that is a folder), `sentence`, and
    optionally `mask` (in any form of `read_mask`, paths relative to the file's folder; not empty), `split` (default
    train), `style` (kind of sentence, by which scores are reported) and `id` (an integer; on every line or on none). A
    training pair without a mask is unlabeled; a pair of an evaluation split needs a mask.
    Ids: sent_id is `id` or the row number; pairs with the same image and mask share a ref_id. ref_ids and image_ids are
    numbered by first occurrence. Raises InputError that lists every bad line.
    """
    problems: list[str] = []
    pairs = _read_pairs(path, path.parent if images == "auto" else Path(images), problems)
    paths = list(dict.fromkeys(pair.image for pair in pairs))
    image_ids = {image: image_id for image_id, image in enumerate(paths)}
    first_use = {pair.image: pair.where for pair in reversed(pairs)}
    files: dict[int, ImageFile] = {}
    for image_id, found in enumerate(inspect_images(paths, min_image_side_px)):
        if isinstance(found, str):
            problems.append(f"{first_use[paths[image_id]]}: {found}")
        else:
            files[image_id] = found

    sentences: list[Sentence] = []
    masks: dict[int, Mask] = {}
    objects: dict[int, Object] = {}
    ref_ids: dict[tuple[int, str], int] = {}
    for row, pair in enumerate(progress(pairs, "masks", "pair")):
        image_id = image_ids[pair.image]
        # Each unlabeled pair is a separate ref: two sentences need not mean the same object.
        key = (image_id, f"row {row}" if pair.mask is None else json.dumps(pair.mask, sort_keys=True))
        is_new = key not in ref_ids
        ref_id = ref_ids.setdefault(key, len(ref_ids))
        if pair.mask is not None and is_new and image_id in files:
            file = files[image_id]
            try:
                counts = _mask_rle(pair.mask, path.parent, file.height, file.width)
                masks[ref_id] = Mask(file.height, file.width, counts)
                objects[ref_id] = Object(ref_id, image_id, "", rle_box_xyxy(counts, file.height, file.width))
            except ValueError as error:
                problems.append(f"{pair.where}: mask: {error}")
        if pair.mask is None and pair.split in records.EVAL_SPLITS:
            problems.append(f"{pair.where}: mask: missing, expected one because split is {pair.split}")
        sentences.append(
            Sentence(
                where=pair.where,
                sent_id=row if pair.id is None else pair.id,
                ref_id=ref_id,
                ann_id=NO_MASK if pair.mask is None else ref_id,
                image_id=image_id,
                category="",
                sentence=pair.sentence,
                style=pair.style,
                split=pair.split,
                bbox=objects[ref_id].bbox if ref_id in objects else None,
            )
        )
    problems += sentence_problems(sentences)
    names = {image_id: project_path(image) for image, image_id in image_ids.items()}
    problems += overlap_problems(sentences, names, project_path(path))
    raise_all(problems)
    warnings = data_warnings(files, sentences, masks, project_path(path))
    return build_index(files, sentences, objects.values(), masks, warnings)


def _read_pairs(path: Path, image_folder: Path, problems: list[str]) -> list[_Pair]:
    source = project_path(path)
    try:
        lines = numbered_lines(path)
    except FileNotFoundError:
        raise InputError(f"{source}: not found") from None
    pairs = []
    for line_number, line in lines:
        where = f"{source}: line {line_number}"
        try:
            pairs.append(_pair(json_object(line), where, image_folder))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    without = [pair.where for pair in pairs if pair.id is None]
    if 0 < len(without) < len(pairs):
        problems.append(f"{without[0]}: id: missing, but other lines have one; give it on every line or on none")
    if not pairs and not problems:
        problems.append(f"{source}: no pairs, expected one JSON object a line")
    return pairs


def _pair(row: dict[str, Any], where: str, image_folder: Path) -> _Pair:
    unknown = [key for key in row if key not in KEYS]
    if unknown:
        raise ValueError(f"unknown key {short_repr(unknown[0])}, expected some of {', '.join(KEYS)}")
    for key in ("image", "sentence"):
        if not isinstance(row.get(key), str) or not row[key] or not is_utf8(row[key]):
            raise ValueError(f"{key}: {f'got {short_repr(row[key])}' if key in row else 'missing'}, expected a text")
    for key in ("split", "style"):
        if not isinstance(row.get(key, ""), str) or not is_utf8(row.get(key, "")):
            raise ValueError(f"{key}: got {short_repr(row[key])}, expected a text")
    if "id" in row and (type(row["id"]) is not int or not -(2**63) <= row["id"] < 2**63):
        raise ValueError(f"id: got {short_repr(row['id'])}, expected a whole number from {-(2**63)} to {2**63 - 1}")
    mask = row.get("mask")
    if not isinstance(mask, str | list | dict | None):
        raise ValueError(f"mask: got {short_repr(mask)}, expected a path, polygons or run lengths")
    return _Pair(
        where=where,
        image=Path(os.path.abspath(image_folder / row["image"])),  # two spellings of a path are one image
        sentence=row["sentence"],
        mask=mask,
        split=row.get("split", records.TRAIN),
        style=row.get("style", ""),
        id=row.get("id"),
    )


def _mask_rle(mask: object, folder: Path, height: int, width: int) -> bytes:
    """The mask of a labeled pair as run lengths, which holds a pixel. Raises ValueError that describes the problem."""
    counts = read_mask(mask, folder, height, width)
    if not rle_area_px(counts, height, width):
        raise ValueError("empty, expected at least one foreground pixel")
    return counts
