"""One self-contained HTML page: scores, curves, and pictures of pseudo-labels and predictions, good and bad.

One small script filters the pictures; the page uses no network. Sentences are untrusted text and are escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, assert_never

import matplotlib as mpl
import numpy as np
import pandas as pd

from l2l_core.artifacts import records
from l2l_core.config import Params, ProposalsParams
from l2l_core.core.metrics import POSITIVE_IOU
from l2l_core.evaluation.error_analysis import CHANGED_IOU, OUTCOMES, SIZES, changes, outcomes, sizes
from l2l_core.evaluation.evaluate import DISTILLED, PRIOR, SUPERVISED, method_scores
from l2l_core.reporting.gallery import UNKNOWN, Gallery, Run, area_share, evaluated_size_limits, make_galleries
from l2l_core.reporting.html import COUNT, DIFFERENCE, PERCENT, SCORE_NAMES, Table, render_page
from l2l_core.viz import overlays
from l2l_core.viz.figures import draw_figures

LABEL_QUALITY_NAMES = {
    "coverage": "accepted",
    "precision": f"accepted: IoU > {POSITIVE_IOU}",
    "miou_all": "mIoU, all",
    "miou_accepted": "mIoU, accepted",
    "miou_rejected": "mIoU, rejected",
    "pixel_error_all": "wrong pixels, all",
    "pixel_error_kept": "wrong pixels, kept",
    "foreground_error_all": "wrong foreground, all",
    "foreground_error_kept": "wrong foreground, kept",
    "auroc": "AUROC",
    "miou_prior": "mIoU, prior's proposal",
    "miou_fused": "mIoU, fused proposal",
}

PRIOR_SCORE_NAMES = {
    "box_acc50": "box acc@0.5",
    "box_miou": "mIoU, box",
    "mask_miou": "mIoU, mask",
    "pointing_acc": "pointing accuracy",
    "score_auroc": "AUROC of the score",
}
"""Keys of `priors.scores.score_priors`: names on the page."""

CHANGE_NAMES = {
    "better": ("better", COUNT),
    "worse": ("worse", COUNT),
    "reached": (f"reached IoU {POSITIVE_IOU}", COUNT),
    "lost": (f"fell below {POSITIVE_IOU}", COUNT),
    "mean": ("mIoU", DIFFERENCE),
}
"""Keys of `error_analysis.changes`: name on the page, and number format."""


def render_report(run: Run, params: Params, read_image: Callable[[str], overlays.Picture]) -> str:
    """The whole page. read_image: file_name of the images table -> [H, W, 3] uint8 RGB."""
    low, high = (100 * limit for limit in evaluated_size_limits(run))
    galleries = make_galleries(run, params.report.cases, read_image)
    return render_page(
        "report.html.jinja",
        "report.js",
        dataset=Path(params.dataset).name,
        facts=_facts(run, params),
        tiles=_tiles(run),
        scores=_score_tables(run),
        priors=_prior_table(run),
        styles=_style_tables(run),
        sizes=_size_tables(run),
        size_rule=f"small below {low:.1f} % of the image, large from {high:.1f} % on",
        outcomes=_outcome_tables(run),
        rules=OUTCOMES,
        changes=_change_tables(run),
        changed_iou=CHANGED_IOU,
        labels=_label_table(run),
        figures=draw_figures(run.curves),
        galleries=galleries,
        filters=_filters(galleries),
        legend=_legend(),
        last_round=run.last_round,
    )


# ---- numbers ----


METHOD_NAMES = {PRIOR: "prior only", SUPERVISED: "supervised only", DISTILLED: "distilled, no prior"}
"""Methods other than the rounds: names on the page."""


def _method_name(method: str) -> str:
    if method in METHOD_NAMES:
        return METHOD_NAMES[method]
    round_number = int(method.split("_")[1])
    name = f"round {round_number}" + (" (warm-up)" if round_number == 0 else "")
    return name + (", no prior" if method.endswith("no_prior") else "")


def _rendering_name(rendering: ProposalsParams, priors: Mapping[str, Any]) -> str:
    """How the proposals are rendered. priors: metrics/priors.json, with the numbers of masks, boxes and points."""
    match rendering.renderer:
        case "box":
            drawn = "box"
        case "grabcut":
            drawn = f"grabcut, ring {rendering.ring}, core {rendering.core}"
        case "sam":
            drawn = f"sam, {rendering.model}"
        case _:
            assert_never(rendering.renderer)
    if not priors.get("mask"):
        return drawn
    has_others = priors["box"] + priors["point"] > 0
    return f"the priors' masks, and {drawn} for priors without a mask" if has_others else "the priors' masks"


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
        "none": "none",
        "replay": f"recorded, {Path(params.priors.replay_file or '').name}",
    }.get(params.priors.backend, f"{params.priors.model} by {params.priors.backend}")
    score = records.read_table(run.proposals.path, records.PROPOSALS, ["score"])["score"].to_numpy()
    usable = (score > 0).mean()
    facts = {
        "dataset": Path(params.dataset).name + (f", version {version}" if version is not None else ""),
        "labels": f"{budget}: {labeled[0]:,} images, {labeled[1]:,} sentences",
        "without labels": f"{unlabeled[0]:,} images, {unlabeled[1]:,} sentences",
        "priors": f"{prior}, usable for {100 * usable:.1f} % of the sentences",
        "proposals": _rendering_name(run.rendering, run.prior_scores),
        "selection": params.select.method,
        "rounds": str(run.last_round),
        "seed": str(params.seed),
    }
    return list(facts.items())


def _tiles(run: Run) -> list[tuple[str, float, float, float]]:
    """For each split: its name, the final mIoU, and its gain over the supervised model and over the prior alone."""
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
                dict.fromkeys(SCORE_NAMES.values(), PERCENT) | {"mIoU against supervised": DIFFERENCE},
                [
                    (_method_name(method), [*values.values(), values["miou"] - supervised])
                    for method, values in scores.items()
                ],
                marked=_method_name(f"round_{run.last_round}"),
            )
        )
    return tables


def _prior_table(run: Run) -> Table:
    """Scores of priors and proposals on the labeled sentences; a row per model if there are several."""
    scores = run.prior_scores
    rows = [("all", scores, run.proposal_scores.get("miou"))]
    rows += [(source, of_source, None) for source, of_source in scores.get("by_source", {}).items()]
    return Table(
        f"Priors on {scores['labeled']:,} labeled sentences, {scores['labeled_without_prior']:,} without a prior",
        {**dict.fromkeys(PRIOR_SCORE_NAMES.values(), PERCENT), "mIoU, proposal": PERCENT},
        [(name, [*(of_row[key] for key in PRIOR_SCORE_NAMES), miou]) for name, of_row, miou in rows],
    )


def _style_tables(run: Run) -> list[Table]:
    """mIoU by sentence style, if the dataset has at least two styles."""
    rows = run.per_sentence
    several = rows.groupby("split")["style"].transform("nunique") > 1
    return _miou_tables(run, rows[several].assign(group=rows["style"].replace("", "unnamed")), "kind of sentence")


def _size_tables(run: Run) -> list[Table]:
    by_sentence = sizes(area_share(run), evaluated_size_limits(run))
    group = pd.Categorical(run.per_sentence["sent_id"].map(by_sentence), SIZES)  # their order is that of the columns
    return _miou_tables(run, run.per_sentence.assign(group=group), "size of the object")


def _miou_tables(run: Run, grouped: pd.DataFrame, what: str) -> list[Table]:
    """mIoU of each `group` of sentences, one table per split."""
    final = f"round_{run.last_round}"
    tables = []
    for split, rows in grouped.groupby("split", sort=False):
        miou = 100 * rows.pivot_table(index="method", columns="group", values="iou", aggfunc="mean", observed=True)
        counts = rows.loc[rows["method"] == final, "group"].value_counts()
        tables.append(
            Table(
                f"{split}, mIoU by {what}",
                {f"{group} ({counts[group]:,})": PERCENT for group in miou.columns},
                [(_method_name(method), miou.loc[method].tolist()) for method in _main_methods(run)],
                marked=_method_name(final),
            )
        )
    return tables


def _main_methods(run: Run) -> list[str]:
    """The final models and their baselines."""
    final = f"round_{run.last_round}"
    return list(dict.fromkeys([PRIOR, SUPERVISED, "round_0", final, f"{final}_no_prior", DISTILLED]))


def _outcome_tables(run: Run) -> list[Table]:
    """Share of the sentences by outcome, one table per split."""
    named = run.per_sentence.assign(outcome=outcomes(run.per_sentence))
    methods = [PRIOR, SUPERVISED, *(f"round_{round_number}" for round_number in range(run.last_round + 1)), DISTILLED]
    tables = []
    for split, rows in named.groupby("split", sort=False):
        share = 100 * pd.crosstab(rows["method"], rows["outcome"], normalize="index")
        share = share.reindex(columns=list(OUTCOMES), fill_value=0.0)
        tables.append(
            Table(
                f"{split}, outcomes of the sentences",
                dict.fromkeys(OUTCOMES, PERCENT),
                [(_method_name(method), share.loc[method].tolist()) for method in methods],
                marked=_method_name(f"round_{run.last_round}"),
            )
        )
    return tables


def _change_tables(run: Run) -> list[Table]:
    """How many sentences each round made better or worse, one table per split; none without a round."""
    columns = dict(CHANGE_NAMES.values())
    tables = []
    for split, rows in run.per_sentence.groupby("split", sort=False):
        by_method = {method: part.sort_values("sent_id") for method, part in rows.groupby("method")}
        pairs = [(round_number - 1, round_number) for round_number in range(1, run.last_round + 1)]
        if run.last_round > 1:
            pairs.append((0, run.last_round))
        cells: list[tuple[str, list[float | None]]] = []
        for old, new in pairs:
            change = changes(by_method[f"round_{old}"], by_method[f"round_{new}"])
            cells.append((f"round {old} to {new}", [change[column] for column in CHANGE_NAMES]))
        title = f"{split}: what changed for {rows['sent_id'].nunique():,} sentences"
        tables += [Table(title, columns, cells, unit="sentences")] if cells else []
    return tables


def _label_table(run: Run) -> Table:
    rounds = range(1, run.last_round + 1)
    rows: list[tuple[str, list[float | None]]] = []
    for key, name in LABEL_QUALITY_NAMES.items():
        values = [run.metrics.get(f"pseudo_round_{round_number}_{key}") for round_number in rounds]
        rows.append((name, [None if value is None else float(value) for value in values]))
    return Table("Quality by round", {f"round {round_number}": PERCENT for round_number in rounds}, rows)


# ---- pictures ----


def _filters(galleries: list[Gallery]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Filters above the cases: the case's attribute, its label, its values and their display names."""
    cases = [case for gallery in galleries for case in gallery.cases]
    kinds = [(gallery.anchor, gallery.title) for gallery in galleries if gallery.cases]
    found = {
        "split": dict.fromkeys(case.split for case in cases),
        "style": sorted({case.style for case in cases} - {""}),
        "size": [size for size in (*SIZES, UNKNOWN) if any(case.size == size for case in cases)],
    }
    labels = {"split": "split", "style": "kind of sentence", "size": "size of the object"}
    choices = [(name, labels[name], [(value, value) for value in values]) for name, values in found.items()]
    return [("kind", "kind of case", kinds), *(choice for choice in choices if len(choice[2]) > 1)]


def _legend() -> list[tuple[str, str]]:
    """CSS background and meaning of every color in the pictures."""
    ramp = mpl.colormaps[overlays.SOFT_MAP](np.linspace(0, 1, 5))
    stops = ", ".join(mpl.colors.to_hex(color) for color in ramp)
    plain = {
        overlays.BOX: "prior: mask, box or point",
        overlays.MASK: "mask",
        overlays.RIGHT: "right (TP)",
        overlays.WRONG: "wrong (FP)",
        overlays.MISSED: "missed (FN)",
    }
    swatches = [(f"rgb{color}", meaning) for color, meaning in plain.items()]
    swatches.insert(1, (f"linear-gradient(to right, {stops})", "proposal, 0 to 1"))
    return [*swatches, ("#222", "dropped: not used in training")]
