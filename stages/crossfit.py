"""Train the fold teachers of a round, in parallel if the machine allows it."""

from __future__ import annotations

import argparse
from pathlib import Path

from l2l_core.artifacts import records
from l2l_core.config import load_params
from l2l_core.core.files import copy_atomically, scratch_folder
from l2l_core.errors import run_stage
from l2l_core.training.fold_teachers import folds_key, skips_training, train_teacher, trainings_of
from l2l_core.training.side_by_side import end_with_parent, train_all


def main() -> None:
    """Round 0: train the fold teachers. Round k: also train them on the round's pseudo-labels (fold_update).

    Only the method `reinforce` uses them, and with `select.cross_label` every method. Under another rule, round 0
    trains none, and later rounds copy what exists.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--round", type=int, required=True)
    parser.add_argument("--fold", type=int, help="train this teacher alone; used by the parent process")
    parser.add_argument("--into", type=Path, help="folder of the teacher of --fold")
    given = parser.parse_args()
    round_number, params = given.round, load_params()
    if given.fold is not None:
        end_with_parent()
        train_teacher(params, round_number, given.fold, given.into)
    elif skips_training(params, round_number):
        previous = records.round_folder(round_number - 1) / "folds" if round_number else None
        copy_atomically(previous, records.round_folder(round_number) / "folds")
    else:
        # After a kill, finished teachers are kept, and unfinished ones resume from their checkpoints. The stage
        # `retrain` may have trained those of its round already, beside the round's model.
        with scratch_folder(f"crossfit-{round_number}", folds_key(params, round_number)) as done:
            train_all(params, trainings_of(params, round_number, done), records.INDEX)
            copy_atomically(done, records.round_folder(round_number) / "folds")


if __name__ == "__main__":
    run_stage(main)
