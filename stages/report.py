"""Show a run on one HTML page: scores, curves, and images of pseudo-labels and predictions."""

from __future__ import annotations

import argparse

import pandas as pd

from l2l_core.artifacts import records
from l2l_core.config import load_params
from l2l_core.core.images import read_image
from l2l_core.errors import run_stage
from l2l_core.evaluation.evaluate import CURVES_FOLDER
from l2l_core.evaluation.history import last_predictions, last_pseudo_labels, read_history
from l2l_core.reporting.gallery import Run
from l2l_core.reporting.report import render_report


def main() -> None:
    """Load the outputs of the run, render the page and save it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--round", type=int, required=True, help="round that was evaluated")
    round_number = parser.parse_args().round
    params = load_params()
    metrics = records.read_json(records.METRICS_PATH)
    history = read_history(records.DISTILLED_FOLDER / "history")
    index, read, frame = records.INDEX, records.read_table, records.to_frame
    priors = ["sent_id", "target", "bbox", "point", "mask"]
    run = Run(
        images=frame(read(index.images, records.IMAGES)),
        refs=frame(read(index.refs, records.REFS)),
        masks=frame(read(index.masks, records.MASKS)),
        split=frame(read(records.SPLIT_PATH, records.SPLIT)),
        priors=frame(read(records.PRIORS_PATH, records.PRIORS, priors)),
        proposals=records.TableParts(records.PROPOSALS_PATH, records.PROPOSALS),
        rendering=records.read_rendering(),
        predictions=frame(last_predictions(history, round_number)),
        pseudo_labels=frame(last_pseudo_labels(history, round_number)),
        per_sentence=frame(read(records.PER_SENTENCE_PATH, records.PER_SENTENCE)),
        metrics=metrics,
        prior_scores=records.read_json(records.PRIORS_METRICS_PATH),
        proposal_scores=records.read_json(records.PROPOSALS_METRICS_PATH),
        curves={
            path.relative_to(CURVES_FOLDER).with_suffix("").as_posix(): pd.read_csv(path)
            for path in sorted(CURVES_FOLDER.rglob("*.csv"))
        },
        last_round=round_number,
    )
    page = render_report(run, params, read_image)
    records.REPORT_PATH.parent.mkdir(parents=True, exist_ok=True)
    records.REPORT_PATH.write_text(page, encoding="utf-8")
    print(f"report: {records.REPORT_PATH}")


if __name__ == "__main__":
    run_stage(main)
