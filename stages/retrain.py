"""Train on the labeled pairs and on the valid pixels of the round's accepted pseudo-labels."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from l2l_core.artifacts import records
from l2l_core.config import load_params
from l2l_core.core.files import copy_atomically, fingerprint, scratch_folder
from l2l_core.errors import run_stage
from l2l_core.training import fold_teachers
from l2l_core.training.round_model import inputs_of, train_model
from l2l_core.training.runs import training_settings
from l2l_core.training.side_by_side import Training, end_with_parent, train_all


def main() -> None:
    """Write model/ and curves/ of a round.

    If another round follows, the fold teachers that it needs are trained beside the model, and the stage `crossfit`
    finds them done.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--round", type=int, required=True)
    parser.add_argument("--into", type=Path, help="train the model alone, into this folder; used by the parent process")
    given, params = parser.parse_args(), load_params()
    round_number, into = given.round, given.into
    if into is not None:
        end_with_parent()
        train_model(params, round_number, into)
        return
    settings = f"{training_settings(params)} {params.retrain!r}"
    key = fingerprint(f"retrain-{round_number}", settings, inputs_of(params, round_number))
    with ExitStack() as folders:
        # After a kill, finished trainings are kept, and unfinished ones resume from their checkpoints.
        done = folders.enter_context(scratch_folder(f"round-{round_number}", key))
        trainings = {
            f"retrain-{round_number}": Training(
                done / "model",
                partial(train_model, params, round_number, done),
                ["-m", "stages.retrain", "--round", str(round_number), "--into", str(done)],
            )
        }
        has_folds = not fold_teachers.skips_training(params, round_number)
        # If DVC has kept the teachers of an earlier run, they may still be valid.
        if has_folds and round_number < params.round and not (records.round_folder(round_number) / "folds").exists():
            key = fold_teachers.folds_key(params, round_number)
            folds = folders.enter_context(scratch_folder(f"crossfit-{round_number}", key, keep=True))
            trainings |= fold_teachers.trainings_of(params, round_number, folds)
        # The share of the threads must not depend on the number of rounds, since the bytes depend on it.
        train_all(params, trainings, records.INDEX, shares=params.select.folds if has_folds else 1)
        for part in ("model", "curves"):
            copy_atomically(done / part, records.round_folder(round_number) / part)


if __name__ == "__main__":
    run_stage(main)
