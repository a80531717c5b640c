"""Export accepted pseudo-labels as a COCO file or as JSON lines for `dataset`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from l2l_core.artifacts import records
from l2l_core.artifacts.rounds import rounds_with
from l2l_core.config import MAX_ROUND
from l2l_core.core.masks import rle_area_px, rle_area_px_all, rle_box_xyxy
from l2l_core.errors import ArtifactError, InputError
from l2l_core.export.outlines import to_segmentation

CATEGORY = {"id": 1, "name": "object", "supercategory": "object"}
"""The only category: a pseudo-label gives a place only, and the index's categories are ground truth."""

LABEL_COLUMNS = (
    *("round", "sent_id", "height", "width", "rle_counts", "candidate", "keep_rle"),
    *("accept_prob", "prior_iou", "accepted", "method"),
)


def read_labels(round_number: int) -> pd.DataFrame:
    """A round's pseudo-labels, one row per unlabeled sentence, by sent_id.

    Columns LABEL_COLUMNS, image_id, sentence, file_name and area_px; reads no ground truth. Raises InputError if only
    other rounds have pseudo-labels, ArtifactError if none has.
    """
    path = records.round_folder(round_number) / "pseudo_labels.parquet"
    if not path.is_file() and (rounds := rounds_with(path.name)):
        more = f"; dvc exp run -S round={round_number} makes more" if round_number <= MAX_ROUND else ""
        known = ", ".join(map(str, rounds))
        raise InputError(f"--round: got {round_number}, expected one of those with pseudo-labels ({known}){more}")
    labels = records.to_frame(records.read_table(path, records.PSEUDO_LABELS, LABEL_COLUMNS))
    refs = records.read_table(records.INDEX.refs, records.REFS, ["sent_id", "image_id", "sentence"])
    images = records.read_table(records.INDEX.images, records.IMAGES, ["image_id", "file_name", "height", "width"])
    known = records.to_frame(refs).merge(records.to_frame(images), on="image_id")
    found = labels.merge(known, on="sent_id", validate="one_to_one", suffixes=("", "_listed"))
    found = found.sort_values("sent_id", ignore_index=True)
    if len(found) != len(labels):
        raise ArtifactError(f"{path}: names sentences that {records.INDEX.refs} lacks; run dvc repro")
    other = found[(found["height"] != found["height_listed"]) | (found["width"] != found["width_listed"])]
    if len(other):
        first = other.iloc[0]
        raise ArtifactError(
            f"{path}: of another dataset than {records.INDEX.images}: the label of sent_id {first['sent_id']} is "
            f"{first['height']} x {first['width']} px (height x width), its image {first['height_listed']} x "
            f"{first['width_listed']}; run dvc repro"
        )
    found = found.drop(columns=["height_listed", "width_listed"])
    sizes = found[["height", "width"]].to_numpy(np.int64)
    return found.assign(area_px=rle_area_px_all(found["rle_counts"].tolist(), sizes))


def accepted_labels(labels: pd.DataFrame) -> pd.DataFrame:
    """The accepted, nonempty labels: an empty one is no object. Raises InputError if none is left."""
    chosen = labels[labels["accepted"] & (labels["area_px"] > 0)]
    if chosen.empty:
        raise InputError(f"no pseudo-label to export: of {len(labels)} none is accepted and not empty")
    return chosen


def to_coco(labels: pd.DataFrame, *, polygons: bool) -> dict[str, Any]:
    """Labels -> a COCO `instances` document, one annotation per sentence, with the image ids and names of the index.

    Besides COCO's own keys, an annotation has sentence, sent_id, score (accept_prob), round, policy, candidate (how the
    label was built) and keep (run lengths of the valid pixels).
    """
    images = labels.drop_duplicates("image_id").sort_values("image_id")
    annotations = [_annotation(ann_id, row, polygons) for ann_id, row in enumerate(_rows(labels), start=1)]
    return {
        "info": {"description": "Pseudo-labels by L2L, no ground truth"},
        "licenses": [],
        "images": [
            {"id": row.image_id, "file_name": row.file_name, "height": row.height, "width": row.width}
            for row in _rows(images)
        ],
        "annotations": annotations,
        "categories": [CATEGORY],
    }


def to_json_lines(labels: pd.DataFrame, folder: Path, *, polygons: bool) -> str:
    """Labels -> lines of image, sentence, mask, id (the sent_id) in the format of `dataset`, for a file in `folder`."""
    return "".join(
        json.dumps(
            {
                "image": Path(os.path.relpath(row.file_name, folder)).as_posix(),
                "sentence": row.sentence,
                "mask": to_segmentation(row.rle_counts, row.height, row.width, polygons=polygons),
                "id": row.sent_id,
            },
            ensure_ascii=False,
        )
        + "\n"
        for row in _rows(labels)
    )


def _rows(labels: pd.DataFrame) -> Any:
    """Rows with plain Python values, for JSON."""
    return labels.astype(object).itertuples(index=False)


def _annotation(ann_id: int, row: Any, polygons: bool) -> dict[str, object]:
    x1, y1, x2, y2 = rle_box_xyxy(row.rle_counts, row.height, row.width)
    return {
        "id": ann_id,
        "image_id": row.image_id,
        "category_id": CATEGORY["id"],
        "segmentation": to_segmentation(row.rle_counts, row.height, row.width, polygons=polygons),
        "area": rle_area_px(row.rle_counts, row.height, row.width),
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "iscrowd": 0,
        "score": round(row.accept_prob, 6),
        "sentence": row.sentence,
        "sent_id": row.sent_id,
        "round": row.round,
        "method": row.method,
        "candidate": row.candidate,
        "keep": to_segmentation(row.keep_rle, row.height, row.width, polygons=False),
    }
