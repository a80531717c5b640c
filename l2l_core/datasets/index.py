"""The tables that all dataset readers produce, and the checks that they share."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from l2l_core.artifacts import records
from l2l_core.core.images import ImageFile
from l2l_core.core.masks import rle_area_px
from l2l_core.errors import short_repr

Box = tuple[float, float, float, float]
"""x1 y1 x2 y2 in pixels, end-exclusive."""

NO_MASK = -1
"""ann_id of a pair without a mask."""

MAX_SENTENCE = 2000
"""Most characters of a sentence; the longest in published datasets have some hundred."""

IDS_SHOWN = 5  # of a long list in one message; enough to find the cause


class Sentence(NamedTuple):
    """One referring expression from a reader."""

    where: str  # file and row, for messages
    sent_id: int
    ref_id: int
    ann_id: int
    image_id: int
    category: str
    sentence: str
    style: str
    split: str
    bbox: Box | None


class Object(NamedTuple):
    """One annotated object."""

    ann_id: int
    image_id: int
    category: str
    bbox: Box


class Mask(NamedTuple):
    """The mask of one object, as COCO compressed run lengths at the image's size."""

    height: int
    width: int
    rle_counts: bytes


@dataclass(frozen=True)
class Index:
    """A complete dataset: records.IMAGES, REFS, OBJECTS and MASKS, each sorted by its id."""

    images: pa.Table
    refs: pa.Table
    objects: pa.Table
    masks: pa.Table
    warnings: tuple[str, ...] = ()  # one line each

    @property
    def boxes_only(self) -> bool:
        """Whether the objects have boxes but no masks."""
        return self.objects.num_rows > 0 and self.masks.num_rows == 0


def is_utf8(text: str) -> bool:
    """Whether a text can be encoded as UTF-8; JSON may hold half of a surrogate pair, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def too_long(sentence: str) -> str:
    """The problem of a sentence that is too long, in one line; "" if it is not."""
    # A tokenizer reads all of it, in each of many batches.
    return f"sentence: {len(sentence)} characters, expected at most {MAX_SENTENCE}" * (len(sentence) > MAX_SENTENCE)


def sentence_problems(sentences: Sequence[Sentence]) -> list[str]:
    """All problems of sentences beyond their types, one line each."""
    problems: list[str] = []
    splits = (records.TRAIN, *records.EVAL_SPLITS)
    seen: dict[int, str] = {}
    for row in sentences:
        if problem := too_long(row.sentence):
            problems.append(f"{row.where}: {problem}")
        if not any(character.isalnum() for character in row.sentence):
            problems.append(f"{row.where}: sentence {short_repr(row.sentence)} has no words")
        if row.split not in splits:
            problems.append(f"{row.where}: split: got {row.split!r}, expected one of {', '.join(splits)}")
        if row.sent_id in seen:
            problems.append(f"{row.where}: sent_id {row.sent_id} is taken by {seen[row.sent_id]}")
        seen.setdefault(row.sent_id, row.where)
    return problems


def overlap_problems(sentences: Sequence[Sentence], paths: Mapping[int, str], source: str) -> list[str]:
    """One line if image files are in both the training split and an evaluation split; paths: image_id -> file.

    One file is one image, even with several ids.
    """
    # A name with a null byte, which its own line already reports, is no path.
    files = {image_id: path if "\0" in path else os.path.realpath(path) for image_id, path in paths.items()}
    names = {files[image_id]: path for image_id, path in paths.items()}
    train, evaluated = ({files[image_id] for image_id in side} for side in _sides(sentences))
    shared = sorted(names[file] for file in train & evaluated)
    if not shared:
        return []
    return [
        f"{source}: {len(shared)} image(s) are in train and in an evaluation split: {shorten(shared)}; "
        "each image may be on one side only (RefCOCOg: the umd split keeps them apart, google does not)"
    ]


def data_warnings(
    files: Mapping[int, ImageFile], sentences: Sequence[Sentence], masks: Mapping[int, Mask], source: str
) -> list[str]:
    """The warnings of all readers and importers, one line each.

    They cover photos of the same content in training and evaluation, sentences with two masks in one image, and photos
    with an EXIF rotation.
    """
    return _copies(files, sentences, source) + _contradictions(files, sentences, masks, source) + _turns(files, source)


def exif_rotation_note(names: Sequence[str]) -> str:
    """The warning about photos that an EXIF tag rotates or mirrors."""
    return f"an EXIF tag turns {shorten(names)}; pixels are used as stored, so save the photo upright"


def _turns(files: Mapping[int, ImageFile], source: str) -> list[str]:
    turned = [file.file_name for file in files.values() if file.is_exif_rotated]
    if not turned:
        return []
    return [
        f"{source}: {len(turned)} image(s): {exif_rotation_note(turned)}, and draw their masks on the upright photo"
    ]


def _copies(files: Mapping[int, ImageFile], sentences: Sequence[Sentence], source: str) -> list[str]:
    by_content: dict[str, tuple[set[int], set[int]]] = defaultdict(lambda: (set(), set()))
    for side, image_ids in enumerate(_sides(sentences)):
        for image_id in image_ids & files.keys():
            if files[image_id].sha256:  # "": the file does not exist
                by_content[files[image_id].sha256][side].add(image_id)
    pairs = sorted(
        (files[min(train)].file_name, files[min(evaluated)].file_name)
        for train, evaluated in by_content.values()
        if train and evaluated
    )
    if not pairs:
        return []
    shown = shorten([f"{first} = {second}" for first, second in pairs])
    return [
        f"{source}: {len(pairs)} image(s) of train are, byte for byte, images of an evaluation split: {shown}; "
        "leave one of each out, or scores are too high"
    ]


def _contradictions(
    files: Mapping[int, ImageFile], sentences: Sequence[Sentence], masks: Mapping[int, Mask], source: str
) -> list[str]:
    first: dict[tuple[str | int, str], Sentence] = {}
    found: dict[tuple[str | int, str], str] = {}
    for row in sentences:
        if row.ann_id not in masks:
            continue
        content = files[row.image_id].sha256 if row.image_id in files else ""
        key = content or row.image_id, " ".join(row.sentence.casefold().split())
        earlier = first.setdefault(key, row)
        if masks[earlier.ann_id] != masks[row.ann_id]:
            found.setdefault(key, f"{earlier.where} and {row.where} ({row.sentence!r})")
    if not found:
        return []
    return [
        f"{source}: {len(found)} sentence(s) have two different masks in one image, of which at most one is right: "
        f"{shorten(list(found.values()))}; say which object is meant, or unite its parts in one mask"
    ]


def _sides(sentences: Sequence[Sentence]) -> tuple[set[int], set[int]]:
    """image_ids of the training split and of the evaluation splits."""
    train = {row.image_id for row in sentences if row.split == records.TRAIN}
    return train, {row.image_id for row in sentences if row.split in records.EVAL_SPLITS}


def build_index(
    images: Mapping[int, ImageFile],
    sentences: Sequence[Sentence],
    objects: Iterable[Object],
    masks: Mapping[int, Mask],
    warnings: Sequence[str],
) -> Index:
    """Checked rows -> tables; images are keyed by image_id, masks by ann_id."""
    by_image = sorted(images.items())
    by_sentence = sorted(sentences, key=lambda row: row.sent_id)
    by_object = sorted(objects)
    by_mask = sorted(masks.items())
    return Index(
        images=pa.table(
            {
                "image_id": [image_id for image_id, _ in by_image],
                "file_name": [file.file_name for _, file in by_image],
                "height": [file.height for _, file in by_image],
                "width": [file.width for _, file in by_image],
                "sha256": [file.sha256 for _, file in by_image],
            },
            schema=records.IMAGES,
        ),
        refs=pa.table(
            {name: [getattr(row, name) for row in by_sentence] for name in records.REFS.names if name != "bbox"}
            | {"bbox": _box_column([row.bbox for row in by_sentence])},
            schema=records.REFS,
        ),
        objects=pa.table(
            {name: [getattr(row, name) for row in by_object] for name in records.OBJECTS.names if name != "bbox"}
            | {"bbox": _box_column([row.bbox for row in by_object])},
            schema=records.OBJECTS,
        ),
        masks=pa.table(
            {
                "ann_id": [ann_id for ann_id, _ in by_mask],
                "height": [mask.height for _, mask in by_mask],
                "width": [mask.width for _, mask in by_mask],
                "rle_counts": [mask.rle_counts for _, mask in by_mask],
                "area_px": [rle_area_px(mask.rle_counts, mask.height, mask.width) for _, mask in by_mask],
            },
            schema=records.MASKS,
        ),
        warnings=tuple(warnings),
    )


def summary(index: Index) -> str:
    """A one-line summary of the dataset."""
    splits = Counter(index.refs["split"].to_pylist())
    counts = ", ".join(f"{name} {splits[name]}" for name in (records.TRAIN, *records.EVAL_SPLITS) if splits[name])
    line = f"{index.images.num_rows} images, {index.refs.num_rows} sentences ({counts}), {index.masks.num_rows} masks"
    return line + ("; boxes only: no annotation has a segmentation" if index.boxes_only else "")


def shorten(items: Sequence[object]) -> str:
    """The first items of a list and the number of the others."""
    rest = len(items) - IDS_SHOWN
    return ", ".join(map(str, items[:IDS_SHOWN])) + (f" and {rest} more" if rest > 0 else "")


def _box_column(boxes: Sequence[Box | None]) -> pa.Array:
    missing = np.array([box is None for box in boxes], dtype=bool)
    values = np.array([(0.0,) * 4 if box is None else box for box in boxes], dtype=np.float32).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(values), 4, mask=pa.array(missing))
