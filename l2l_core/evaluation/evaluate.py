"""Score predictions and pseudo-labels against the truth: one table row per sentence and method, and a summary.

Masks are compared at the image's original resolution; every evaluated sentence counts, for every method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from l2l_core.artifacts import records
from l2l_core.core.masks import cut_proposal, decode_rle, intersection_union_px, rle_area_px_all, wrong_kept_px
from l2l_core.core.metrics import (
    POSITIVE_IOU,
    auroc,
    iou_from_px,
    precision_by_coverage,
    reliability,
    segmentation_scores,
)
from l2l_core.data.evolve import fuse
from l2l_core.errors import ArtifactError, ConfigError, raise_all

CURVES_FOLDER = Path("plots")

PRIOR, SUPERVISED, DISTILLED = "prior", "supervised", "distilled"

LABEL_PX = ["wrong_px", "label_px", "false_px"]
KEPT_PX = ["kept_px", "kept_wrong_px", "kept_label_px", "kept_false_px"]
"""Columns of `score_pseudo_labels`: counts over the whole label, and over its valid pixels."""
PROPOSAL_IOU = ["prior_iou", "fused_iou"]
"""Columns of `score_pseudo_labels`: IoU of the prior's proposal, and of its fusion with the label."""

CURVE_POINTS = 20
"""Points of a precision-coverage curve: one every 5 %."""

RELIABILITY_BINS = 10

SHOWN_SENT_IDS = 5
"""Maximum number of sentences listed in an error; the rest is only counted."""


@dataclass(frozen=True)
class History:
    """Results of the rounds 0..k."""

    predictions: pa.Table  # records.PREDICTIONS of the supervised model, every round and the distilled model
    pseudo_labels: pa.Table  # records.PSEUDO_LABELS of the rounds 1..k
    training: pd.DataFrame  # model, step, loss and its parts
    policy: pd.DataFrame  # round, step, reward and more; no row without a trained policy


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation."""

    per_sentence: pa.Table  # records.PER_SENTENCE
    metrics: dict[str, float | int | str]  # flat; see `summarize`
    curves: dict[str, pd.DataFrame]  # by file name without extension: "rounds/val", "training/round_1", ...; the
    # same files for every dataset and policy, with a header and no row if nothing is known: DVC needs the folders


def read_history(folder: Path) -> History:
    """Read the history of a round. Raises ArtifactError if a part is missing."""
    return History(
        records.read_table(folder / "predictions.parquet", records.PREDICTIONS),
        records.read_table(folder / "pseudo_labels.parquet", records.PSEUDO_LABELS),
        _read_curve(folder / "training.csv", "model"),
        _read_curve(folder / "policy.csv", "round"),
    )


def evaluate(
    history: History,
    refs: pa.Table,
    masks: pa.Table,
    split: pa.Table,
    proposals: pa.Table,
    splits: Sequence[str],
    last_round: int,
    dataset_version: str | None = None,
) -> Evaluation:
    """Score everything in the history of round `last_round`.

    refs needs sent_id, ann_id, style and split; proposals need not cover sentences that are not evaluated.
    Raises ConfigError if `splits` has no sentence to evaluate, ArtifactError if a mask, a proposal or a prediction of a
    sentence is missing, duplicated or of the wrong size.
    """
    truth = evaluated_sentences(refs, masks, split, splits)
    per_sentence = score_predictions(truth, history.predictions, proposals, last_round)
    labels = score_pseudo_labels(history.pseudo_labels, refs, masks, proposals)
    frame = records.to_frame(per_sentence)
    head: dict[str, float | int | str] = {"evaluated_round": last_round}
    if dataset_version is not None:
        head["dataset_version"] = dataset_version
    quality = label_quality(labels)
    metrics = head | summarize(frame, last_round) | quality
    curves = round_curves(frame, last_round) | label_curves(labels, last_round)
    curves["labels/rounds"] = quality_curve(quality, last_round)
    for model, rows in history.training.groupby("model", sort=False):
        curves[f"training/{model}"] = rows.drop(columns="model")
    for number in range(last_round + 1):
        rows = history.policy[history.policy["round"] == number]
        curves[f"policy/round_{number}"] = rows.drop(columns="round")
    return Evaluation(per_sentence, metrics, curves)


def evaluated_sentences(refs: pa.Table, masks: pa.Table, split: pa.Table, splits: Sequence[str]) -> pd.DataFrame:
    """Truth of the sentences with role `eval`, by sent_id, in the order of `splits`, then of `refs`.

    Columns split, style, height, width, rle_counts, area_px.
    """
    roles = records.to_frame(split)
    chosen = records.to_frame(refs.select(["sent_id", "ann_id", "style", "split"]))
    chosen = chosen[chosen["sent_id"].isin(roles.loc[roles["role"] == "eval", "sent_id"])]
    available = sorted(chosen["split"].unique())
    chosen = chosen[chosen["split"].isin(splits)]
    if chosen.empty:
        if not available:
            raise ConfigError(
                f"no held-out pair with a mask: assign some pairs to one of the splits {', '.join(splits)}"
            )
        raise ConfigError(
            f"evaluate.splits: got {', '.join(splits)}, expected some of {', '.join(available)}: "
            "these splits have held-out sentences"
        )
    chosen = chosen.sort_values("split", key=lambda names: names.map(list(splits).index), kind="stable")
    truth = chosen.merge(records.to_frame(masks), on="ann_id", how="left").set_index("sent_id")
    _require(truth.index[truth["rle_counts"].isna()], "masks: no true mask of")
    return truth.drop(columns="ann_id").astype({"height": np.int64, "width": np.int64, "area_px": np.int64})


def score_predictions(truth: pd.DataFrame, predictions: pa.Table, proposals: pa.Table, last_round: int) -> pa.Table:
    """Intersection, union and areas of every method on every sentence of `truth` (from `evaluated_sentences`).

    Methods, in order: prior (the proposal cut at 0.5), supervised, for each round round_<k> and round_<k>_no_prior,
    and distilled (without priors). Returns records.PER_SENTENCE.
    """
    sizes = truth[["height", "width"]].to_numpy(np.int64)
    found = dict(list(records.to_frame(predictions).groupby(["model", "with_prior"], sort=False)))
    masks = {PRIOR: _prior_masks(records.to_frame(proposals), truth)}
    for method, key in _methods(last_round).items():
        if key not in found:
            raise ArtifactError(f"predictions: none of model {key[0]} {'with' if key[1] else 'without'} priors")
        rows = _by_sentence(found[key], truth.index, f"predictions: {method}:")
        wrong_size = (rows[["height", "width"]].to_numpy(np.int64) != sizes).any(axis=1)
        _require(truth.index[wrong_size], f"predictions: {method}: not of the image's size, at")
        masks[method] = rows["rle_counts"].tolist()
    return pa.concat_tables(_method_rows(method, truth, rles, sizes) for method, rles in masks.items())


def score_pseudo_labels(pseudo_labels: pa.Table, refs: pa.Table, masks: pa.Table, proposals: pa.Table) -> pd.DataFrame:
    """Score pseudo-labels against the truth, which is hidden from the model; in the order of `pseudo_labels`.

    Columns round, sent_id, accepted, accept_prob, iou (NaN if the truth is unknown, like the next ones), size_px,
    wrong_px (wrong pixels of the whole label), label_px (its foreground), false_px (wrong ones among these);
    kept_px, kept_wrong_px, kept_label_px and kept_false_px count only the valid pixels (0 if rejected); prior_iou and
    fused_iou of the proposal and of its fusion with the label (`evolve.fuse`, weighted by accept_prob), both cut at 0.5
    (NaN without a proposal).
    """
    labels = records.to_frame(pseudo_labels)
    known = records.to_frame(refs.select(["sent_id", "ann_id"])).merge(records.to_frame(masks), on="ann_id")
    true = known.set_index("sent_id").reindex(labels["sent_id"])
    scored = labels[["round", "sent_id", "accepted", "accept_prob"]].assign(
        **dict.fromkeys(["iou", "size_px", *LABEL_PX, *KEPT_PX, *PROPOSAL_IOU], np.nan)
    )
    rows = np.flatnonzero(true["rle_counts"].notna())
    sizes = labels[["height", "width"]].to_numpy(np.int64)
    wrong_size = (true[["height", "width"]].to_numpy()[rows] != sizes[rows]).any(axis=1)
    _require(labels["sent_id"].iloc[rows[wrong_size]], "pseudo_labels: not of the image's size, at")
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
    scored.loc[rows, PROPOSAL_IOU] = _proposal_iou(labels.iloc[rows], truth, records.to_frame(proposals))
    return scored


def _proposal_iou(labels: pd.DataFrame, truth: Sequence[bytes], proposals: pd.DataFrame) -> NDArray[np.float64]:
    """PROPOSAL_IOU of N pseudo-labels against their true masks, [N, 2]."""
    maps = proposals.set_index("sent_id").reindex(labels["sent_id"])
    rows = np.flatnonzero(maps["soft"].notna())
    sizes = labels[["height", "width"]].to_numpy(np.int64)
    cut: list[bytes] = []
    cut_priors: dict[int, bytes] = {}  # the same in every round
    for label, given in zip(labels.iloc[rows].itertuples(), maps.iloc[rows].itertuples(), strict=True):
        proposal = np.frombuffer(given.soft, np.uint8).reshape(int(given.height), int(given.width))
        if label.sent_id not in cut_priors:
            cut_priors[label.sent_id] = cut_proposal(proposal, label.height, label.width)
        fused = fuse(proposal, decode_rle(label.rle_counts, label.height, label.width), label.accept_prob)
        cut += [cut_priors[label.sent_id], cut_proposal(fused, label.height, label.width)]
    pixels = intersection_union_px(cut, np.repeat(np.array(truth, object)[rows], 2).tolist(), sizes[rows].repeat(2, 0))
    iou = np.full((len(labels), 2), np.nan)
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


def summarize(per_sentence: pd.DataFrame, last_round: int) -> dict[str, float | int | str]:
    """Flat metrics of the per-sentence table, in percent with 2 decimals; counts are whole numbers.

    For each split: n_<split>; for the model of `last_round` <split>_{miou, oiou, pr50 .. pr90} and
    <split>_no_prior_{miou, oiou}; for the model distilled from it, which runs without priors, <split>_distilled_{miou,
    oiou, pr50 .. pr90}; and for comparison the mIoU <split>_{prior, supervised, round_0, ..}_miou.
    """
    metrics: dict[str, float | int | str] = {}
    final = f"round_{last_round}"
    for split, rows in per_sentence.groupby("split", sort=False):
        scores = method_scores(rows)
        metrics[f"n_{split}"] = int((rows["method"] == final).sum())
        metrics |= {f"{split}_{name}": value for name, value in scores[final].items()}
        metrics |= {f"{split}_no_prior_{name}": scores[f"{final}_no_prior"][name] for name in ("miou", "oiou")}
        metrics |= {f"{split}_{DISTILLED}_{name}": value for name, value in scores[DISTILLED].items()}
        methods = [PRIOR, SUPERVISED, *(f"round_{number}" for number in range(last_round + 1))]
        metrics |= {f"{split}_{method}_miou": scores[method]["miou"] for method in methods}
    return metrics


def method_scores(per_sentence: pd.DataFrame) -> dict[str, dict[str, float]]:
    """`metrics.segmentation_scores` of each method in the given rows of the per-sentence table, with 2 decimals."""
    return {
        str(method): _rounded(segmentation_scores(rows["intersection_px"], rows["union_px"]))
        for method, rows in per_sentence.groupby("method", sort=False)
    }


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
    for number, rows in labels.groupby("round"):
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
        metrics |= {f"pseudo_round_{number}_{name}": value for name, value in _rounded(defined).items()}
    return metrics


def round_curves(per_sentence: pd.DataFrame, last_round: int) -> dict[str, pd.DataFrame]:
    """`rounds/<split>`: one row per round: its scores, and the constant ones of the supervised model and the prior."""
    curves = {}
    for split, rows in per_sentence.groupby("split", sort=False):
        scores = method_scores(rows)
        lines = {f"{method}_miou": scores[method]["miou"] for method in (SUPERVISED, PRIOR)}
        curves[f"rounds/{split}"] = pd.DataFrame(
            {
                "round": number,
                **scores[f"round_{number}"],
                "no_prior_miou": scores[f"round_{number}_no_prior"]["miou"],
                **lines,
            }
            for number in range(last_round + 1)
        )
    return curves


def quality_curve(quality: Mapping[str, float], last_round: int) -> pd.DataFrame:
    """`labels/rounds`: quality of the training data by round, one row per round with known truth; in percent.

    quality: from `label_quality`. Columns round, prior_miou, fused_miou, label_miou, kept_accuracy (right pixels among
    the accepted labels' valid pixels); NaN if undefined.
    """
    columns = {"prior_miou": "miou_prior", "fused_miou": "miou_fused", "label_miou": "miou_all"}
    rows = []
    for number in range(1, last_round + 1):
        scores = {name: quality.get(f"pseudo_round_{number}_{key}", np.nan) for name, key in columns.items()}
        error = quality.get(f"pseudo_round_{number}_pixel_error_kept", np.nan)
        if not np.isnan(scores["label_miou"]):
            rows.append({"round": number, **scores, "kept_accuracy": round(100 - error, 2)})
    return pd.DataFrame(rows, columns=["round", *columns, "kept_accuracy"])


def label_curves(labels: pd.DataFrame, last_round: int) -> dict[str, pd.DataFrame]:
    """`coverage/round_<k>` and `reliability/round_<k>` of the pseudo-labels with known truth; no row without any.

    A label above POSITIVE_IOU is correct. coverage: share of correct labels among the most trusted ones, against the
    share taken. reliability: share of correct labels against their accept_prob.
    """
    curves = {}
    for number in range(last_round + 1):
        rows = labels[(labels["round"] == number) & labels["iou"].notna()]
        correct = rows["iou"] > POSITIVE_IOU
        curves[f"coverage/round_{number}"] = precision_by_coverage(rows["accept_prob"], correct, CURVE_POINTS).round(2)
        curves[f"reliability/round_{number}"] = reliability(rows["accept_prob"], correct, RELIABILITY_BINS).round(2)
    return curves


def _methods(last_round: int) -> dict[str, tuple[str, bool]]:
    """Method -> (model, with_prior) of the predictions required by an evaluation."""
    methods = {SUPERVISED: (SUPERVISED, False)}
    for number in range(last_round + 1):
        methods[f"round_{number}"] = (f"round_{number}", True)
        methods[f"round_{number}_no_prior"] = (f"round_{number}", False)
    return methods | {DISTILLED: (DISTILLED, False)}


def _prior_masks(proposals: pd.DataFrame, truth: pd.DataFrame) -> list[bytes]:
    """The proposals of the sentences, resized to the image and cut at 0.5."""
    rows = _by_sentence(proposals[proposals["sent_id"].isin(truth.index)], truth.index, "proposals:")
    columns = (rows["soft"], rows["height"], rows["width"], truth["height"], truth["width"])
    return [
        cut_proposal(np.frombuffer(soft, np.uint8).reshape(map_height, map_width), height, width)
        for soft, map_height, map_width, height, width in zip(*(column.tolist() for column in columns), strict=True)
    ]


def _by_sentence(rows: pd.DataFrame, sent_ids: pd.Index[int], what: str) -> pd.DataFrame:
    """The rows of the given sentences, in their order. Raises ArtifactError unless each has exactly one."""
    _require(rows.loc[rows["sent_id"].duplicated(), "sent_id"], f"{what} more than one row of")
    by_sentence = rows.set_index("sent_id")
    _require(sent_ids.difference(by_sentence.index), f"{what} none of")
    return by_sentence.loc[sent_ids]


def _require(offenders: pd.Index[int] | pd.Series[int], problem: str) -> None:
    """Raise ArtifactError if a problem has offenders (sent_ids)."""
    ids = [str(sent_id) for sent_id in offenders[:SHOWN_SENT_IDS]]
    more = f" and {len(offenders) - len(ids)} more" if len(offenders) > len(ids) else ""
    raise_all([f"{problem} sent_id {', '.join(ids)}{more}; run dvc repro"] if ids else [], ArtifactError)


def _method_rows(method: str, truth: pd.DataFrame, rles: Sequence[bytes], sizes_hw: NDArray[np.int64]) -> pa.Table:
    pixels = intersection_union_px(rles, truth["rle_counts"].tolist(), sizes_hw)
    intersection, union, gt_area = pixels[:, 0], pixels[:, 1], truth["area_px"].to_numpy(np.int64)
    columns = {
        "method": [method] * len(truth),
        "sent_id": truth.index.to_numpy(),
        "split": truth["split"],
        "style": truth["style"],
        "intersection_px": intersection,
        "union_px": union,
        "pred_area_px": union - gt_area + intersection,
        "gt_area_px": gt_area,
        "iou": iou_from_px(intersection, union).astype(np.float32),
    }
    return pa.table(columns, schema=records.PER_SENTENCE)


def _read_curve(path: Path, by: str) -> pd.DataFrame:
    try:
        curve = pd.read_csv(path)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: not found, run the stage that writes it: dvc repro") from None
    except (ValueError, UnicodeDecodeError) as error:  # pandas' parser errors are ValueErrors
        raise ArtifactError(f"{path}: not a CSV file: {error}") from None
    if by not in curve or "step" not in curve:
        raise ArtifactError(f"{path}: columns {list(curve)}, expected {by} and step among them")
    return curve


def _percent(part: pd.Series[float], whole: pd.Series[float]) -> float:
    total = float(whole.sum())
    return 100 * float(part.sum()) / total if total else float("nan")


def _rounded(scores: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in scores.items()}
