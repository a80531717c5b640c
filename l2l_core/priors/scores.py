"""Score priors and proposals against the masks of the labeled sentences, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from l2l_core.artifacts import records
from l2l_core.core.arrays import DoubleArray
from l2l_core.core.boxes import iou_xyxy
from l2l_core.core.masks import cut_proposal, decode_rle, intersection_union_px, rle_box_xyxy
from l2l_core.core.metrics import POSITIVE_IOU, auroc, iou_from_px

Scores = dict[str, int | float | None]


@dataclass(frozen=True)
class LabeledMasks:
    """N labeled sentences and their true masks, by ascending sent_id."""

    sent_id: NDArray[np.int64]  # [N]
    ann_id: NDArray[np.int64]  # [N] the object; several sentences can share it
    image_hw: NDArray[np.int64]  # [N, 2]
    rle: list[bytes]  # true masks at the image's size
    box_xyxy: DoubleArray  # [N, 4] tight boxes of the masks, in pixels

    def take(self, rows: NDArray[np.int64]) -> LabeledMasks:
        """The sentences of the given rows, in that order."""
        rle = [self.rle[row] for row in rows.tolist()]
        return LabeledMasks(self.sent_id[rows], self.ann_id[rows], self.image_hw[rows], rle, self.box_xyxy[rows])


def labels_of(split: pa.Table, refs: pa.Table, labeled_masks: pa.Table) -> LabeledMasks:
    """The truth of the sentences with role `labeled`; no other truth is read.

    split: records.SPLIT. refs: sent_id, ann_id. labeled_masks: records.MASKS of the labeled objects.
    """
    roles = records.to_frame(split)
    labeled = roles.loc[roles["role"] == "labeled", ["sent_id"]]
    known = labeled.merge(records.to_frame(refs.select(["sent_id", "ann_id"])), on="sent_id", validate="one_to_one")
    known = known.merge(records.to_frame(labeled_masks), on="ann_id", validate="many_to_one").sort_values("sent_id")
    image_hw = known[["height", "width"]].to_numpy(np.int64).reshape(-1, 2)
    rle = known["rle_counts"].tolist()
    boxes = [rle_box_xyxy(counts, *hw) for counts, hw in zip(rle, image_hw.tolist(), strict=True)]
    return LabeledMasks(
        known["sent_id"].to_numpy(np.int64),
        known["ann_id"].to_numpy(np.int64),
        image_hw,
        rle,
        np.array(boxes, dtype=np.float64).reshape(-1, 4),
    )


def hits(point_xy: DoubleArray, labels: LabeledMasks) -> NDArray[np.bool_]:
    """Whether points [N, 2] in pixels lie inside the true masks of N labeled sentences -> [N]; NaN is outside."""
    found = np.zeros(len(labels.rle), dtype=bool)
    for row in np.flatnonzero(~np.isnan(point_xy).any(axis=1)).tolist():
        height, width = labels.image_hw[row].tolist()
        x, y = (int(value) for value in point_xy[row])  # a point on the right or lower edge is in the last pixel
        found[row] = decode_rle(labels.rle[row], height, width)[min(y, height - 1), min(x, width - 1)]
    return found


def score_priors(priors: pa.Table, labels: LabeledMasks) -> dict[str, object]:
    """Scores of the first response to each labeled sentence, over all of them and per source.

    Keys, in percent of the labeled sentences unless noted; a missing box or place counts as wrong:

    - labeled, labeled_without_prior: numbers of sentences, and of those whose prior has no place
    - box_acc50, box_miou: share of boxes with IoU of at least 0.5 with the true mask's box, and mean IoU; null if no
      prior has a box
    - mask_miou: mean IoU of the masks with the true masks; null if no prior has a mask
    - pointing_acc: share whose point, or else the box's center, lies in the true mask; null if no prior has a place
    - score_auroc: how well the model's own score ranks masks, or else boxes, with IoU above 0.5 before others; null if
      undefined
    - by_source: the same for each `backend model`, only if there are several
    """
    columns = ["sent_id", "sample_index", "backend", "model", "bbox", "point", "mask", "score"]
    first = records.to_frame(priors.select(columns))
    rows = first[first["sample_index"] == 0].set_index("sent_id").reindex(labels.sent_id)
    box = _columns(rows["bbox"], 4)
    point = _columns(rows["point"], 2)
    point = np.where(np.isnan(point), (box[:, :2] + box[:, 2:]) / 2, point)
    table = pd.DataFrame(
        {
            "source": (rows["backend"].fillna("") + " " + rows["model"].fillna("")).to_numpy(),
            "has_model": (rows["model"].fillna("") != "").to_numpy(),
            "has_box": ~np.isnan(box[:, 0]),
            "is_located": ~np.isnan(point[:, 0]),
            "has_mask": rows["mask"].notna().to_numpy(),
            "box_iou": np.nan_to_num(iou_xyxy(np.nan_to_num(box), labels.box_xyxy)),
            "mask_iou": _mask_iou(rows["mask"], labels),
            "hit": hits(point, labels),
            "score": rows["score"].to_numpy(np.float64),
        }
    )
    scores: dict[str, object] = {**_prior_scores(table)}
    sources = table[table["has_model"]].groupby("source")
    if sources.ngroups > 1:  # recorded responses of several models
        scores["by_source"] = {str(source): _prior_scores(rows) for source, rows in sources}
    return scores


def score_proposals(proposals: pa.Table, labels: LabeledMasks) -> Scores:
    """Scores of the proposals, cut at 0.5 at the image's size, on the labeled sentences.

    Keys: labeled, labeled_without_prior (numbers; without a prior nothing is above 0.5, and the IoU is 0), miou (mean
    IoU with the true masks, in percent; null without labels), score_auroc (how well the proposal's score ranks IoU
    above 0.5 before the rest; null if undefined).
    """
    frame = records.to_frame(proposals).set_index("sent_id").loc[labels.sent_id]
    cuts = [
        cut_proposal(np.frombuffer(soft, np.uint8).reshape(side_hw), height, width)
        for soft, side_hw, (height, width) in zip(
            frame["soft"], frame[["height", "width"]].to_numpy().tolist(), labels.image_hw.tolist(), strict=True
        )
    ]
    iou = iou_from_px(*intersection_union_px(cuts, labels.rle, labels.image_hw).T) if cuts else np.zeros(0)
    score = frame["score"].to_numpy(np.float64)
    return {
        "labeled": len(iou),
        "labeled_without_prior": int((score == 0).sum()),
        "miou": percent(iou),
        "score_auroc": _auroc(score, iou),
    }


def describe(scores: Mapping[str, object]) -> str:
    """Scores in one line: `box_acc50 89.0, box_miou 80.2, ...`; undefined ones are left out."""
    names = ("box_acc50", "box_miou", "mask_miou", "pointing_acc", "miou", "score_auroc")
    shown = [f"{name} {scores[name]:.1f}" for name in names if scores.get(name) is not None]
    return ", ".join([f"{scores['labeled']} labeled, {scores['labeled_without_prior']} without a prior", *shown])


def _prior_scores(table: pd.DataFrame) -> Scores:
    iou = table["mask_iou"].where(table["has_mask"], table["box_iou"])
    is_ranked = table["has_box"] & table["score"].notna()
    return {
        "labeled": len(table),
        "labeled_without_prior": int((~table["is_located"]).sum()),
        "box_acc50": percent(table["box_iou"] >= POSITIVE_IOU) if table["has_box"].any() else None,
        "box_miou": percent(table["box_iou"]) if table["has_box"].any() else None,
        "mask_miou": percent(table["mask_iou"]) if table["has_mask"].any() else None,
        "pointing_acc": percent(table["hit"]) if table["is_located"].any() else None,
        "score_auroc": _auroc(table.loc[is_ranked, "score"].to_numpy(), iou[is_ranked].to_numpy()),
    }


def _mask_iou(masks: pd.Series, labels: LabeledMasks) -> DoubleArray:
    """[N] IoU of masks (run lengths or null) with the true masks; 0 without a mask."""
    at = np.flatnonzero(masks.notna())
    own, iou = labels.take(at), np.zeros(len(masks))
    iou[at] = iou_from_px(*intersection_union_px(masks.iloc[at].tolist(), own.rle, own.image_hw).T)
    return iou


def percent(values: pd.Series | DoubleArray) -> float | None:
    """The mean of shares or IoU (0..1) in percent, to two digits; None without values."""
    return round(100 * float(np.mean(values)), 2) if len(values) else None


def _auroc(score: DoubleArray, iou: DoubleArray) -> float | None:
    """AUROC of a score for IoU above 0.5, in percent; None if all are right, all are wrong, or all scores are equal."""
    if len(np.unique(score)) < 2:
        return None
    ranked = auroc(score, iou > POSITIVE_IOU)
    return None if ranked is None else round(ranked, 2)


def _columns(column: pd.Series, length: int) -> DoubleArray:
    """A column of lists or nulls -> [N, length], NaN for null."""
    values = np.full((len(column), length), np.nan)
    for row, value in enumerate(column):
        if isinstance(value, np.ndarray):
            values[row] = value
    return values
