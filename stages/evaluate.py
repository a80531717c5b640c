"""Score all models of a run on the held-out splits, and its pseudo-labels if their truth is known."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from l2l_core.artifacts import records
from l2l_core.config import load_params
from l2l_core.errors import run_stage
from l2l_core.evaluation.evaluate import CURVES_FOLDER, evaluate
from l2l_core.evaluation.history import read_history


def dataset_version(dataset: Path) -> str | None:
    """Version in instances.json of a dataset in RefCOCO's layout; None if there is none."""
    instances = dataset / "instances.json"
    if not instances.is_file():
        return None
    info = json.loads(instances.read_text(encoding="utf-8")).get("info") or {}
    return str(info["version"]) if "version" in info else None


def trained_precision(model: Path) -> dict[str, str]:
    """`precision` in which a model was trained: bf16 or fp32. No key if its folder does not record it."""
    config = model / "config.json"
    precision = records.read_json(config).get("precision") if config.is_file() else None
    return {} if precision is None else {"precision": precision}


def main() -> None:
    """Load the history of the run, score it, and save scores, curves and metrics."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--round", type=int, required=True, help="last round of the history")
    round_number = parser.parse_args().round
    params = load_params()
    result = evaluate(
        read_history(records.DISTILLED_FOLDER / "history"),
        records.read_table(records.INDEX.refs, records.REFS, ["sent_id", "ann_id", "style", "split"]),
        records.read_table(records.INDEX.masks, records.MASKS),
        records.read_table(records.SPLIT_PATH, records.SPLIT),
        records.TableParts(records.PROPOSALS_PATH, records.PROPOSALS),
        params.evaluate.splits,
        round_number,
        dataset_version(Path(params.dataset)),
    )
    records.write_table(result.per_sentence, records.PER_SENTENCE_PATH, records.PER_SENTENCE)
    shutil.rmtree(CURVES_FOLDER, ignore_errors=True)  # removes the curves of an earlier evaluation
    for name, curve in result.curves.items():
        path = CURVES_FOLDER / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        curve.to_csv(path, index=False)
    metrics = {"dataset": Path(params.dataset).name} | result.metrics
    metrics |= trained_precision(records.round_folder(round_number) / "model")
    records.write_metrics(metrics, records.METRICS_PATH)


if __name__ == "__main__":
    run_stage(main)
