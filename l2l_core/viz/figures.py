"""Curves as SVG drawings for embedding in a page: text stays text, in the page's own color, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib as mpl
import pandas as pd
from cycler import cycler
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from l2l_core.artifacts.records import EVAL_SPLITS
from l2l_core.core.metrics import POSITIVE_IOU
from l2l_core.evaluation.evaluate import SUPERVISED

INK = "#010203"
"""Placeholder for the page's text color while matplotlib draws; no curve uses it."""

COLORS = ("#3b7dd8", "#d9822b", "#2f9e63", "#a855c7", "#c2415c", "#7d7d7d")
"""Line colors in drawing order, distinguishable on light and dark pages."""

LABEL_LINES = {
    "label_miou": "pseudo-label",
    "fused_miou": "fused proposal",
    "prior_miou": "prior's proposal",
    "kept_accuracy": "accuracy of kept pixels",
}
"""Columns of `evaluate.quality_curve`: names in the legend."""

Curves = Mapping[str, pd.DataFrame]


def draw_figures(curves: Curves) -> dict[str, list[Markup]]:
    """Drawings by topic: rounds, labels, coverage, reliability, training, policy; empty lists for missing data.

    curves: as `evaluate.Evaluation.curves`. Equal curves give equal bytes.
    """
    rounds, labels, coverage, reliability, training, policy = (
        _of_kind(curves, kind) for kind in ("rounds", "labels", "coverage", "reliability", "training", "policy")
    )
    policy_columns = [name for name in next(iter(policy.values())).columns if name != "step"] if policy else []
    drawings: dict[str, tuple[Mapping[str, Any], Callable[[Axes, str, Any], None]]] = {
        "rounds": (rounds, _draw_rounds),
        "labels": ({"priors and labels by round": labels}, _draw_labels),
        "coverage": ({"precision by coverage": coverage}, _draw_coverage),
        "reliability": ({"reliability": reliability}, _draw_reliability),
        "training": ({"loss": training}, _draw_steps),
        "policy": (dict.fromkeys(policy_columns, policy), _draw_steps),
    }
    return {
        kind: [_svg(f"{kind}: {title}", title, data, draw) for title, data in parts.items() if len(data)]
        for kind, (parts, draw) in drawings.items()
    }


def _of_kind(curves: Curves, kind: str) -> dict[str, pd.DataFrame]:
    """The nonempty curves `<kind>/<name>`, by name."""
    named = {name.removeprefix(f"{kind}/"): rows for name, rows in curves.items() if name.startswith(f"{kind}/")}
    order = [*EVAL_SPLITS, SUPERVISED, *sorted(named)]
    return {name: named[name] for name in sorted(named, key=order.index) if not named[name].empty}


def _svg(label: str, title: str, data: Any, draw: Callable[[Axes, str, Any], None]) -> Markup:
    """One drawing. `label` is the text for screen readers, and unique within a page."""
    settings: Any = {
        "svg.hashsalt": label,  # ids inside the SVG: the same in every run, unique within a page
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "axes.prop_cycle": cycler(color=COLORS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "legend.frameon": False,
        "legend.fontsize": 8,
        **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], INK),
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(4.4, 3.1), layout="constrained")  # inches of 96 CSS pixels: three fit in a row
        axes = figure.add_subplot()
        draw(axes, title, data)
        axes.grid(alpha=0.25)
        figure.legend(loc="outside lower center", ncols=2)  # below the axes, so that no line crosses it
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", text)  # names such as axes_1, which repeat in every drawing
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1))


def _draw_rounds(axes: Axes, split: str, rows: pd.DataFrame) -> None:
    axes.plot(rows["round"], rows["miou"], marker="o", label="with prior")
    axes.plot(rows["round"], rows["no_prior_miou"], marker="o", linestyle="--", label="without prior")
    axes.axhline(rows["supervised_miou"].iloc[0], linestyle=":", color=COLORS[2], label="supervised only")
    axes.axhline(rows["prior_miou"].iloc[0], linestyle=":", color=COLORS[5], label="prior only")
    axes.set(title=split, xlabel="round", ylabel="mIoU (%)", xticks=rows["round"])


def _draw_labels(axes: Axes, title: str, curves: Curves) -> None:
    (rows,) = curves.values()
    for column, label in LABEL_LINES.items():
        axes.plot(rows["round"], rows[column], marker="o", label=label)
    axes.set(title=title, xlabel="round", ylabel="mIoU, accuracy (%)", xticks=rows["round"])


def _draw_coverage(axes: Axes, title: str, rounds: Curves) -> None:
    for name, rows in rounds.items():
        axes.plot(rows["coverage"], rows["precision"], marker=".", label=name.replace("_", " "))
    xlabel, ylabel = "pseudo-labels taken, most trusted first (%)", f"with IoU > {POSITIVE_IOU} (%)"
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, xlim=(0, 102), ylim=(0, 102))


def _draw_reliability(axes: Axes, title: str, rounds: Curves) -> None:
    axes.plot([0, 100], [0, 100], linestyle=":", color=COLORS[5], label="perfectly calibrated")
    for name, rows in rounds.items():
        axes.plot(rows["prob"], rows["share"], marker="o", label=name.replace("_", " "))
    xlabel, ylabel = "probability of acceptance (%)", f"with IoU > {POSITIVE_IOU} (%)"
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, xlim=(0, 102), ylim=(0, 102))


def _draw_steps(axes: Axes, column: str, models: Curves) -> None:
    for name, rows in models.items():
        marker = "o" if len(rows) == 1 else None  # a line of one point is invisible
        axes.plot(rows["step"], rows[column], label=name.replace("_", " "), linewidth=1.2, marker=marker)
    axes.set(title=column.replace("_", " "), xlabel="step")
