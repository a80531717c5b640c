"""Score the supervised model and the rounds 0..k on the held-out splits, and pseudo-labels where the truth is known."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from l2l_core import records
from l2l_core.config import load_params
from l2l_core.errors import exit_code
from l2l_core.evaluation import evaluate, read_history

METRICS_PATH = Path("metrics/evaluate.json")
PLOTS_FOLDER = Path("plots")


def main() -> None:
    """Parse, load, evaluate, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--round", type=int, required=True, help="round whose history is scored")
    number = parser.parse_args().round
    result = evaluate(
        read_history(records.round_folder(number) / "history"),
        records.read_table(records.INDEX.refs, records.REFS, ["sent_id", "ann_id", "style", "split"]),
        records.read_table(records.INDEX.masks, records.MASKS),
        records.read_table(records.SPLIT_PATH, records.SPLIT),
        records.read_table(records.PROPOSALS_PATH, records.PROPOSALS),
        load_params().evaluate.splits,
        number,
    )
    records.write_table(result.per_sentence, records.PER_SENTENCE_PATH, records.PER_SENTENCE)
    for name, curve in result.curves.items():
        path = PLOTS_FOLDER / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        curve.to_csv(path, index=False)
    METRICS_PATH.parent.mkdir(parents=True, exist_ok=True)
    METRICS_PATH.write_text(json.dumps(result.metrics, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
