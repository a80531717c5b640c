"""Example cases: choose the sentences that a report shows, by kind, and draw their pictures."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from l2l_core.artifacts import records
from l2l_core.config import ProposalsParams
from l2l_core.core.masks import BoolMask, decode_rle, intersection_union_px
from l2l_core.core.metrics import iou_from_px
from l2l_core.evaluation.error_analysis import OUTCOMES, outcomes, size_limits, sizes
from l2l_core.viz import overlays

PANEL_PX = 224
"""Longer side of a picture: six fit in a row on a laptop, and a hundred cases stay near ten megabytes."""

CHANGED_SHARE = 0.1
"""Changed cases are drawn from this share of the sentences, not only from the most changed ones."""

UNKNOWN = "unknown"
"""Size of an object without a true mask."""

Titled = tuple[str, overlays.Picture]


@dataclass(frozen=True)
class Run:
    """The tables that a report shows, as data frames; `records` defines their columns.

    Columns that the report does not read may be missing. Soft maps are read part by part: only a few are shown.
    """

    images: pd.DataFrame
    refs: pd.DataFrame
    masks: pd.DataFrame
    split: pd.DataFrame
    priors: pd.DataFrame
    proposals: records.TableParts
    rendering: ProposalsParams
    predictions: pd.DataFrame  # with priors, of the last round and the one before
    pseudo_labels: pd.DataFrame  # likewise
    per_sentence: pd.DataFrame
    metrics: Mapping[str, float | int | str]
    prior_scores: Mapping[str, Any]  # metrics/priors.json
    proposal_scores: Mapping[str, float | int | None]  # as `priors.scores.score_proposals`
    curves: Mapping[str, pd.DataFrame]  # as `evaluate.Evaluation.curves`
    last_round: int


@dataclass(frozen=True)
class Panel:
    """One picture of a case."""

    title: str
    alt: str
    source: str  # data URI
    width: int
    height: int


@dataclass(frozen=True)
class Case:
    """One sentence, its facts, and its pictures."""

    sentence: str
    split: str
    style: str
    size: str  # a name in error_analysis.SIZES, or UNKNOWN
    facts: list[str]
    panels: list[Panel]


@dataclass(frozen=True)
class Gallery:
    """Cases of one kind."""

    anchor: str
    title: str
    about: str
    cases: list[Case]


def area_share(run: Run) -> pd.Series[float]:
    """Share of the image, 0..1, covered by each sentence's object, by sent_id; only if its truth is known."""
    known = run.refs[["sent_id", "ann_id"]].merge(run.masks, on="ann_id").set_index("sent_id")
    return known["area_px"] / (known["height"] * known["width"])


def evaluated_size_limits(run: Run) -> tuple[float, float]:
    """Shares of the image area that cut the evaluated sentences' objects into thirds, the same in every split."""
    return size_limits(area_share(run).reindex(run.per_sentence["sent_id"].unique()))


def make_galleries(run: Run, count: int, read_image: Callable[[str], overlays.Picture]) -> list[Gallery]:
    """At most `count` cases of every kind: labels accepted, rejected and changed, predictions changed and by outcome.

    read_image: file_name of the images table -> [H, W, 3] uint8 RGB.
    """
    plans = list(_plan(run, count))
    sent_ids = np.unique(np.concatenate([plan.rows["sent_id"].to_numpy(np.int64) for plan in plans]))
    cases = _Cases(run, soft_maps(run.proposals, sent_ids), read_image)
    return [Gallery(plan.anchor, plan.title, plan.about, list(plan.draw(cases, plan.rows))) for plan in plans]


@dataclass(frozen=True)
class _Plan:
    """A gallery whose cases are chosen, but not drawn."""

    anchor: str
    title: str
    about: str
    draw: Callable[[_Cases, pd.DataFrame], Iterator[Case]]
    rows: pd.DataFrame


def _plan(run: Run, count: int) -> Iterator[_Plan]:
    image_ids = run.refs[["sent_id", "image_id"]]
    round_number, final = run.last_round, f"round_{run.last_round}"
    spread_over = "evenly picked from the lowest to the highest"
    if round_number:
        labels = run.pseudo_labels[run.pseudo_labels["round"] == round_number].merge(image_ids, on="sent_id")
        for anchor, teach, accepted in (("accepted", "They teach", True), ("rejected", "They teach nothing", False)):
            about = f"{teach}. Labels of round {round_number}, {spread_over} probability of acceptance."
            chosen = spread(labels[labels["accepted"] == accepted], "accept_prob", count)
            yield _Plan(anchor, f"{anchor.capitalize()} pseudo-labels", about, _Cases.of_labels, chosen)
    most = f"Out of the {100 * CHANGED_SHARE:g} % that differ most"
    share = f"{most} from round {round_number - 1}, {spread_over} agreement."
    if round_number > 1:
        both = _two_rounds(labels, run.pseudo_labels[run.pseudo_labels["round"] == round_number - 1])
        chosen = _most_changed(both, count)
        yield _Plan("changed-labels", "Changed pseudo-labels", share, _Cases.of_changed_labels, chosen)
    scored = run.per_sentence[run.per_sentence["method"] == final].merge(image_ids, on="sent_id")
    scored = scored.assign(outcome=outcomes(scored))
    if round_number:
        with_prior = run.predictions[run.predictions["with_prior"]]
        now, before = (with_prior[with_prior["model"] == f"round_{k}"] for k in (round_number, round_number - 1))
        both = _two_rounds(now.merge(scored[["sent_id", "image_id"]], on="sent_id"), before)
        chosen = _most_changed(both, count)
        yield _Plan("changed", "Changed predictions", share, _Cases.of_changed_predictions, chosen)
    for outcome, rule in OUTCOMES.items():
        rows = scored[scored["outcome"] == outcome]
        about = f"{rule} {len(rows):,} of {len(scored):,} evaluated sentences; {spread_over} IoU."
        anchor, title = outcome.replace(" ", "-"), f"Predictions: {outcome}"
        yield _Plan(anchor, title, about, _Cases.of_predictions, spread(rows, "iou", count))


def soft_maps(proposals: pa.Table | records.TableParts, sent_ids: NDArray[np.int64]) -> dict[int, NDArray[np.uint8]]:
    """The soft maps of some sentences, by sent_id, 0..255."""
    maps = {}
    for part in records.parts_of(proposals):
        chosen = part.filter(pa.array(np.isin(part["sent_id"].to_numpy(), sent_ids)))
        for row in records.to_frame(chosen).itertuples():
            maps[row.sent_id] = np.frombuffer(row.soft, np.uint8).reshape(row.height, row.width)
    return maps


def spread(candidates: pd.DataFrame, by: str, count: int) -> pd.DataFrame:
    """At most `count` rows, evenly spaced from the lowest to the highest value of column `by`, each of another image.

    candidates also has the columns image_id and sent_id. The choice does not depend on their order.
    """
    shuffled = candidates.sort_values("sent_id").sample(frac=1, random_state=0)  # no sentence of an image is preferred
    one_an_image = shuffled.drop_duplicates("image_id")
    ordered = one_an_image.sort_values([by, "sent_id"])
    rows = np.unique(np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int))
    return ordered.iloc[rows]


def _two_rounds(now: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
    """Masks of two rounds for the same sentences: columns of `before` end in _before; agreement is the IoU of both."""
    both = now.merge(before, on="sent_id", suffixes=("", "_before"))
    sizes_hw = both[["height", "width"]].to_numpy(np.int64)
    pixels = intersection_union_px(both["rle_counts_before"].tolist(), both["rle_counts"].tolist(), sizes_hw)
    return both.assign(agreement=iou_from_px(pixels[:, 0], pixels[:, 1]))


def _most_changed(both: pd.DataFrame, count: int) -> pd.DataFrame:
    changed = both[both["agreement"] < 1]
    most = changed.nsmallest(max(count, round(CHANGED_SHARE * len(both))), ["agreement", "sent_id"])
    return spread(most, "agreement", count)


class _Cases:
    """Draws the cases: the image, the priors, and the masks of a sentence."""

    def __init__(
        self, run: Run, soft: Mapping[int, NDArray[np.uint8]], read_image: Callable[[str], overlays.Picture]
    ) -> None:
        columns = ["sent_id", "image_id", "ann_id", "sentence", "style", "split"]
        self._sizes = sizes(area_share(run), evaluated_size_limits(run))
        self._where = run.refs[columns].merge(run.images, on="image_id").set_index("sent_id")
        self._read_image = read_image
        self._last_round = run.last_round
        self._truth = run.masks.set_index("ann_id")["rle_counts"]
        self._priors = run.priors
        self._soft = soft
        predictions = run.predictions[run.predictions["model"] == f"round_{run.last_round}"]
        self._predictions = predictions[predictions["with_prior"]].set_index("sent_id")["rle_counts"]

    def of_labels(self, labels: pd.DataFrame) -> Iterator[Case]:
        """Pseudo-labels of some rows of records.PSEUDO_LABELS."""
        for row in labels.itertuples():
            image, panels, truth = self._common(row.sent_id)
            mask, keep = (decode_rle(rle, row.height, row.width) for rle in (row.rle_counts, row.keep_rle))
            panels += [(f"label ({row.candidate})" + _if_empty(mask), overlays.with_mask(image, mask))]
            panels += [("kept pixels" if row.accepted else "kept pixels: none", overlays.with_kept(image, mask, keep))]
            facts = [f"acceptance {row.accept_prob:.2f}", f"confidence {row.confidence:.2f}"]
            facts += [f"IoU with the proposal {row.prior_iou:.2f}"]
            if truth is not None:
                panels += [("mask against truth", overlays.with_errors(image, mask, truth))]
                facts = [f"IoU {_iou(mask, truth):.2f}", *facts]
            yield self._case(row.sent_id, facts, panels)

    def of_changed_labels(self, labels: pd.DataFrame) -> Iterator[Case]:
        """Pseudo-labels of the last round next to those of the previous round (from `_two_rounds`)."""
        for row in labels.itertuples():
            names = [f"label ({candidate})" for candidate in (row.candidate_before, row.candidate)]
            verdicts = ((row.accepted_before, row.accept_prob_before), (row.accepted, row.accept_prob))
            said = [f"{'accepted' if accepted else 'rejected'} with {prob:.2f}" for accepted, prob in verdicts]
            yield self._changed(row, names, said)

    def of_changed_predictions(self, predictions: pd.DataFrame) -> Iterator[Case]:
        """Predictions of the last round next to those of the previous round (from `_two_rounds`)."""
        for row in predictions.itertuples():
            yield self._changed(row, ["prediction", "prediction"], ["", ""])

    def of_predictions(self, scored: pd.DataFrame) -> Iterator[Case]:
        """Predictions of the final model for some rows of records.PER_SENTENCE."""
        for row in scored.itertuples():
            image, panels, truth = self._common(row.sent_id)
            assert truth is not None  # only sentences with a true mask are evaluated
            mask = decode_rle(self._predictions[row.sent_id], *truth.shape)
            panels += [("prediction" + _if_empty(mask), overlays.with_mask(image, mask))]
            panels += [("truth", overlays.with_mask(image, truth))]
            panels += [("prediction against truth", overlays.with_errors(image, mask, truth))]
            yield self._case(row.sent_id, [f"IoU {row.iou:.2f}"], panels)

    def _changed(self, row: Any, names: Sequence[str], said: Sequence[str]) -> Case:
        """A row of `_two_rounds`; names and said: a title and a remark for the mask of each round."""
        image, panels, truth = self._common(row.sent_id)
        rounds = self._last_round - 1, self._last_round
        masks = [decode_rle(rle, row.height, row.width) for rle in (row.rle_counts_before, row.rle_counts)]
        shown, compared, facts = panels[:2], [], [f"IoU of both rounds {row.agreement:.2f}"]
        for round_number, mask, name, more in zip(rounds, masks, names, said, strict=True):
            shown += [(f"round {round_number}: {name}" + _if_empty(mask), overlays.with_mask(image, mask))]
            known = [] if truth is None else [f"IoU {_iou(mask, truth):.2f}"]
            if truth is not None:
                compared += [(f"round {round_number} against truth", overlays.with_errors(image, mask, truth))]
            facts += [f"round {round_number}: {', '.join(filter(None, [*known, more]))}"]
        return self._case(row.sent_id, facts, [*shown, *compared])

    def _common(self, sent_id: int) -> tuple[overlays.Picture, list[Titled], BoolMask | None]:
        """The image at the size of a panel, the first panels of a case, and the true mask if known."""
        where = self._where.loc[sent_id]
        image = overlays.fit(self._read_image(where["file_name"]), PANEL_PX)
        responses = self._priors[self._priors["sent_id"] == sent_id]
        height, width = int(where["height"]), int(where["width"])
        size = np.array([width, height], np.float64)
        masks = [decode_rle(mask, height, width) for mask in responses["mask"] if mask is not None]
        placed = responses[responses["mask"].isna()]  # a mask shows more than its box
        boxes = [np.asarray(box, np.float64) / np.tile(size, 2) for box in placed["bbox"] if box is not None]
        points = [np.asarray(point, np.float64) / size for point in placed["point"] if point is not None]
        prior = overlays.with_outlines(overlays.with_boxes(image, boxes, points), masks)
        named = next((f": “{target}”" for target in responses["target"] if target), "")
        panels = [
            ("image", image),
            (f"prior{named}" if masks or boxes or points else "prior: no response", prior),
            ("proposal", overlays.with_soft_map(image, self._soft[sent_id])),
        ]
        truth = self._truth.get(where["ann_id"])
        known = None if truth is None else decode_rle(truth, height, width)
        return image, panels, known

    def _case(self, sent_id: int, facts: list[str], panels: Sequence[Titled]) -> Case:
        where = self._where.loc[sent_id]
        shown = [
            Panel(title, f"{title}: {where['sentence']}", _data_uri(picture), picture.shape[1], picture.shape[0])
            for title, picture in panels
        ]
        size = str(self._sizes.get(sent_id, UNKNOWN))
        about = [*facts, where["split"], f"sentence {sent_id}", Path(where["file_name"]).name]
        return Case(where["sentence"], where["split"], where["style"], size, about, shown)


def _iou(mask: BoolMask, truth: BoolMask) -> float:
    return float(iou_from_px([(mask & truth).sum()], [(mask | truth).sum()])[0])


def _if_empty(mask: BoolMask) -> str:
    return "" if mask.any() else ": empty"


def _data_uri(picture: overlays.Picture) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(overlays.jpeg(picture)).decode("ascii")
