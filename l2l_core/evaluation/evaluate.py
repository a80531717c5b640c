"""Score all rounds against the truth: one table row per sentence and method, metrics and curves.

Masks are compared at the image's original resolution; every evaluated sentence counts, for every method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from l2l_core.artifacts import records
from l2l_core.core.masks import cut_proposal, intersection_union_px
from l2l_core.core.metrics import iou_from_px, segmentation_scores
from l2l_core.errors import ArtifactError, ConfigError
from l2l_core.evaluation.history import History
from l2l_core.evaluation.label_quality import label_curves, label_quality, quality_curve, score_pseudo_labels

CURVES_FOLDER = Path("plots")

PRIOR, SUPERVISED, DISTILLED = "prior", "supervised", "distilled"


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation."""

    per_sentence: pa.Table  # records.PER_SENTENCE
    metrics: dict[str, float | int | str]  # flat; see `summarize`
    curves: dict[str, pd.DataFrame]  # by file name without extension: "rounds/val", "training/round_1", ...; the
    # same files for every dataset and policy, with a header and no row if nothing is known: DVC needs the folders


def evaluate(
    history: History,
    refs: pa.Table,
    masks: pa.Table,
    split: pa.Table,
    proposals: pa.Table | records.TableParts,
    splits: Sequence[str],
    last_round: int,
    dataset_version: str | None = None,
) -> Evaluation:
    """Score everything in the history of round `last_round`.

    refs needs sent_id, ann_id, style and split; proposals need not cover sentences that are not evaluated. Memory holds
    one part of the proposals and one method's masks at a time.
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
    for round_number in range(last_round + 1):
        rows = history.policy[history.policy["round"] == round_number]
        curves[f"policy/round_{round_number}"] = rows.drop(columns="round")
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
    records.refuse_sentences(truth.index[truth["rle_counts"].isna()], "masks: no true mask of")
    return truth.drop(columns="ann_id").astype({"height": np.int64, "width": np.int64, "area_px": np.int64})


def score_predictions(
    truth: pd.DataFrame, predictions: pa.Table, proposals: pa.Table | records.TableParts, last_round: int
) -> pa.Table:
    """Intersection, union and areas of every method on every sentence of `truth` (from `evaluated_sentences`).

    Methods, in order: prior (the proposal cut at 0.5), supervised, for each round round_<k> and round_<k>_no_prior,
    and distilled (without priors). Returns records.PER_SENTENCE.
    """
    sizes = truth[["height", "width"]].to_numpy(np.int64)
    scored = [_method_rows(PRIOR, truth, _prior_masks(proposals, truth), sizes)]
    for method, (model, with_prior) in _methods(last_round).items():
        is_method = pc.equal(predictions["model"], model)
        is_method = pc.and_(is_method, pc.equal(predictions["with_prior"], with_prior))
        found = records.to_frame(predictions.filter(is_method))
        if found.empty:
            raise ArtifactError(f"predictions: none of model {model} {'with' if with_prior else 'without'} priors")
        rows = _by_sentence(found, truth.index, f"predictions: {method}:")
        wrong_size = (rows[["height", "width"]].to_numpy(np.int64) != sizes).any(axis=1)
        records.refuse_sentences(truth.index[wrong_size], f"predictions: {method}: not of the image's size, at")
        scored.append(_method_rows(method, truth, rows["rle_counts"].tolist(), sizes))
    return pa.concat_tables(scored)


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
        methods = [PRIOR, SUPERVISED, *(f"round_{round_number}" for round_number in range(last_round + 1))]
        metrics |= {f"{split}_{method}_miou": scores[method]["miou"] for method in methods}
    return metrics


def method_scores(per_sentence: pd.DataFrame) -> dict[str, dict[str, float]]:
    """`metrics.segmentation_scores` of each method in the given rows of the per-sentence table, with 2 decimals."""
    return {
        str(method): _rounded(segmentation_scores(rows["intersection_px"], rows["union_px"]))
        for method, rows in per_sentence.groupby("method", sort=False)
    }


def round_curves(per_sentence: pd.DataFrame, last_round: int) -> dict[str, pd.DataFrame]:
    """`rounds/<split>`: one row per round: its scores, and the constant ones of the supervised model and the prior."""
    curves = {}
    for split, rows in per_sentence.groupby("split", sort=False):
        scores = method_scores(rows)
        lines = {f"{method}_miou": scores[method]["miou"] for method in (SUPERVISED, PRIOR)}
        curves[f"rounds/{split}"] = pd.DataFrame(
            {
                "round": round_number,
                **scores[f"round_{round_number}"],
                "no_prior_miou": scores[f"round_{round_number}_no_prior"]["miou"],
                **lines,
            }
            for round_number in range(last_round + 1)
        )
    return curves


def _methods(last_round: int) -> dict[str, tuple[str, bool]]:
    """Method -> (model, with_prior) of the predictions required by an evaluation."""
    methods = {SUPERVISED: (SUPERVISED, False)}
    for round_number in range(last_round + 1):
        methods[f"round_{round_number}"] = (f"round_{round_number}", True)
        methods[f"round_{round_number}_no_prior"] = (f"round_{round_number}", False)
    return methods | {DISTILLED: (DISTILLED, False)}


def _prior_masks(proposals: pa.Table | records.TableParts, truth: pd.DataFrame) -> list[bytes]:
    """The proposals of the sentences, resized to the image and cut at 0.5."""
    sizes = truth[["height", "width"]].to_numpy(np.int64).tolist()
    masks: dict[int, bytes] = {}  # by row of `truth`
    repeated: list[int] = []
    for part in records.parts_of(proposals):
        rows = truth.index.get_indexer(part["sent_id"].to_numpy())
        chosen = records.to_frame(part.filter(pa.array(rows >= 0)))
        for row, given in zip(rows[rows >= 0].tolist(), chosen.itertuples(), strict=True):
            if row in masks:
                repeated.append(row)
            soft = np.frombuffer(given.soft, np.uint8).reshape(int(given.height), int(given.width))
            masks[row] = cut_proposal(soft, *sizes[row])
    records.refuse_sentences(truth.index[repeated], "proposals: more than one row of")
    missing = [row for row in range(len(truth)) if row not in masks]
    records.refuse_sentences(truth.index[missing], "proposals: none of")
    return [masks[row] for row in range(len(truth))]


def _by_sentence(rows: pd.DataFrame, sent_ids: pd.Index[int], what: str) -> pd.DataFrame:
    """The rows of the given sentences, in their order. Raises ArtifactError unless each has exactly one."""
    records.refuse_sentences(rows.loc[rows["sent_id"].duplicated(), "sent_id"], f"{what} more than one row of")
    by_sentence = rows.set_index("sent_id")
    records.refuse_sentences(sent_ids.difference(by_sentence.index), f"{what} none of")
    return by_sentence.loc[sent_ids]


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


def _rounded(scores: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in scores.items()}
