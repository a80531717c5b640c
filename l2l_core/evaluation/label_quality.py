"""Score pseudo-labels against the truth, if it is known: a row per label, metrics and curves per round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from l2l_core.artifacts import records
from l2l_core.core.masks import cut_proposal, decode_rle, intersection_union_px, rle_area_px_all, wrong_kept_px
from l2l_core.core.metrics import POSITIVE_IOU, auroc, iou_from_px, precision_by_coverage, reliability
from l2l_core.data.evolve import fuse
from l2l_core.evaluation.history import PSEUDO_LABEL_COLUMNS

LABEL_PX = ["wrong_px", "label_px", "false_px"]
KEPT_PX = ["kept_px", "kept_wrong_px", "kept_label_px", "kept_false_px"]
"""Columns of `score_pseudo_labels`: counts over the whole label, and over its valid pixels."""
PROPOSAL_IOU = ["prior_iou", "fused_iou"]
"""Columns of `score_pseudo_labels`: IoU of the prior's proposal, and of its fusion with the label."""

CURVE_POINTS = 20
"""Points of a precision-coverage curve: one every 5 %."""

RELIABILITY_BINS = 10


def score_pseudo_labels(
    pseudo_labels: pa.Table, refs: pa.Table, masks: pa.Table, proposals: pa.Table | records.TableParts
) -> pd.DataFrame:
    """Score pseudo-labels against the truth, which is hidden from the model; in the order of `pseudo_labels`.

    Columns round, sent_id, accepted, accept_prob, iou (NaN if the truth is unknown, like the next ones), size_px,
    wrong_px (wrong pixels of the whole label), label_px (its foreground), false_px (wrong ones among these);
    kept_px, kept_wrong_px, kept_label_px and kept_false_px count only the valid pixels (0 if rejected); prior_iou and
    fused_iou of the proposal and of its fusion with the label (`evolve.fuse`, weighted by accept_prob), both cut at 0.5
    (NaN without a proposal).
    """
    labels = records.to_frame(pseudo_labels.select(PSEUDO_LABEL_COLUMNS))
    known = records.to_frame(refs.select(["sent_id", "ann_id"])).merge(records.to_frame(masks), on="ann_id")
    true = known.set_index("sent_id").reindex(labels["sent_id"])
    scored = labels[["round", "sent_id", "accepted", "accept_prob"]].assign(
        **dict.fromkeys(["iou", "size_px", *LABEL_PX, *KEPT_PX, *PROPOSAL_IOU], np.nan)
    )
    rows = np.flatnonzero(true["rle_counts"].notna())
    sizes = labels[["height", "width"]].to_numpy(np.int64)
    wrong_size = (true[["height", "width"]].to_numpy()[rows] != sizes[rows]).any(axis=1)
    records.refuse_sentences(labels["sent_id"].iloc[rows[wrong_size]], "pseudo_labels: not of the image's size, at")
    label, truth = labels["rle_counts"].iloc[rows].tolist(), true["rle_counts"].iloc[rows].tolist()
    pixels = intersection_union_px(label, truth, sizes[rows])
    scored.loc[rows, "iou"] = iou_from_px(pixels[:, 0], pixels[:, 1])
    scored.loc[rows, "size_px"] = sizes[rows].prod(axis=1)
    label_px = rle_area_px_all(label, sizes[rows])
    found = np.stack([pixels[:, 1] - pixels[:, 0], label_px, label_px - pixels[:, 0]], axis=1)
    scored.loc[rows, LABEL_PX] = found.astype(np.float64)
    accepted = labels["accepted"].to_numpy(bool)[rows]
    scored.loc[rows, KEPT_PX] = 0.0
    taught = rows[accepted]
    keep, true_rle = labels["keep_rle"].iloc[taught].tolist(), true["rle_counts"].iloc[taught].tolist()
    scored.loc[taught, KEPT_PX] = _kept_px(labels["rle_counts"].iloc[taught].tolist(), true_rle, keep, sizes[taught])
    scored.loc[rows, PROPOSAL_IOU] = _proposal_iou(labels.iloc[rows], truth, proposals)
    return scored


def label_quality(labels: pd.DataFrame) -> dict[str, float]:
    """Flat metrics of each round's pseudo-labels (`score_pseudo_labels`), in percent with 2 decimals.

    pseudo_round_<k>_ coverage (sentences accepted), precision (accepted labels that are good), miou_all, miou_accepted,
    miou_rejected, pixel_error_all (wrong pixels of all labels), pixel_error_kept (the same among the accepted labels'
    valid pixels), foreground_error_all and foreground_error_kept (the same among the label's foreground pixels, 1 -
    their precision: most pixels are background, which is easy), auroc (how well accept_prob ranks good labels first),
    miou_prior and miou_fused (of all labels' proposals, and of their fusions with the labels).
    Undefined metrics are omitted: all but coverage if no truth is known, auroc if there is only one class.
    """
    metrics: dict[str, float] = {}
    for round_number, rows in labels.groupby("round"):
        known = rows[rows["iou"].notna()]
        accepted = known["accepted"].astype(bool)
        values = {
            "coverage": 100 * rows["accepted"].mean(),
            "precision": 100 * (known.loc[accepted, "iou"] > POSITIVE_IOU).mean(),
            "miou_all": 100 * known["iou"].mean(),
            "miou_accepted": 100 * known.loc[accepted, "iou"].mean(),
            "miou_rejected": 100 * known.loc[~accepted, "iou"].mean(),
            "pixel_error_all": _percent(known["wrong_px"], known["size_px"]),
            "pixel_error_kept": _percent(known["kept_wrong_px"], known["kept_px"]),
            "foreground_error_all": _percent(known["false_px"], known["label_px"]),
            "foreground_error_kept": _percent(known["kept_false_px"], known["kept_label_px"]),
            "auroc": auroc(known["accept_prob"], known["iou"] > POSITIVE_IOU),
            "miou_prior": 100 * known["prior_iou"].mean(),
            "miou_fused": 100 * known["fused_iou"].mean(),
        }
        defined = {name: float(value) for name, value in values.items() if value is not None and not np.isnan(value)}
        metrics |= {f"pseudo_round_{round_number}_{name}": round(value, 2) for name, value in defined.items()}
    return metrics


def quality_curve(quality: Mapping[str, float], last_round: int) -> pd.DataFrame:
    """`labels/rounds`: quality of the training data by round, one row per round with known truth; in percent.

    quality: from `label_quality`. Columns round, prior_miou, fused_miou, label_miou, kept_accuracy (right pixels among
    the accepted labels' valid pixels); NaN if undefined.
    """
    columns = {"prior_miou": "miou_prior", "fused_miou": "miou_fused", "label_miou": "miou_all"}
    rows = []
    for round_number in range(1, last_round + 1):
        scores = {name: quality.get(f"pseudo_round_{round_number}_{key}", np.nan) for name, key in columns.items()}
        error = quality.get(f"pseudo_round_{round_number}_pixel_error_kept", np.nan)
        if not np.isnan(scores["label_miou"]):
            rows.append({"round": round_number, **scores, "kept_accuracy": round(100 - error, 2)})
    return pd.DataFrame(rows, columns=["round", *columns, "kept_accuracy"])


def label_curves(labels: pd.DataFrame, last_round: int) -> dict[str, pd.DataFrame]:
    """`coverage/round_<k>` and `reliability/round_<k>` of the pseudo-labels with known truth; no row without any.

    A label above POSITIVE_IOU is correct. coverage: share of correct labels among the most trusted ones, against the
    share taken. reliability: share of correct labels against their accept_prob.
    """
    curves = {}
    for round_number in range(last_round + 1):
        rows = labels[(labels["round"] == round_number) & labels["iou"].notna()]
        correct = rows["iou"] > POSITIVE_IOU
        coverage = precision_by_coverage(rows["accept_prob"], correct, CURVE_POINTS)
        curves[f"coverage/round_{round_number}"] = coverage.round(2)
        bins = reliability(rows["accept_prob"], correct, RELIABILITY_BINS)
        curves[f"reliability/round_{round_number}"] = bins.round(2)
    return curves


def _proposal_iou(
    labels: pd.DataFrame, truth: Sequence[bytes], proposals: pa.Table | records.TableParts
) -> NDArray[np.float64]:
    """PROPOSAL_IOU of N pseudo-labels against their true masks, [N, 2]."""
    sizes, sent_id = labels[["height", "width"]].to_numpy(np.int64), labels["sent_id"].to_numpy(np.int64)
    rles, accept_prob = labels["rle_counts"].tolist(), labels["accept_prob"].tolist()
    by_sentence = np.argsort(sent_id, kind="stable")
    iou = np.full((len(labels), 2), np.nan)
    for part in records.parts_of(proposals):
        part_ids = part["sent_id"].to_numpy()
        first, end = (np.searchsorted(sent_id, part_ids, side, sorter=by_sentence) for side in ("left", "right"))
        cut: list[bytes] = []
        rows: list[int] = []
        chosen = np.flatnonzero(first < end)
        for given, place in zip(records.to_frame(part.take(chosen)).itertuples(), chosen, strict=True):
            proposal = np.frombuffer(given.soft, np.uint8).reshape(int(given.height), int(given.width))
            of_sentence = by_sentence[first[place] : end[place]].tolist()
            height, width = sizes[of_sentence[0]].tolist()
            cut_prior = cut_proposal(proposal, height, width)  # the same in every round
            for row in of_sentence:
                fused = fuse(proposal, decode_rle(rles[row], height, width), accept_prob[row])
                cut += [cut_prior, cut_proposal(fused, height, width)]
                rows.append(row)
        pixels = intersection_union_px(cut, [truth[row] for row in rows for _ in range(2)], sizes[rows].repeat(2, 0))
        iou[rows] = iou_from_px(pixels[:, 0], pixels[:, 1]).reshape(-1, 2)
    return iou


def _kept_px(
    label: Sequence[bytes], truth: Sequence[bytes], keep: Sequence[bytes], sizes_hw: NDArray[np.int64]
) -> NDArray[np.float64]:
    """KEPT_PX of N triples of masks, [N, 4]."""
    kept_wrong = wrong_kept_px(label, truth, keep, sizes_hw)
    kept_label = intersection_union_px(keep, label, sizes_hw)[:, 0]
    kept_truth = intersection_union_px(keep, truth, sizes_hw)[:, 0]
    # A wrong pixel is false foreground or missed foreground, and label - truth = false - missed.
    false = (kept_wrong[:, 1] + kept_label - kept_truth) // 2
    return np.column_stack([kept_wrong, kept_label, false]).astype(np.float64)


def _percent(part: pd.Series[float], whole: pd.Series[float]) -> float:
    total = float(whole.sum())
    return 100 * float(part.sum()) / total if total else float("nan")
