"""What `bench.label_efficiency` stored, as tables, claims with their verdicts, and pictures in README.md and docs/."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.docs import markdown, put
from bench.params import EDITION
from l2l_core.core.metrics import POSITIVE_IOU

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENT = ROOT / "docs" / "results.md"
IMAGES = ROOT / "docs" / "images"
MARK = "label_efficiency"
SUMMARY_NAME = "label_efficiency.png"

WARMUP, LABELS_ONLY, FULLY_SUPERVISED = "warmup", "labels_only", "fully_supervised"
ROUND_0 = {
    WARMUP: {"prior": "prior", "round_0": "warmup"},
    LABELS_ONLY: {"supervised": "supervised", "round_0": "supervised_priors"},
    FULLY_SUPERVISED: {"supervised": "fully_supervised_no_priors", "round_0": "fully_supervised"},
}
"""Runs without a round, and the rows that the methods of their evaluation give. The warm-up is what all rounds start
from. The others train for as many steps as the warm-up and a round together, the last on all labels."""

MAIN = (0.05, "llava-1.5-7b")
"""Label rate and preset for which the claims are made."""

FIXED_RULES = ("all", "threshold_0.7", "threshold_0.95", "topk", "agreement", "ranksum", "semires")
"""What `reinforce` has to beat: rules without training that take the teacher's own masks and do not read the truth."""
CONSTRUCTED_RULES = ("ranksum_sharpened", "ranksum_overlap", "agreement_overlap")
"""The same kind of rule on built candidates. The lead of `reinforce` over them is the gain from learned selection."""

FIRST = (
    "prior",
    "supervised",
    "supervised_priors",
    "warmup",
    *FIXED_RULES,
    "mean_teacher",
    *CONSTRUCTED_RULES,
    "reinforce_teacher_only",
    "reinforce",
)
LAST = ("oracle", "oracle_constructed", "fully_supervised_no_priors", "fully_supervised")
"""The order of tables; what is in neither (ablations) stands between them."""

COMPARED = {
    "prior": "proposal, thresholded",
    "supervised": "supervised, no priors",
    "warmup": "labels with priors",
    "agreement_overlap": "fixed rule",
    "reinforce": "**L2L**",
    "fully_supervised": "fully supervised, with priors",
}
"""Methods that README.md and the first chart compare across settings, and their descriptions in README.md."""

LIMITS = ("warmup", "all", "reinforce", "oracle_constructed", "fully_supervised")
"""Methods whose lost points are told apart: what each step wins, what a perfect choice would, what all labels do."""

GAIN_POINTS = 2.0
GAP_PERCENT = 65.0
DISTILLED_GAP_PERCENT = 70.0
ORACLE_PERCENT = 90.0
AUROC_PERCENT = 90.0
ERROR_SHARE = 0.5
"""What `claims` asks for, set before the measurement."""

SPLITS = ("val", "test")

NO_ROWS = "no rows"
"""What a claim says that was not measured at all."""

ROUND_LINES = {
    "label_miou_all": ("pseudo-label", "#c2415c"),
    "label_miou_fused": ("fused proposal", "#2f9e63"),
    "label_miou_prior": ("prior's proposal", "0.45"),
    "kept_accuracy": ("accuracy of kept pixels", "#3b7dd8"),
}
"""Columns of the chart by round: their names and colors."""
BY_ROUND = ("reinforce", "reinforce_two_passes", "reinforce_evolved")
"""Methods of the chart by round."""

STYLES: dict[str, dict[str, Any]] = {
    "all": {"color": "#3b7dd8"},
    "threshold_0.7": {"color": "#d9822b", "linestyle": "--"},
    "threshold_0.95": {"color": "#d9822b"},
    "topk": {"color": "#2f9e63"},
    "agreement": {"color": "#a855c7"},
    "ranksum": {"color": "#17a2b8"},
    "semires": {"color": "#8c564b"},
    "mean_teacher": {"color": "#b5a000"},
    "ranksum_overlap": {"color": "#17a2b8", "linestyle": "--"},
    "agreement_overlap": {"color": "#a855c7", "linestyle": "--"},
    "reinforce": {"color": "#c2415c", "linewidth": 2.5, "zorder": 3},
    "oracle": {"color": "0.1"},
}
"""Lines of the pictures, without ablations: one color per selection rule, dashed for constructed labels."""

LOOK: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "legend.fontsize": 8,
}

Setting = tuple[float, str]  # label rate and preset


@dataclass(frozen=True)
class Claim:
    """A statement of which the stored rows decide whether it holds."""

    what: str
    target: str
    found: str
    met: bool | None  # None: not all rows that it needs are stored

    def cells(self) -> list[object]:
        return [self.what, self.target, self.found, {True: "met", False: "missed", None: "open"}[self.met]]


Comparison = Callable[[pd.DataFrame, Setting, int, str], Claim]
"""Rows of a setting, the setting, a round of `reinforce` and a split -> a claim."""


def write(rows: pd.DataFrame, curves: pd.DataFrame) -> None:
    """Tables and claims between the marks of the two documents, pictures into docs/images."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name, figure in figures(rows, curves).items():
        figure.savefig(IMAGES / name, dpi=110, metadata={"Software": None})  # the same bytes from the same rows
    put(DOCUMENT, MARK, page(rows))
    put(README, MARK, short(rows))


# ---- tables ----


def settings(rows: pd.DataFrame) -> list[Setting]:
    """Label rates and presets that have results, the main one first; all labels are not a rate of their own."""
    partial = rows[rows["labeled_fraction"] < 1]
    found = sorted(set(zip(partial["labeled_fraction"], partial["prior"], strict=True)), key=lambda key: key[::-1])
    return sorted(found, key=lambda key: key != MAIN)


def rows_of(rows: pd.DataFrame, setting: Setting) -> pd.DataFrame:
    """The rows of a setting and those of all labels beside it."""
    rate, preset = setting
    return rows[(rows["prior"] == preset) & rows["labeled_fraction"].isin([rate, 1.0])]


def page(rows: pd.DataFrame) -> str:
    """The generated part of docs/results.md."""
    parts = edition_note(rows)
    if settings(rows):
        parts.append(f"![Val mIoU of six methods in each setting](images/{SUMMARY_NAME})")
    for setting in settings(rows):
        rate, preset = setting
        chosen = rows_of(rows, setting)
        commits = ", ".join(sorted(chosen["commit"].unique()))
        parts += [f"### {100 * rate:g} % of the labels, {preset}", _commands(chosen, setting)]
        parts += [f"Measured at {commits} (the results file says which run at which).", table(chosen)]
        if chosen["round"].max() > 0:
            parts.append(f"![Precision and reliability of pseudo-labels](images/{_labels_name(setting)})")
        if len(by_round(chosen)):
            parts.append(f"![Priors, fused proposals and pseudo-labels by round](images/{_rounds_name(setting)})")
        if setting == MAIN:
            parts += ["### Claims", _claims_table(rows)]
            if lost := limits(chosen):
                parts += ["### Error breakdown", lost]
    return "\n\n".join(parts)


def _commands(rows: pd.DataFrame, setting: Setting) -> str:
    """Markdown: what runs these rows, a line for each number of rounds and seeds that methods have in common."""
    run_of = {row: run for run, results in ROUND_0.items() for row in results.values()}
    runs = rows.assign(run=[run_of.get(method, method) for method in rows["method"]])
    rounds = runs.groupby(["run", "seed"], sort=False)["round"].max().clip(1)
    alike: dict[tuple[int, str], list[str]] = {}
    for run in sorted(runs["run"].unique(), key=_place):
        for number, seeds in rounds[run].groupby(rounds[run]):
            named = " ".join(str(seed) for seed in sorted(seeds.index))
            alike.setdefault((int(number), named), []).append(run)
    command = f"python -m bench.label_efficiency --rates {setting[0]:g} --presets {setting[1]}"
    return "\n".join(
        f"    {command} --seeds {seeds} --rounds {number} --methods {' '.join(methods)}"
        for (number, seeds), methods in sorted(alike.items())
    )


def table(rows: pd.DataFrame) -> str:
    """Markdown: a row for each method and round of one setting, means over the seeds."""
    head = ["method", "round", "seeds", "val mIoU (min to max)", "val mIoU without prior"]
    head += ["distilled, without prior", "AUROC", "accepted"]
    head += [f"accepted: IoU > {POSITIVE_IOU}", "wrong pixels kept / all", "wrong foreground kept / all"]
    head += ["test mIoU (min to max)"]
    body: list[list[object]] = []
    for method, number, group in by_method(rows):
        val, test = (group[group["split"] == split] for split in SPLITS)
        means = [mean_of(val, name) for name in ("no_prior_miou", "distilled_miou", "auroc", "coverage", "precision")]
        errors = [_errors(val, kind) if number else None for kind in ("pixel", "foreground")]
        seeds = val["seed"].nunique()
        body.append([title_of(method), number, seeds, seed_range(val), *means, *errors, seed_range(test)])
    return markdown(head, body)


def limits(rows: pd.DataFrame) -> str:
    """Markdown: where the points between mIoU and 100 are lost on val, of LIMITS that are there.

    Means over the seeds that all of them have; nothing where there is none.

    Objects: sentences below POSITIVE_IOU, as a rule another object. Borders: the rest. What the oracle of the same
    candidates still gains over `reinforce` is the policy's part; what full supervision leaves is the network's.
    """
    body: list[list[object]] = []
    if "lost_objects" not in rows:
        return ""
    told_apart = rows[(rows["split"] == "val") & rows["method"].isin(LIMITS) & rows["lost_objects"].notna()]
    groups = by_method(told_apart)
    common = set.intersection(*(set(group["seed"]) for _, _, group in groups)) if groups else set()
    if not common:
        return ""
    for method, number, group in groups:
        group = group[group["seed"].isin(common)]
        values = [mean_of(group, name) for name in ("miou", "lost_objects", "lost_borders")]
        body.append([title_of(method), number, group["seed"].nunique(), *values])
    head = [
        "method",
        "round",
        "seeds",
        "val mIoU",
        f"lost where IoU < {POSITIVE_IOU} (objects)",
        "lost elsewhere (borders)",
    ]
    return markdown(head, body)


def short(rows: pd.DataFrame) -> str:
    """The generated part of README.md."""
    return "\n\n".join([*edition_note(rows), summary_table(rows)])


def edition_note(rows: pd.DataFrame) -> list[str]:
    """What a reader must know of rows that an earlier edition of the method gave; none where there are no such rows."""
    if "edition" in rows and (rows["edition"] == EDITION).all():
        return []
    return [
        "**These results predate** fitted proposals, the network that starts at its proposal, and the critic. "
        "The current version has not been evaluated at this size."
    ]


def summary_table(rows: pd.DataFrame) -> str:
    """Markdown: a row a measured method of COMPARED and round, a column a setting; val mIoU over all seeds."""
    columns = settings(rows)
    val = rows[rows["split"] == "val"]
    body: list[list[object]] = []
    for name in COMPARED:
        own = val[val["method"] == name]
        for number in sorted(own["round"].unique()):
            groups = [rows_of(own[own["round"] == number], setting) for setting in columns]
            scores = [seed_range(group) if len(group) else "" for group in groups]
            body.append([f"{COMPARED[name]} ({title_of(name)})", int(number), *scores])
    if "distilled_miou" in rows:
        distilled = rows[(rows["split"] == "val") & (rows["method"] == "reinforce") & rows["distilled_miou"].notna()]
        last = distilled.assign(miou=distilled["distilled_miou"])
        groups = [rows_of(last, setting) for setting in columns]
        if len(last):
            cells = [seed_range(group) if len(group) else "" for group in groups]
            body.append(["L2L, distilled, without priors (reinforce)", int(last["round"].max()), *cells])
    return markdown(["val mIoU", "round", *(f"{100 * rate:g} %, {preset}" for rate, preset in columns)], body)


def by_method(rows: pd.DataFrame) -> list[tuple[str, int, pd.DataFrame]]:
    groups = [(str(method), int(number), group) for (method, number), group in rows.groupby(["method", "round"])]
    return sorted(groups, key=lambda group: (*_place(group[0]), group[1]))


def _place(method: str) -> tuple[int, str]:
    if method in FIRST:
        return FIRST.index(method), method
    return len(FIRST) + (1 + LAST.index(method) if method in LAST else 0), method


def title_of(method: str) -> str:
    return method.replace("_", " ")


def mean_of(rows: pd.DataFrame, column: str, digits: int = 1) -> str:
    mean = float(rows[column].mean()) if column in rows else math.nan  # no column before the first round is stored
    return "" if math.isnan(mean) else f"{mean:.{digits}f}"


def _errors(rows: pd.DataFrame, kind: str) -> str:
    """Of kept pixels / of all; a dash where nothing is kept."""
    return " / ".join(mean_of(rows, f"{kind}_error_{which}", 2) or "-" for which in ("kept", "all"))


def seed_range(rows: pd.DataFrame) -> str:
    miou = rows["miou"]
    return f"{miou.mean():.1f} ({miou.min():.1f} to {miou.max():.1f})"


# ---- claims ----


def claims(rows: pd.DataFrame) -> list[Claim]:
    """What the method promises, against the stored rows.

    For the main setting, each split and each round of `reinforce`: the lead over the fixed rules, the gap to full
    supervision that is closed, the share of the oracle's gain; for its first round: how well labels are judged. For
    all other settings: no loss against accepting everything and against the warm-up. Means are over the seeds that
    all compared methods have. The targets are the first round's: of a later one, what nothing was run for is left out.
    """
    found = []
    for setting in settings(rows):
        chosen = rows_of(rows, setting)
        rounds = sorted(chosen.loc[chosen["method"] == "reinforce", "round"].unique())
        compared = MAIN_CLAIMS if setting == MAIN else [_no_loss]
        for compare in compared:
            of_rounds = [(n, compare(chosen, setting, int(n), split)) for n in rounds for split in SPLITS]
            found += [claim for number, claim in of_rounds if number == 1 or not claim.found.startswith(NO_ROWS)]
        if setting == MAIN and rounds:
            found += [_distilled_claim(chosen, int(rounds[-1]), split) for split in SPLITS]
            first = chosen[(chosen["round"] == 1) & (chosen["split"] == "val")].sort_values("seed")
            of = {name: first[first["method"] == name] for name in ("reinforce", "reinforce_teacher_only", "all")}
            seeds = chosen["seed"].nunique()
            found.append(_auroc_claim(of["reinforce"], "", seeds))
            if len(of["reinforce_teacher_only"]):
                found.append(_auroc_claim(of["reinforce_teacher_only"], " on the teacher's own masks", seeds))
            found += _label_claims(of["reinforce"], of["all"], seeds)
    return found


def _claims_table(rows: pd.DataFrame) -> str:
    return markdown(["claim", "target", "found", "verdict"], [claim.cells() for claim in claims(rows)])


def _lead(rules_text: str, names: Sequence[str]) -> Comparison:
    def compare(rows: pd.DataFrame, setting: Setting, number: int, split: str) -> Claim:
        there = rows.loc[rows["round"] == number, "method"].unique()
        named = [name for name in names if number == 1 or name in there]
        which = "best fixed rule" if len(named) == len(names) else ", ".join(map(title_of, named))
        what = f"(a) reinforce against the {which} on {rules_text}, round {number}, {split}"
        target = f">= {GAIN_POINTS:g} points on the mean and, against the best rule there, on each seed"

        def decide(scores: pd.DataFrame) -> tuple[str, bool]:
            rules = scores[named]
            mean = float(scores["reinforce"].mean() - rules.mean().max())
            seeds = scores["reinforce"] - rules.max(axis=1)
            found = f"{_points([mean])} to {title_of(str(rules.mean().idxmax()))}; seeds {_points(seeds)}"
            return found, round(min(mean, seeds.min()), 2) >= GAIN_POINTS

        return _claim(rows, what, target, number, split, ["reinforce", *(named or names)], decide)

    return compare


def _gap_closed(bottom: str) -> Comparison:
    def compare(rows: pd.DataFrame, setting: Setting, number: int, split: str) -> Claim:
        what = f"(b) gap from {title_of(bottom)} to fully supervised that reinforce closes, round {number}, {split}"
        return _share(rows, what, GAP_PERCENT, number, split, bottom, "fully_supervised")

    return compare


def _distilled_claim(rows: pd.DataFrame, number: int, split: str) -> Claim:
    """Of the model distilled from the last round of `reinforce`, which runs without priors."""
    bottom, top = "supervised", "fully_supervised_no_priors"
    what = f"(f) gap from {bottom} to {title_of(top)} that the distilled model closes, round {number}, {split}"
    distilled = rows.get("distilled_miou", math.nan)
    rows = rows.assign(miou=rows["miou"].mask(rows["method"] == "reinforce", distilled))
    return _share(rows, what, DISTILLED_GAP_PERCENT, number, split, bottom, top)


def _share_of_oracle(oracle: str, labels: str) -> Comparison:
    def compare(rows: pd.DataFrame, setting: Setting, number: int, split: str) -> Claim:
        what = f"(c) reinforce's share of the gain over the warm-up of the oracle on {labels}, round {number}, {split}"
        return _share(rows, what, ORACLE_PERCENT, number, split, "warmup", oracle)

    return compare


MAIN_CLAIMS = (
    _lead("the teacher's masks", FIXED_RULES),
    _lead("constructed labels", CONSTRUCTED_RULES),
    _gap_closed("supervised"),
    _gap_closed("supervised_priors"),
    _share_of_oracle("oracle", "the teacher's masks"),
    _share_of_oracle("oracle_constructed", "all candidates"),
)


def _share(rows: pd.DataFrame, what: str, percent: float, number: int, split: str, bottom: str, top: str) -> Claim:
    """How far `reinforce` gets on the way from one method to another, of the means."""

    def decide(scores: pd.DataFrame) -> tuple[str, bool]:
        way, done = (float((scores[name] - scores[bottom]).mean()) for name in (top, "reinforce"))
        found = f"{done:+.2f} of {way:+.2f} points"
        # Where the upper bound is not above the lower one there is no way to go.
        return (f"{100 * done / way:.1f} % ({found})", 100 * done / way >= percent) if way > 0 else (found, done >= way)

    return _claim(rows, what, f">= {percent:g} %", number, split, ["reinforce", bottom, top], decide)


def _no_loss(rows: pd.DataFrame, setting: Setting, number: int, split: str) -> Claim:
    rate, preset = setting
    what = f"(e) reinforce against all and warmup, {100 * rate:g} %, {preset}, round {number}, {split}"

    def decide(scores: pd.DataFrame) -> tuple[str, bool]:
        gains = {name: scores["reinforce"] - scores[name] for name in ("all", "warmup")}
        found = "; ".join(f"{name}: {_points(seeds)}" for name, seeds in gains.items())
        return found, all(round(seeds.min(), 2) >= 0 for seeds in gains.values())

    return _claim(rows, what, "never below, on each seed", number, split, ["reinforce", "all", "warmup"], decide)


def _claim(
    rows: pd.DataFrame,
    what: str,
    target: str,
    number: int,
    split: str,
    methods: list[str],
    decide: Callable[[pd.DataFrame], tuple[str, bool]],
) -> Claim:
    """Decide on a table of mIoU, a row a seed that all methods have and a column a method; open where one has none."""
    chosen = rows[rows["round"].isin([0, number]) & (rows["split"] == split)]
    scores = chosen.pivot(index="seed", columns="method", values="miou")
    absent = [method for method in methods if method not in scores]
    common = None if absent else scores[methods].dropna()
    if common is None or common.empty:
        return Claim(what, target, f"{NO_ROWS} of {', '.join(absent)}" if absent else "no seed that all have", None)
    found, met = decide(common)
    if len(common) < rows["seed"].nunique():
        return Claim(what, target, f"{found} (seeds {', '.join(map(str, common.index))} only)", None)
    return Claim(what, target, found, bool(met))


def _auroc_claim(rows: pd.DataFrame, labels: str, seeds: int) -> Claim:
    auroc = rows["auroc"]
    met = None if len(rows) < seeds or auroc.isna().any() else bool((auroc >= AUROC_PERCENT).all())
    values = ", ".join(f"{value:.2f}" for value in auroc)
    return Claim(f"(d) AUROC of accept_prob{labels}, round 1", f">= {AUROC_PERCENT:g} on each seed", values, met)


def _label_claims(rows: pd.DataFrame, everything: pd.DataFrame, seeds: int) -> list[Claim]:
    """rows: of `reinforce` in round 1, one a seed; everything: of `all`, whose labels are the teacher's own masks.

    Open where not all of the setting's seeds are there.
    """
    found = []
    common = rows.set_index("seed").join(everything.set_index("seed"), rsuffix="_teacher", how="inner")
    for kind, what in (("pixel", "wrong pixels"), ("foreground", "wrong pixels among the labels' foreground")):
        for column, whose in (
            ("all", "all of the constructed labels"),
            ("all_teacher", "all of the teacher's own masks"),
        ):
            kept, whole = common[f"{kind}_error_kept"], common[f"{kind}_error_{column}"]
            values = ", ".join(f"{a:.2f} / {b:.2f}" for a, b in zip(kept, whole, strict=True))
            met = (
                None
                if len(common) < seeds or (kept + whole).isna().any()
                else bool((kept <= ERROR_SHARE * whole).all())
            )
            target = f"kept at most {ERROR_SHARE:g} of that on each seed"
            found.append(Claim(f"(d) {what}, kept / {whose} (%), round 1", target, values, met))
    return found


def _points(values: Sequence[float] | pd.Series) -> str:
    return ", ".join(f"{value:+.2f}" for value in values)


# ---- pictures ----


def figures(rows: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Figure]:
    """Pictures by file name."""
    drawn = {}
    with mpl.rc_context(LOOK):
        columns = settings(rows)
        if columns:
            drawn[SUMMARY_NAME] = figure = Figure(figsize=(2.6 + 2 * len(columns), 2.6), layout="constrained")
            for axes, setting in zip(
                figure.subplots(1, len(columns), sharex=True, sharey=True, squeeze=False)[0], columns, strict=True
            ):
                _draw_summary(axes, rows_of(rows, setting), f"{100 * setting[0]:g} % labels\n{setting[1]}")
        for setting in columns:
            rate, preset = setting
            here = rows_of(rows, setting)
            if here["round"].max() > 0:
                drawn[_labels_name(setting)] = figure = Figure(figsize=(10.4, 4.4), layout="constrained")
                left, right = figure.subplots(1, 2)
                chosen = (curves["prior"] == preset) & (curves["labeled_fraction"] == rate) & (curves["round"] == 1)
                _draw_coverage(left, here, curves[chosen])
                _draw_reliability(right, curves[chosen])
            if len(scores := by_round(here)):
                methods = [method for method in BY_ROUND if method in scores.index]
                drawn[_rounds_name(setting)] = figure = Figure(figsize=(3.4 * len(methods), 3.4), layout="constrained")
                panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
                for axes, method in zip(panels, methods, strict=True):
                    _draw_rounds(axes, scores.loc[method], title_of(method))
                panels[0].set(ylabel="mIoU, accuracy (%)")
                panels[-1].legend()
    return drawn


def by_round(rows: pd.DataFrame) -> pd.DataFrame:
    """ROUND_LINES by method of BY_ROUND and round, means over the seeds; no row where none is stored."""
    if "label_miou_fused" not in rows:
        return pd.DataFrame()
    known = rows[(rows["split"] == "val") & rows["method"].isin(BY_ROUND) & rows["label_miou_fused"].notna()]
    known = known.assign(kept_accuracy=100 - known["pixel_error_kept"])
    return known.groupby(["method", "round"])[list(ROUND_LINES)].mean()


def _rounds_name(setting: Setting) -> str:
    return f"proposals_{100 * setting[0]:g}_percent_{setting[1]}.png"


def _labels_name(setting: Setting) -> str:
    return f"pseudo_labels_{100 * setting[0]:g}_percent_{setting[1]}.png"


def _draw_summary(axes: Axes, rows: pd.DataFrame, title: str) -> None:
    """Val mIoU of COMPARED, round 0 or 1: a dot for the mean of the seeds, a line from the smallest to the largest."""
    val = rows[(rows["split"] == "val") & (rows["round"] <= 1)]
    for place, method in enumerate(COMPARED):
        miou = val.loc[val["method"] == method, "miou"]
        if miou.empty:
            continue
        color = STYLES["reinforce"]["color"] if method == "reinforce" else "0.45"
        axes.plot([miou.min(), miou.max()], [place, place], color=color, linewidth=2, alpha=0.5)
        axes.plot(miou.mean(), place, "o", color=color)
        axes.annotate(
            f"{miou.mean():.0f}", (miou.mean(), place), (0, 4), textcoords="offset points", ha="center", fontsize=8
        )
    axes.set_yticks(range(len(COMPARED)), [title_of(name) for name in COMPARED])
    axes.set(ylim=(len(COMPARED) - 0.5, -0.7), xlim=(0, 100), xlabel="val mIoU (%)", title=title)


def _draw_rounds(axes: Axes, scores: pd.DataFrame, title: str) -> None:
    """scores: ROUND_LINES by round, in percent."""
    for column, (name, color) in ROUND_LINES.items():
        axes.plot(scores.index, scores[column], marker="o", color=color, label=name)
    axes.set(xlabel="round", xticks=scores.index, title=title)


def _face(style: dict[str, Any]) -> str:
    """Dots of broken lines are hollow."""
    return "white" if style.get("linestyle") == "--" else style["color"]


def _draw_coverage(axes: Axes, rows: pd.DataFrame, curves: pd.DataFrame) -> None:
    """How many of the most trusted labels are good, and where each method stops."""
    for method, style in STYLES.items():
        own = curves[curves["method"] == method]
        if own.empty:
            continue
        # Point by point: the seeds have about equally many labels, so that their points are at about the same place.
        coverage, precision = (pd.DataFrame(own[name].tolist()).mean() for name in ("coverage", "precision"))
        ranks = precision.nunique() > 1
        if ranks:
            axes.plot(coverage, precision, **{"linewidth": 1.2, **style})
        if ranks or method == "all":  # others that trust all labels alike stand where `all` does
            dot = rows[(rows["method"] == method) & (rows["round"] == 1)][["coverage", "precision"]].mean()
            axes.plot(*dot, "o", color=style["color"], markerfacecolor=_face(style), zorder=4, label=title_of(method))
    axes.set(xlabel="pseudo-labels taken, most trusted first (%)", ylabel=f"of these with IoU > {POSITIVE_IOU} (%)")
    axes.set(xlim=(0, 102), ylim=(None, 101), title="precision by coverage, round 1; dots: what is accepted")
    axes.legend()


def _draw_reliability(axes: Axes, curves: pd.DataFrame) -> None:
    """How often accept_prob of `reinforce` comes true, a line a seed: fixed rules give ranks, not probabilities."""
    axes.plot([0, 100], [0, 100], linestyle=":", color="0.5", label="perfectly calibrated")
    for row in curves[curves["method"] == "reinforce"].sort_values("seed").itertuples():
        axes.plot(row.prob, row.share, marker="o", markersize=4, label=f"seed {row.seed}")
    axes.set(xlabel="accept_prob (%)", ylabel=f"with IoU > {POSITIVE_IOU} (%)", xlim=(0, 102), ylim=(0, 102))
    axes.set(title="reliability of reinforce, round 1")
    axes.legend()
