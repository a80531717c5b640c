"""Reader of the layout of lichengunc/refer: refs(<split_by>).p or .json, instances.json and a folder of images.

gRefCOCO has the same layout with grefs(<split_by>). A ref may name several annotations, whose masks are united. A ref
with no annotation is left out.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeVar

import numpy as np

from l2l_core.core.files import read_file
from l2l_core.core.images import ImageFile, inspect_images, project_path, visible
from l2l_core.core.masks import decode_rle, encode_rle, rle_area_px, segmentation_to_rle
from l2l_core.core.progress import progress
from l2l_core.datasets.index import (
    Box,
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

IMAGE_SUBFOLDERS = ("", "train2014", "mscoco/images/train2014")
"""Subfolders of the image folder that hold the photos in the published layouts."""

REFS_NAME = re.compile(r"g?refs\((.+)\)\.(?:p|json)")
NO_TARGET = [-1]
"""ann_id of gRefCOCO's refs without a target in their image."""

MAX_COORDINATE_PX = 1e6
"""Larger than any image; also refuses NaN and infinity, which compare false."""

T = TypeVar("T")


class _ImageRow(NamedTuple):
    where: str
    file_name: str
    height: int  # 0: not stated, allowed only in a boxes-only dataset
    width: int


class _Annotation(NamedTuple):
    where: str
    image_id: int
    category: str
    bbox: Box
    segmentation: object
    parts: tuple[int, ...] = ()  # ann_ids of the annotations in this union


def refs_files(folder: Path) -> list[Path]:
    """The files of referring expressions in a folder."""
    return [path for path in visible(folder.glob("*")) if REFS_NAME.fullmatch(path.name)]


def split_by_of(path: Path) -> str:
    """The <split_by> of refs(<split_by>).p and the like."""
    found = REFS_NAME.fullmatch(path.name)
    assert found is not None  # the path is one of `refs_files`
    return found[1]


def read_refcoco(folder: Path, images: str = "auto", split_by: str = "auto", min_image_side_px: int = 1) -> Index:
    """Read and check a complete dataset.

    images: `auto` (<folder>/images, then <folder>/../images) or a folder; the subfolders of IMAGE_SUBFOLDERS are
    searched too. split_by: which refs(<split_by>) file; `auto` takes the only one.
    A dataset in which NO annotation has a segmentation is boxes only: it has no masks, and its images need not exist
    (an absent image has sha256 "" and the stated size, or 0 if none is stated).
    Raises InputError that lists every bad row.
    """
    refs_path, instances_path = _refs_path(folder, split_by), folder / "instances.json"
    refs = load_refs(refs_path)
    instances = _load_instances(instances_path)
    problems: list[str] = []

    segmented = any(isinstance(row, dict) and row.get("segmentation") for row in instances["annotations"])
    where = project_path(instances_path)
    categories = _rows_by_id(
        instances["categories"], f"{where}: category", lambda row, _: _get(row, "name", str), problems
    )
    image_rows = _rows_by_id(
        instances["images"], f"{where}: image", lambda row, where: _image_row(row, where, segmented), problems
    )
    annotations = _rows_by_id(
        instances["annotations"],
        f"{where}: annotation",
        lambda row, where: _annotation(row, where, categories, image_rows),
        problems,
    )
    source = project_path(refs_path)
    sentences, without_target = _sentences(refs, source, annotations, problems)
    problems += sentence_problems(sentences)
    if without_target and not sentences and not problems:
        problems.append(f"{source}: no ref has a target")
    used = sorted({row.image_id for row in sentences})

    files = _image_files(
        {image_id: image_rows[image_id] for image_id in used},
        _image_folders(folder, images),
        min_image_side_px,
        optional=not segmented,
        problems=problems,
    )
    names = {
        image_id: files[image_id].file_name if image_id in files else image_rows[image_id].file_name
        for image_id in used
    }
    problems += overlap_problems(sentences, names, source)
    referred = sorted({row.ann_id for row in sentences}) if segmented else []
    masks = _masks_of(referred, annotations, image_rows, problems)
    raise_all(problems)

    objects = [
        Object(ann_id, annotation.image_id, annotation.category, annotation.bbox)
        for ann_id, annotation in annotations.items()
        if annotation.image_id in files
    ]
    warnings = data_warnings(files, sentences, masks, source)
    if without_target:
        warnings.append(f"{source}: {without_target} sentence(s) without a target (no_target) are left out")
    return build_index(files, sentences, objects, masks, warnings)


def _masks_of(
    ann_ids: Sequence[int],
    annotations: Mapping[int, _Annotation],
    image_rows: Mapping[int, _ImageRow],
    problems: list[str],
) -> dict[int, Mask]:
    """Masks of annotations by id, several parts joined. Adds unusable ones to `problems`."""
    masks = {}
    for ann_id in progress(ann_ids, "masks", "mask"):
        annotation = annotations[ann_id]
        row = image_rows[annotation.image_id]
        try:
            parts = [annotations[part] for part in annotation.parts] or [annotation]
            drawn = [segmentation_to_rle(part.segmentation, row.height, row.width) for part in parts]
            counts = drawn[0] if len(drawn) == 1 else _union(drawn, row.height, row.width)
            if not rle_area_px(counts, row.height, row.width):
                raise ValueError("empty mask")
            masks[ann_id] = Mask(row.height, row.width, counts)
        except ValueError as error:
            problems.append(f"{annotation.where}: {error}")
    return masks


def _union(drawn: list[bytes], height: int, width: int) -> bytes:
    return encode_rle(np.logical_or.reduce([decode_rle(counts, height, width) for counts in drawn]))


class _DataUnpickler(pickle._Unpickler):
    """Reads lists, dicts, strings and numbers; refuses anything that would import or call code.

    Python's own reader in Python: the one in C takes as much memory as a number in the file says. Tuples become lists
    and sets are refused, because a deeply nested key of a dict overflows the C stack.
    """

    stack: list[Any]

    def load_tuple1(self) -> None:
        self._list_of(1)

    def load_tuple2(self) -> None:
        self._list_of(2)

    def load_tuple3(self) -> None:
        self._list_of(3)

    def _list_of(self, count: int) -> None:
        self.stack[-count:] = [self.stack[-count:]]

    def refuse(self) -> NoReturn:
        raise pickle.UnpicklingError("it holds a set or a byte array, expected lists, dicts, strings, numbers")

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.EMPTY_TUPLE[0]: pickle._Unpickler.dispatch[pickle.EMPTY_LIST[0]],
        pickle.TUPLE[0]: pickle._Unpickler.dispatch[pickle.LIST[0]],
        pickle.TUPLE1[0]: load_tuple1,
        pickle.TUPLE2[0]: load_tuple2,
        pickle.TUPLE3[0]: load_tuple3,
        pickle.EMPTY_SET[0]: refuse,
        pickle.FROZENSET[0]: refuse,
        pickle.BYTEARRAY8[0]: refuse,
    }

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, expected nothing but lists, dicts, strings, numbers"
        )


def _refs_path(folder: Path, split_by: str) -> Path:
    found = refs_files(folder)
    chosen = [path for path in found if split_by in ("auto", split_by_of(path))]
    if len(chosen) == 1:
        return chosen[0]
    where, names = project_path(folder), ", ".join(path.name for path in found) or "none"
    known = sorted({split_by_of(path) for path in found})
    if not chosen:
        wanted = "refs(<name>).p or .json" if split_by == "auto" else f"refs({split_by}).p or .json"
        advice = f"; choose by ingest.split_by: {' or '.join(known)}" if known else ""
        raise InputError(f"{where}: found {names}, expected {wanted}{advice}")
    if len(known) > 1 and split_by == "auto":
        raise InputError(f"{where}: found {names}, expected one; choose by ingest.split_by: {' or '.join(known)}")
    twins = " and ".join(path.name for path in chosen)
    raise InputError(f"{where}: {twins} are both of the split {split_by_of(chosen[0])}; remove one")


def load_refs(path: Path) -> list[Any]:
    """The list in a refs(<split_by>) file. No code in a pickle is run; rows are not checked.

    Raises InputError if it is not a list of plain data.
    """
    if path.suffix == ".json":
        refs = _load_json(path)
    else:
        try:
            # utf-8: Python 2 wrote the published files
            refs = _DataUnpickler(io.BytesIO(read_file(path)), encoding="utf-8").load()
        except Exception as error:  # a damaged pickle raises many exception types
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(f"{project_path(path)}: not a pickle of plain data: {reason}") from None
    if not isinstance(refs, list) or not refs:
        raise InputError(f"{project_path(path)}: expected a list of refs that is not empty")
    return refs


def _load_instances(path: Path) -> dict[str, list[Any]]:
    instances = _load_json(path)
    keys = ("images", "annotations", "categories")
    if not isinstance(instances, dict) or not all(isinstance(instances.get(key), list) for key in keys):
        raise InputError(f"{project_path(path)}: expected an object with the lists {', '.join(keys)}")
    return instances


def _load_json(path: Path) -> Any:
    try:
        return json.loads(read_file(path))
    except FileNotFoundError:
        raise InputError(f"{project_path(path)}: not found, the layout needs it") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{project_path(path)}: not valid JSON: {error}") from None


def _get(row: dict[str, Any], key: str, kind: type[T]) -> T:
    """row[key], which must have exactly that type (True is not a number) and fit into a table."""
    value = row.get(key)
    if type(value) is not kind or (isinstance(value, int) and not -(2**63) <= value < 2**63):
        raise ValueError(
            f"{key}: got {short_repr(value)}, expected {'a whole number' if kind is int else kind.__name__}"
        )
    if isinstance(value, str) and not is_utf8(value):
        raise ValueError(f"{key}: got {short_repr(value)}, expected text that UTF-8 can write")
    return value


def _rows_by_id(
    rows: list[Any], what: str, parse: Callable[[dict[str, Any], str], T], problems: list[str]
) -> dict[int, T]:
    """Parsed rows by their `id`; a row that cannot be parsed becomes a line in `problems`."""
    parsed: dict[int, T] = {}
    for index, row in enumerate(rows):
        where = f"{what} {index}"
        try:
            if not isinstance(row, dict):
                raise ValueError(f"got {short_repr(row)}, expected an object")
            row_id = _get(row, "id", int)
            where += f" (id {row_id})"
            if row_id in parsed:
                raise ValueError("id is taken by an earlier row")
            parsed[row_id] = parse(row, where)
        except ValueError as error:
            problems.append(f"{where}: {error}")
    return parsed


def _image_row(row: dict[str, Any], where: str, size_needed: bool) -> _ImageRow:
    name = _get(row, "file_name", str)
    if not size_needed and row.get("height") is None and row.get("width") is None:
        return _ImageRow(where, name, 0, 0)
    height, width = _get(row, "height", int), _get(row, "width", int)
    if not 1 <= min(height, width) <= max(height, width) <= MAX_COORDINATE_PX:
        raise ValueError(f"height, width: got {height}, {width}, expected the image's size in pixels")
    return _ImageRow(where, name, height, width)


def _annotation(
    row: dict[str, Any], where: str, categories: dict[int, str], images: dict[int, _ImageRow]
) -> _Annotation:
    image_id, category_id = _get(row, "image_id", int), _get(row, "category_id", int)
    if image_id not in images:
        raise ValueError(f"image_id {image_id}: no usable image of that id in the file")
    if category_id not in categories:
        raise ValueError(f"category_id {category_id}: no category of that id in the file")
    return _Annotation(where, image_id, categories[category_id], _box(row.get("bbox")), row.get("segmentation"))


def _box(bbox: object) -> Box:
    """COCO x, y, width, height -> x1 y1 x2 y2. COCO contains boxes of zero area, so these pass."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not set(map(type, bbox)) <= {int, float}:
        raise ValueError(f"bbox: got {short_repr(bbox)}, expected 4 numbers: x, y, width, height")
    x, y, width, height = bbox
    if not all(abs(value) <= MAX_COORDINATE_PX for value in bbox) or min(width, height) < 0:
        raise ValueError(f"bbox: got {short_repr(bbox)}, expected finite numbers, width and height >= 0")
    return float(x), float(y), float(x) + float(width), float(y) + float(height)


def _sentences(
    refs: list[Any], source: str, annotations: dict[int, _Annotation], problems: list[str]
) -> tuple[list[Sentence], int]:
    """All usable sentences, and the number of sentences without a target; each unusable one adds a line to `problems`.

    The union of a ref's annotations is added to `annotations`.
    """
    sentences: list[Sentence] = []
    without_target = 0
    unions: dict[tuple[int, ...], int] = {}
    seen: set[int] = set()
    for index, ref in enumerate(refs):
        where = f"{source}: ref {index}"
        try:
            if not isinstance(ref, dict):
                raise ValueError(f"got {short_repr(ref)}, expected an object")
            ref_id = _get(ref, "ref_id", int)
            where += f" (ref_id {ref_id})"
            if ref_id in seen:
                raise ValueError("ref_id is taken by an earlier ref")
            seen.add(ref_id)
            image_id, split = _get(ref, "image_id", int), _get(ref, "split", str)
            if ref.get("ann_id") == NO_TARGET or ref.get("no_target") is True:
                without_target += len(_get(ref, "sentences", list))
                continue
            several = isinstance(ref.get("ann_id"), list)
            ann_id = _united(ref["ann_id"], annotations, unions) if several else _get(ref, "ann_id", int)
            annotation = annotations.get(ann_id)
            if annotation is None:
                raise ValueError(f"ann_id {ann_id}: no usable annotation of that id in instances.json")
            if image_id != annotation.image_id:
                raise ValueError(f"image_id: got {image_id}, but annotation {ann_id} is of image {annotation.image_id}")
            if not _get(ref, "sentences", list):
                raise ValueError("sentences: got an empty list, expected at least one")
        except ValueError as error:
            problems.append(f"{where}: {error}")
            continue
        for sentence_index, row in enumerate(ref["sentences"]):
            here = f"{where}, sentence {sentence_index}"
            try:
                if not isinstance(row, dict):
                    raise ValueError(f"got {short_repr(row)}, expected an object")
                style = _get(row, "style", str) if "style" in row else ""
                found = Sentence(
                    where=here,
                    sent_id=_get(row, "sent_id", int),
                    ref_id=ref_id,
                    ann_id=ann_id,
                    image_id=image_id,
                    category=annotation.category,
                    sentence=_get(row, "sent", str),
                    style=style,
                    split=split,
                    bbox=annotation.bbox,
                )
                sentences.append(found)
            except ValueError as error:
                problems.append(f"{here}: {error}")
    return sentences, without_target


def _united(ann_ids: list[Any], annotations: dict[int, _Annotation], unions: dict[tuple[int, ...], int]) -> int:
    """The ann_id of a single annotation, or of the union of several, which is created if new."""
    parts = tuple(dict.fromkeys(ann_ids)) if all(type(ann_id) is int for ann_id in ann_ids) else ()
    if not parts or not set(parts) <= annotations.keys():
        raise ValueError(f"ann_id: got {short_repr(ann_ids)}, expected ids of usable annotations of instances.json")
    if len(parts) == 1:
        return parts[0]
    rows = [annotations[part] for part in parts]
    images = {row.image_id for row in rows}
    if len(images) > 1:
        raise ValueError(f"ann_id: got {short_repr(ann_ids)}, which are of several images")
    key = tuple(sorted(parts))
    if key not in unions:
        unions[key] = max(annotations) + 1
        boxes = np.array([row.bbox for row in rows])
        (x1, y1), (x2, y2) = boxes[:, :2].min(axis=0).tolist(), boxes[:, 2:].max(axis=0).tolist()
        categories = ", ".join(dict.fromkeys(row.category for row in rows))
        annotations[unions[key]] = _Annotation(rows[0].where, images.pop(), categories, (x1, y1, x2, y2), None, key)
    return unions[key]


def _image_folders(folder: Path, images: str) -> list[Path]:
    roots = [folder / "images", folder / ".." / "images"] if images == "auto" else [Path(images)]
    return [root / below for root in roots for below in IMAGE_SUBFOLDERS]


def _image_files(
    rows: dict[int, _ImageRow], folders: list[Path], min_side_px: int, optional: bool, problems: list[str]
) -> dict[int, ImageFile]:
    """The image file of every row; optional: an absent file takes its values from the annotations."""
    present = [folder for folder in folders if folder.is_dir()]
    paths: dict[int, Path] = {}
    files: dict[int, ImageFile] = {}
    for image_id, row in rows.items():
        path = next((folder / row.file_name for folder in present if (folder / row.file_name).is_file()), None)
        if path is not None:
            paths[image_id] = path
        elif optional:
            files[image_id] = ImageFile(row.file_name, row.height, row.width, sha256="")
        else:
            problems.append(f"{row.where}: image {row.file_name} not found; set ingest.images to its folder")
    for image_id, found in zip(paths, inspect_images(list(paths.values()), min_side_px), strict=True):
        row = rows[image_id]
        if isinstance(found, str):
            problems.append(f"{row.where}: {found}")
        elif row.height and (row.height, row.width) != (found.height, found.width):
            problems.append(
                f"{row.where}: {found.file_name} is {found.width}x{found.height} px, "
                f"the annotations say {row.width}x{row.height}"
            )
        else:
            files[image_id] = found
    return files
