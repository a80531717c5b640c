"""One self-contained HTML page: scores, curves, and pictures of pseudo-labels and predictions, good and bad.

No script, no network: pictures and curves are in the file. Sentences are other people's text and are escaped.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray

from l2l_core import overlays
from l2l_core.config import Params
from l2l_core.evaluation import GOOD_IOU, PRIOR, SUPERVISED, method_scores
from l2l_core.figures import draw_figures
from l2l_core.masks import BoolMask, decode_rle, intersection_union_px
from l2l_core.metrics import PR_THRESHOLDS, iou_from_px

PANEL_PX = 224
"""Longer side of a picture: six fit beside each other on a laptop, and a hundred cases stay near ten megabytes."""

FAILED_SHARE = 0.25
"""Failures are drawn from this share of the sentences, those with the lowest IoU, and not only from the very worst."""

SUCCESSES = f"Sentences with an IoU of at least {GOOD_IOU}, evenly picked from the lowest to the highest."

SCORE_NAMES = {"miou": "mIoU", "oiou": "oIoU", **{f"pr{round(100 * x)}": f"Pr@{x}" for x in PR_THRESHOLDS}}

LABEL_QUALITY_NAMES = {
    "coverage": "accepted",
    "precision": "accepted: IoU > 0.5",
    "miou_all": "mIoU, all",
    "miou_accepted": "mIoU, accepted",
    "miou_rejected": "mIoU, rejected",
    "pixel_error_all": "wrong pixels, all",
    "pixel_error_kept": "wrong pixels, kept",
    "foreground_error_all": "wrong foreground, all",
    "foreground_error_kept": "wrong foreground, kept",
    "auroc": "AUROC",
}


Titled = tuple[str, overlays.Picture]


@dataclass(frozen=True)
class Run:
    """The tables that a report shows, as data frames; `records` says what is in them."""

    images: pd.DataFrame
    refs: pd.DataFrame
    masks: pd.DataFrame
    split: pd.DataFrame
    priors: pd.DataFrame
    proposals: pd.DataFrame
    predictions: pd.DataFrame
    pseudo_labels: pd.DataFrame
    per_sentence: pd.DataFrame
    metrics: Mapping[str, float | int | str]
    curves: Mapping[str, pd.DataFrame]  # as `evaluation.Evaluation.curves`
    last_round: int


@dataclass(frozen=True)
class Panel:
    """One picture of a case."""

    title: str
    alt: str
    source: str  # data URI


@dataclass(frozen=True)
class Case:
    """One sentence, what is known about it, and its pictures."""

    sentence: str
    facts: list[str]
    panels: list[Panel]


@dataclass(frozen=True)
class Gallery:
    """Cases of one kind."""

    anchor: str
    title: str
    about: str
    cases: list[Case]


@dataclass(frozen=True)
class Table:
    """Numbers with a name for each row and column; None where a number is undefined."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[float | None]]]
    marked: str = ""  # the row that the page is about


def render_report(run: Run, params: Params, read_image: Callable[[str], overlays.Picture]) -> str:
    """The whole page. read_image: file_name of the images table -> [H, W, 3] uint8 RGB."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.jinja").render(
        dataset=Path(params.dataset).name,
        facts=_facts(run, params),
        tiles=_tiles(run),
        scores=_score_tables(run),
        styles=_style_tables(run),
        labels=_label_table(run),
        figures=draw_figures(run.curves),
        galleries=_galleries(run, params.report.cases, read_image),
        legend=_legend(),
        last_round=run.last_round,
    )


def spread(candidates: pd.DataFrame, by: str, count: int) -> pd.DataFrame:
    """At most `count` rows, evenly spaced from the lowest to the highest value of column `by`, each of another image.

    candidates also has the columns image_id and sent_id. The choice does not depend on their order.
    """
    shuffled = candidates.sort_values("sent_id").sample(frac=1, random_state=0)  # no sentence of an image is preferred
    one_an_image = shuffled.drop_duplicates("image_id")
    ordered = one_an_image.sort_values([by, "sent_id"])
    places = np.unique(np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int))
    return ordered.iloc[places]


# ---- numbers ----


def _method_name(method: str) -> str:
    if method in (PRIOR, SUPERVISED):
        return {PRIOR: "prior only", SUPERVISED: "supervised only"}[method]
    number = int(method.split("_")[1])
    name = f"round {number}" + (" (warm-up)" if number == 0 else "")
    return name + (", no prior" if method.endswith("no_prior") else "")


def _facts(run: Run, params: Params) -> list[tuple[str, str]]:
    roles = run.split.merge(run.refs[["sent_id", "image_id"]], on="sent_id").groupby("role")
    counts = {role: (rows["image_id"].nunique(), len(rows)) for role, rows in roles}
    labeled, unlabeled = counts.get("labeled", (0, 0)), counts.get("unlabeled", (0, 0))
    listed = params.split.list_file
    budget = (
        f"by {Path(listed).name}" if listed else f"{100 * params.split.labeled_fraction:g} % of the training images"
    )
    version = run.metrics.get("dataset_version")
    prior = {
        "simulated": f"simulated {params.priors.preset}",
        "replay": f"recorded, {Path(params.priors.replay_file or '').name}",
    }.get(params.priors.backend, f"{params.priors.model} by {params.priors.backend}")
    answered = (run.proposals["score"] > 0).mean()
    facts = {
        "data set": Path(params.dataset).name + (f", version {version}" if version is not None else ""),
        "labels": f"{budget}: {labeled[0]:,} images, {labeled[1]:,} sentences",
        "without labels": f"{unlabeled[0]:,} images, {unlabeled[1]:,} sentences",
        "priors": f"{prior}, usable for {100 * answered:.1f} % of the sentences",
        "proposals": params.proposals.renderer,
        "selection": params.select.policy,
        "rounds": str(run.last_round),
        "seed": str(params.seed),
    }
    return list(facts.items())


def _tiles(run: Run) -> list[tuple[str, float, float, float]]:
    """For each split: its name, the final mIoU, the gain over supervised only and over the prior alone."""
    tiles = []
    for split in run.per_sentence["split"].unique():
        final = float(run.metrics[f"{split}_miou"])
        supervised, prior = (float(run.metrics[f"{split}_{method}_miou"]) for method in (SUPERVISED, PRIOR))
        tiles.append((str(split), final, final - supervised, final - prior))
    return tiles


def _score_tables(run: Run) -> list[Table]:
    tables = []
    for split, rows in run.per_sentence.groupby("split", sort=False):
        scores = method_scores(rows)
        supervised = scores[SUPERVISED]["miou"]
        tables.append(
            Table(
                f"{split}: {rows['sent_id'].nunique():,} sentences",
                [*SCORE_NAMES.values(), "mIoU against supervised"],
                [
                    (_method_name(method), [*values.values(), values["miou"] - supervised])
                    for method, values in scores.items()
                ],
                _method_name(f"round_{run.last_round}"),
            )
        )
    return tables


def _style_tables(run: Run) -> list[Table]:
    """mIoU by kind of sentence, where the data set names at least two kinds."""
    final = f"round_{run.last_round}"
    methods = dict.fromkeys([PRIOR, SUPERVISED, "round_0", final, f"{final}_no_prior"])
    tables = []
    for split, rows in run.per_sentence.groupby("split", sort=False):
        if rows["style"].nunique() < 2:
            continue
        miou = 100 * rows.pivot_table(index="method", columns="style", values="iou", aggfunc="mean")
        counts = rows[rows["method"] == final]["style"].value_counts()
        tables.append(
            Table(
                f"{split}, mIoU by kind of sentence",
                [f"{style or 'unnamed'} ({counts[style]:,})" for style in miou.columns],
                [(_method_name(method), miou.loc[method].tolist()) for method in methods],
                _method_name(final),
            )
        )
    return tables


def _label_table(run: Run) -> Table:
    rows: list[tuple[str, list[float | None]]] = []
    for number in range(1, run.last_round + 1):
        values = [run.metrics.get(f"pseudo_round_{number}_{name}") for name in LABEL_QUALITY_NAMES]
        rows.append((f"round {number}", [None if value is None else float(value) for value in values]))
    return Table("Quality by round", list(LABEL_QUALITY_NAMES.values()), rows)


# ---- pictures ----


def _legend() -> list[tuple[str, str]]:
    """CSS background and meaning of every colour in the pictures."""
    ramp = mpl.colormaps[overlays.SOFT_MAP](np.linspace(0, 1, 5))
    stops = ", ".join(mpl.colors.to_hex(colour) for colour in ramp)
    plain = {
        overlays.BOX: "prior: box or point",
        overlays.MASK: "mask",
        overlays.RIGHT: "right (TP)",
        overlays.WRONG: "wrong (FP)",
        overlays.MISSED: "missed (FN)",
    }
    swatches = [(f"rgb{colour}", meaning) for colour, meaning in plain.items()]
    swatches.insert(1, (f"linear-gradient(to right, {stops})", "proposal, 0 to 1"))
    return [*swatches, ("#222", "dropped: teaches nothing")]


def _galleries(run: Run, count: int, read_image: Callable[[str], overlays.Picture]) -> list[Gallery]:
    where = run.refs[["sent_id", "image_id", "ann_id", "sentence", "split"]].merge(run.images, on="image_id")
    cases = _Cases(run, where.set_index("sent_id"), read_image)
    final = run.per_sentence[run.per_sentence["method"] == f"round_{run.last_round}"]
    final = final.merge(run.refs[["sent_id", "image_id"]], on="sent_id")
    labels = run.pseudo_labels[run.pseudo_labels["round"] == run.last_round]
    labels = labels.merge(run.refs[["sent_id", "image_id"]], on="sent_id")
    worst = final.nsmallest(max(count, round(FAILED_SHARE * len(final))), ["iou", "sent_id"])
    right = final[final["iou"] >= GOOD_IOU]
    order = f"of round {run.last_round}, evenly picked from the lowest to the highest probability of acceptance."
    shares = f"the {round(100 * FAILED_SHARE)} % of the sentences with the lowest IoU, evenly picked, worst first."
    kinds: list[tuple[str, str, str, Callable[[pd.DataFrame], Iterator[Case]], pd.DataFrame]] = [
        ("failed", "Failed predictions", f"Out of {shares}", cases.of_predictions, spread(worst, "iou", count)),
        ("right", "Typical successes", SUCCESSES, cases.of_predictions, spread(right, "iou", count)),
    ]
    if run.last_round:
        taught, dropped = (spread(labels[labels["accepted"] == yes], "accept_prob", count) for yes in (True, False))
        kinds = [
            ("accepted", "Accepted pseudo-labels", f"They teach. Labels {order}", cases.of_labels, taught),
            ("rejected", "Rejected pseudo-labels", f"They teach nothing. Labels {order}", cases.of_labels, dropped),
            *kinds,
        ]
    return [Gallery(anchor, title, about, list(draw(rows))) for anchor, title, about, draw, rows in kinds]


class _Cases:
    """Draws sentences: what they mean in the image, and what was made of them."""

    def __init__(self, run: Run, where: pd.DataFrame, read_image: Callable[[str], overlays.Picture]) -> None:
        self._where = where  # by sent_id: ann_id, sentence, split, file_name, height, width
        self._read_image = read_image
        self._last_round = run.last_round
        self._truth = run.masks.set_index("ann_id")["rle_counts"]
        self._priors = run.priors
        self._proposals = run.proposals.set_index("sent_id")
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
                panels += [("mask against truth", overlays.with_errors(image, mask, decode_rle(truth, *mask.shape)))]
                facts = [f"IoU {_iou(row.rle_counts, truth, mask.shape):.2f}", *facts]
            yield self._case(row.sent_id, facts, panels)

    def of_predictions(self, scored: pd.DataFrame) -> Iterator[Case]:
        """Predictions of the final model for some rows of records.PER_SENTENCE."""
        for row in scored.itertuples():
            image, panels, truth_rle = self._common(row.sent_id)
            size = (int(self._where.at[row.sent_id, "height"]), int(self._where.at[row.sent_id, "width"]))
            assert truth_rle is not None  # only sentences with a true mask are evaluated
            mask, truth = (decode_rle(rle, *size) for rle in (self._predictions[row.sent_id], truth_rle))
            panels += [("prediction" + _if_empty(mask), overlays.with_mask(image, mask))]
            panels += [("truth", overlays.with_mask(image, truth))]
            panels += [("prediction against truth", overlays.with_errors(image, mask, truth))]
            yield self._case(row.sent_id, [f"IoU {row.iou:.2f}"], panels)

    def _common(self, sent_id: int) -> tuple[overlays.Picture, list[Titled], bytes | None]:
        """The image at the size of a panel, the panels that begin every case, and the true mask if known."""
        where = self._where.loc[sent_id]
        image = overlays.fit(self._read_image(where["file_name"]), PANEL_PX)
        answers = self._priors[self._priors["sent_id"] == sent_id]
        size = np.array([where["width"], where["height"]], np.float64)
        boxes = [np.asarray(box, np.float64) / np.tile(size, 2) for box in answers["bbox"] if box is not None]
        points = [np.asarray(point, np.float64) / size for point in answers["point"] if point is not None]
        named = next((f": “{target}”" for target in answers["target"] if target), "")
        proposal = self._proposals.loc[sent_id]
        soft = np.frombuffer(proposal["soft"], np.uint8).reshape(proposal["height"], proposal["width"])
        panels = [
            ("image", image),
            (f"prior{named}" if boxes or points else "prior: no answer", overlays.with_boxes(image, boxes, points)),
            ("proposal", overlays.with_soft_map(image, soft)),
        ]
        return image, panels, self._truth.get(where["ann_id"])

    def _case(self, sent_id: int, facts: list[str], panels: Sequence[Titled]) -> Case:
        where = self._where.loc[sent_id]
        shown = [Panel(title, f"{title}: {where['sentence']}", _data_uri(picture)) for title, picture in panels]
        return Case(
            where["sentence"], [*facts, where["split"], f"sentence {sent_id}", Path(where["file_name"]).name], shown
        )


def _iou(mask: bytes, truth: bytes, size_hw: tuple[int, ...]) -> float:
    pixels: NDArray[np.int64] = intersection_union_px([mask], [truth], np.array([size_hw]))
    return float(iou_from_px(pixels[:, 0], pixels[:, 1])[0])


def _if_empty(mask: BoolMask) -> str:
    return "" if mask.any() else ": empty"


def _data_uri(picture: overlays.Picture) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(overlays.jpeg(picture)).decode("ascii")
