"""Access to ground truth: assigns every sentence the role labeled, unlabeled or eval, image by image.

This is the protocol of the field (SemiRES and later work): list the training images in annotation order, draw
floor(fraction * images) of them with a seed, and label every sentence of a drawn image. Annotation order is ascending
ref_id, the numbering of the published refs. SemiRES's published 1 % list fits a draw with seed 0 in this order.
"""

from __future__ import annotations

import json
import math
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from l2l_core.artifacts import records
from l2l_core.core.files import read_file
from l2l_core.datasets.index import NO_MASK, shorten
from l2l_core.errors import ConfigError, InputError, raise_all, short_repr

LABELED, UNLABELED, EVAL = records.ROLES

ROLE_LISTS = {"labeled_image_ids": LABELED, "unlabeled_image_ids": UNLABELED, "eval_image_ids": EVAL}
"""Keys of a list file that assigns a role to every image."""


def draw_images(image_ids: list[int], fraction: float, seed: int) -> list[int]:
    """Draw floor(fraction * N) of N images by the field's protocol; image_ids: in annotation order, each once."""
    # Decimal: 0.29 of 100 images is 29, although 0.29 * 100 is 28.999... in binary.
    count = int(Decimal(str(fraction)) * len(image_ids))
    return random.Random(seed).sample(image_ids, count)


def split_by_fraction(refs: pa.Table, fraction: float, seed: int) -> pa.Table:
    """Draw the labeled images of records.REFS -> records.SPLIT, in the order of `refs`.

    The fraction is relative to the training images with a mask; a sentence without a mask is never labeled.
    Raises ConfigError if the draw would label nothing.
    """
    frame = _frame(refs)
    candidates = frame[(frame["split"] == records.TRAIN) & (frame["ann_id"] != NO_MASK)].sort_values("ref_id")
    image_ids = candidates["image_id"].unique().tolist()
    if not image_ids:
        raise ConfigError(
            "split.labeled_fraction: the dataset has no training image with a mask to draw from; "
            "give the roles in a list file (split.list_file)"
        )
    chosen = draw_images(image_ids, fraction, seed)
    if not chosen:
        raise ConfigError(
            f"split.labeled_fraction: got {fraction}, which is no image out of {len(image_ids)}; "
            f"expected at least {least_fraction(len(image_ids))}"
        )
    return _roles_by_split(frame, frame["image_id"].isin(chosen) & (frame["ann_id"] != NO_MASK))


def least_fraction(images: int) -> float:
    """The smallest fraction with two digits (or more if needed) that draws one image of `images`."""
    digits = max(2, len(str(images)))
    return math.ceil(10**digits / images) / 10**digits


def split_by_list(refs: pa.Table, list_file: str | Path) -> pa.Table:
    """Split by a list file: records.REFS -> records.SPLIT, in the order of `refs`.

    The file is JSON: SemiRES's {"train": [{"iid", "mask_id", ...}]} (mask_id is the ref_id), a list of image ids,
    {"image_ids": [...]}, or {"ref_ids": [...]}. For a dataset without a train split, it lists the role of every image:
    {"labeled_image_ids": [...], "unlabeled_image_ids": [...], "eval_image_ids": [...]}. This overrides the split
    column. Raises InputError that names every id that is unknown, not in the train split, or without a mask.
    """
    source = f"split.list_file {list_file}"
    listing = _load(Path(list_file), source)
    frame = _frame(refs)
    match listing:
        case list():
            return _label(frame, "image_id", _ids(listing, source), source)
        case {"image_ids": list(ids), **rest} if not rest:
            return _label(frame, "image_id", _ids(ids, source), source)
        case {"ref_ids": list(ids), **rest} if not rest:
            return _label(frame, "ref_id", _ids(ids, source), source)
        case {"train": list(rows)}:
            return _label_semires(frame, rows, source)
        case dict() if listing and set(listing) <= set(ROLE_LISTS):
            return _assign(frame, listing, source)
        case _:
            raise InputError(
                f"{source}: expected a list of image ids, or an object with `train` (SemiRES), `image_ids`, `ref_ids`, "
                f"or some of {', '.join(ROLE_LISTS)}"
            )


def labeled_masks(refs: pa.Table, split: pa.Table, masks: pa.Table) -> pa.Table:
    """The rows of records.MASKS for labeled sentences: the only ground truth that training may read."""
    roles = records.to_frame(split).set_index("sent_id")["role"]
    frame = _frame(refs)
    labeled = frame.loc[frame["sent_id"].map(roles) == LABELED, "ann_id"]
    return masks.filter(pa.array(records.to_frame(masks.select(["ann_id"]))["ann_id"].isin(labeled)))


def summary(refs: pa.Table, split: pa.Table) -> str:
    """One line with the number of images, refs and sentences per role."""
    frame = _frame(refs).merge(records.to_frame(split), on="sent_id")
    parts = []
    for role in records.ROLES:
        rows = frame[frame["role"] == role]
        parts.append(
            f"{role}: {rows['image_id'].nunique()} images, {rows['ref_id'].nunique()} refs, {len(rows)} sentences"
        )
    return "; ".join(parts)


def _frame(refs: pa.Table) -> pd.DataFrame:
    return records.to_frame(refs.select(["sent_id", "ref_id", "ann_id", "image_id", "split"]))


def _load(path: Path, source: str) -> Any:
    try:
        return json.loads(read_file(path))
    except FileNotFoundError:
        raise ConfigError(f"{source}: not found, expected a JSON file or null") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: not readable as JSON: {error}") from None


def _ids(values: list[Any], source: str) -> list[int]:
    """Checked ids: unique integers."""
    wrong = [value for value in values if type(value) is not int or abs(value) >= 2**63]
    if wrong:
        raise InputError(f"{source}: got {short_repr(wrong[0])}, expected whole numbers (ids)")
    repeated = [value for value, count in pd.Series(values, dtype="int64").value_counts().items() if count > 1]
    if repeated:
        raise InputError(f"{source}: listed more than once: {shorten(sorted(repeated))}")
    if not values:
        raise InputError(f"{source}: an empty list, expected at least one id")
    return values


def _label(frame: pd.DataFrame, column: str, ids: list[int], source: str) -> pa.Table:
    """Label the training rows with listed ids that have a mask."""
    train = frame[frame["split"] == records.TRAIN]
    unknown = sorted(set(ids) - set(frame[column]))
    elsewhere = sorted(set(ids) & set(frame[column]) - set(train[column]))
    maskless = sorted(set(ids) & set(train[column]) - set(train.loc[train["ann_id"] != NO_MASK, column]))
    problems = [f"{source}: {column} {shorten(unknown)}: not in the dataset"] if unknown else []
    problems += [f"{source}: {column} {shorten(elsewhere)}: not in the train split"] if elsewhere else []
    problems += [f"{source}: {column} {shorten(maskless)}: no mask to label with"] if maskless else []
    raise_all(problems)
    return _roles_by_split(frame, frame[column].isin(ids) & (frame["ann_id"] != NO_MASK))


def _label_semires(frame: pd.DataFrame, rows: list[Any], source: str) -> pa.Table:
    """SemiRES's list: one row per ref, with its image (iid) and its ref_id (mask_id)."""
    wrong = [
        index
        for index, row in enumerate(rows)
        if not isinstance(row, dict) or type(row.get("iid")) is not int or type(row.get("mask_id")) is not int
    ]
    if wrong:
        raise InputError(f"{source}: train rows {shorten(wrong)}: expected whole numbers `iid` and `mask_id`")
    images = dict(zip(frame["ref_id"].tolist(), frame["image_id"].tolist(), strict=True))
    moved = [row["mask_id"] for row in rows if images.get(row["mask_id"], row["iid"]) != row["iid"]]
    if moved:
        raise InputError(f"{source}: mask_id {shorten(moved)}: the dataset has these refs on another image than `iid`")
    return _label(frame, "ref_id", _ids([row["mask_id"] for row in rows], source), source)


def _assign(frame: pd.DataFrame, listing: dict[str, Any], source: str) -> pa.Table:
    """Listed roles for every image of the dataset."""
    roles: dict[int, str] = {}
    problems: list[str] = []
    for key, role in ROLE_LISTS.items():
        ids = listing.get(key, [])
        if not isinstance(ids, list):
            raise InputError(f"{source}: {key}: expected a list of image ids")
        for image_id in _ids(ids, f"{source}: {key}") if ids else []:
            if image_id in roles:
                problems.append(f"{source}: {key}: image {image_id} is {roles[image_id]} already")
            roles[image_id] = role
    images = set(frame["image_id"])
    if unknown := sorted(set(roles) - images):
        problems.append(f"{source}: image_id {shorten(unknown)}: not in the dataset")
    if left_out := sorted(images - set(roles)):
        problems.append(f"{source}: image_id {shorten(left_out)}: in no list, expected every image in one")
    if LABELED not in roles.values():
        problems.append(f"{source}: labeled_image_ids: empty, expected at least one image")
    role = frame["image_id"].map(roles)
    maskless = frame.loc[(frame["ann_id"] == NO_MASK) & role.isin([LABELED, EVAL]), "image_id"].unique().tolist()
    if maskless:
        problems.append(f"{source}: image_id {shorten(maskless)}: labeled or for evaluation, but has no mask")
    raise_all(problems)
    return _split_table(frame, role.to_numpy())


def _roles_by_split(frame: pd.DataFrame, labeled: pd.Series) -> pa.Table:
    """Roles from the split column; `labeled` marks the labeled training rows."""
    train = frame["split"] == records.TRAIN
    return _split_table(frame, np.select([labeled, train], [LABELED, UNLABELED], EVAL))


def _split_table(frame: pd.DataFrame, role: np.ndarray[Any, Any]) -> pa.Table:
    return pa.table({"sent_id": frame["sent_id"].to_numpy(), "role": role.tolist()}, schema=records.SPLIT)
