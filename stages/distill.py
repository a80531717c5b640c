"""Train the student for use without priors, on the labeled pairs and a round's accepted pseudo-labels."""

from __future__ import annotations

import argparse

from l2l_core.artifacts import records
from l2l_core.config import load_params
from l2l_core.core.files import file_sha256
from l2l_core.errors import run_stage
from l2l_core.model.segmenter import Segmenter
from l2l_core.training.runs import LABEL_INPUTS, PRIOR_INPUTS, round_streams, run_training


def main() -> None:
    """Continue from a round's model with every prior hidden, and write model/ and curves/ of data/distilled.

    Round 0 has no pseudo-labels: the student then trains on the labels alone.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--round", type=int, required=True, help="round whose model and pseudo-labels are used")
    round_number = parser.parse_args().round
    params = load_params()
    folder = records.round_folder(round_number)
    teacher, labels = folder / "model", folder / "history" / "pseudo_labels.parquet"
    student = Segmenter.load(teacher)
    student.takes_priors, student.distilled_from = False, file_sha256(teacher / "model.safetensors")
    run_training(
        params,
        "distill",
        student,
        round_streams(params, labels, with_priors=False),
        params.distill.steps,
        [*LABEL_INPUTS, *PRIOR_INPUTS, labels, teacher],
        records.DISTILLED_FOLDER / "model",
        records.DISTILLED_FOLDER / "curves",
    )


if __name__ == "__main__":
    run_stage(main)
