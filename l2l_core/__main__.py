"""Commands for a person: `python -m l2l_core show` prints the last evaluation's scores."""

from __future__ import annotations

import argparse
import json
import sys

import pandas as pd

from l2l_core.errors import ArtifactError, exit_code
from l2l_core.records import METRICS_PATH, REPORT_PATH

SCORES = {"miou": "mIoU", "oiou": "oIoU", "pr50": "Pr@0.5", "pr70": "Pr@0.7", "pr90": "Pr@0.9"}


def score_table(metrics: dict[str, float]) -> pd.DataFrame:
    """metrics/evaluate.json -> a row a split and method: mIoU of all, the other scores of the final model."""
    rows = []
    for split in (key.removeprefix("n_") for key in metrics if key.startswith("n_")):
        beside = ["prior", "supervised"] + [f"round_{k}" for k in range(8) if f"{split}_round_{k}_miou" in metrics]
        for method in beside:
            row = {"split": split, "method": method.replace("_", " "), "mIoU": metrics[f"{split}_{method}_miou"]}
            if method == beside[-1]:
                row |= {title: metrics[f"{split}_{key}"] for key, title in SCORES.items()}
            rows.append(row)
        rows.append({"split": split, "method": "no prior given", "mIoU": metrics[f"{split}_no_prior_miou"]})
    return pd.DataFrame(rows)


def show() -> None:
    """Print the score table and where the report lies. Raises ArtifactError where nothing was evaluated yet."""
    try:
        metrics = json.loads(METRICS_PATH.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{METRICS_PATH}: not found, run the pipeline first: dvc repro") from None
    print(score_table(metrics).to_string(index=False, na_rep=""))
    print("percent; ground truth at original resolution, every sentence counted, probability > 0.5")
    print(f"report: {REPORT_PATH}")


def main() -> None:
    """Parse and run a command."""
    parser = argparse.ArgumentParser(prog="python -m l2l_core", description=__doc__)
    parser.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "show", help="print the last evaluation's scores"
    )
    parser.parse_args()
    show()


if __name__ == "__main__":
    sys.exit(exit_code(main))
