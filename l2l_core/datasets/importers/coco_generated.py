"""Importer of COCO annotations without sentences: it generates them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from l2l_core.artifacts.records import TRAIN
from l2l_core.core.images import project_path
from l2l_core.core.masks import rle_area_px, segmentation_to_rle
from l2l_core.core.progress import progress
from l2l_core.core.seeding import generator
from l2l_core.datasets.importers.coco import rows_by_id
from l2l_core.datasets.importers.entries import (
    Entry,
    Imported,
    image_size,
    left_out,
    read_json,
    rows_of,
    text,
    to_json_lines,
    whole_number,
)
from l2l_core.datasets.sentences.generator import describe, refusal
from l2l_core.datasets.sentences.layout import Annotated, measure
from l2l_core.datasets.sentences.words import Vocabulary, kind_of
from l2l_core.errors import InputError, short_repr

NO_SENTENCE = "no unambiguous sentence"


def generate_sentences(instances: Path, images: Path, out: Path, seed: int) -> Imported:
    """COCO instances -> JSON lines with up to three generated sentences an object, for a file in the folder `out`.

    instances: file with `images` (id, file_name, height, width; optionally split, train by default), `annotations`
    (id, image_id, category_id, segmentation; optionally iscrowd) and `categories` (id, name, in English). A kind in an
    image's `not_exhaustive_category_ids` (LVIS) is not described there. images: folder of the file_names. seed: >= 0;
    the same seed and content give the same lines, in any order of the rows. Raises InputError that lists every bad row.
    """
    source = project_path(instances)
    document = read_json(instances)
    try:
        image_rows, annotations = (rows_by_id(document, key) for key in ("images", "annotations"))
        categories = {
            category_id: kind_of(text(row, "name")) for category_id, row in rows_by_id(document, "categories").items()
        }
    except ValueError as error:
        raise InputError(f"{source}: {error}") from None
    problems: list[str] = []
    rows = _by_image(annotations, image_rows, categories, source, problems)
    vocabulary = Vocabulary(categories.values())
    entries: list[Entry] = []
    refused: Counter[str] = Counter()
    for image_id in progress(sorted(rows), "sentences", "image"):
        try:
            objects = _objects(image_rows[image_id], rows[image_id], categories, source, problems)
            entries += _described(image_rows[image_id], objects, vocabulary, images, source, seed, refused)
        except ValueError as error:
            problems.append(f"{source}: image {image_id}: {error}")
    return to_json_lines(entries, out, source, problems, left_out("object(s)", refused, source))


def _by_image(
    annotations: Mapping[int, Any],
    images: Mapping[int, Any],
    categories: Mapping[int, str],
    source: str,
    problems: list[str],
) -> dict[int, list[Any]]:
    """image_id -> its annotations, by ascending id; annotations that cannot be placed become problems."""
    rows: dict[int, list[Any]] = defaultdict(list)
    for ann_id, row in sorted(annotations.items()):
        for key, known in (("image_id", images), ("category_id", categories)):
            try:
                if whole_number(row, key) not in known:
                    raise ValueError(f"{key}: got {row[key]}, which is not in the file")
            except ValueError as error:
                problems.append(f"{source}: annotation {ann_id}: {error}")
                break
        else:
            rows[row["image_id"]].append(row)
    return rows


def _objects(
    image: Any, rows: list[Any], categories: Mapping[int, str], source: str, problems: list[str]
) -> dict[int, Annotated]:
    """annotation id -> object; negative ids stand for kinds that are not annotated completely in the image."""
    height, width = image_size(image, "height", "width")
    found: dict[int, Annotated] = {}
    for row in rows:
        try:
            rle = segmentation_to_rle(row.get("segmentation"), height, width)
            if row.get("iscrowd", 0) not in (0, 1):
                raise ValueError(f"iscrowd: got {short_repr(row['iscrowd'])}, expected 0 or 1")
        except ValueError as error:
            problems.append(f"{source}: annotation {row['id']}: {error}")
            continue
        found[row["id"]] = Annotated(
            kind=categories[row["category_id"]],
            rle=rle if rle_area_px(rle, height, width) else b"",
            is_crowd=bool(row.get("iscrowd", 0)),
        )
    partly = rows_of(image, "not_exhaustive_category_ids") if "not_exhaustive_category_ids" in image else []
    kinds = sorted(categories[key] for key in partly if type(key) is int and key in categories)
    return found | {-rank: Annotated(kind, b"") for rank, kind in enumerate(kinds, start=1)}


def _described(
    image: Any,
    objects: Mapping[int, Annotated],
    vocabulary: Vocabulary,
    folder: Path,
    source: str,
    seed: int,
    refused: Counter[str],
) -> list[Entry]:
    """The pairs of an image. Each object has its own random stream, whose draws do not depend on the other objects."""
    height, width = image["height"], image["width"]
    layout = measure(list(objects.values()), height, width)
    entries: list[Entry] = []
    for index, (ann_id, item) in enumerate(objects.items()):
        if ann_id < 0:
            continue
        sentences: dict[str, str] = {}
        if not (reason := refusal(index, layout, vocabulary)):
            sentences = describe(index, layout, vocabulary, generator("sentences", seed, image["id"], ann_id))
        if not sentences:
            refused[reason or NO_SENTENCE] += 1
        entries += [
            Entry(
                where=f"{source}: annotation {ann_id}",
                image=folder / text(image, "file_name"),
                sentence=sentence,
                size_hw=(height, width),
                rle=item.rle,
                split=text(image, "split") if "split" in image else TRAIN,
                style=style,
            )
            for style, sentence in sentences.items()
        ]
    return entries
