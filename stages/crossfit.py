"""Train the out-of-fold teachers of a round, beside each other where the machine allows it."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from l2l_core import records
from l2l_core.config import Params, load_params
from l2l_core.engine.beside import end_with_parent, find_places, run_beside
from l2l_core.engine.folds import folds_key, learn_nothing_new, train_teacher
from l2l_core.engine.resume import scratch_folder, whole_folder
from l2l_core.errors import exit_code
from l2l_core.progress import is_first_process


def main() -> None:
    """Round 0: train the fold teachers. Round k: let them learn from the round's pseudo-labels as well (fold_update).

    Only the policy `reinforce` uses them. Under a fixed rule round 0 trains none, and later rounds keep what is there.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--round", type=int, required=True)
    parser.add_argument(
        "--fold", type=int, help="train this teacher alone; the process that waits for all starts it so"
    )
    parser.add_argument("--into", type=Path, help="folder of the teacher of --fold")
    given = parser.parse_args()
    number, params = given.round, load_params()
    if given.fold is not None:
        end_with_parent()
        train_teacher(params, number, given.fold, given.into)
    elif learn_nothing_new(params, number):
        previous = records.round_folder(number - 1) / "folds" if number else None
        write(previous, records.round_folder(number) / "folds")
    else:
        # Teachers that are done outlive a kill, as the checkpoints of those under way do.
        with scratch_folder(f"crossfit-{number}", folds_key(params, number)) as done:
            train_missing(params, number, done)
            write(done, records.round_folder(number) / "folds")


def train_missing(params: Params, number: int, done: Path) -> None:
    """Train the teachers that are not there, beside each other or in turn."""
    missing = {fold: done / str(fold) for fold in range(params.select.folds) if not (done / str(fold)).exists()}
    for fold in set(range(params.select.folds)) - set(missing):
        print(f"crossfit-{number}-{fold}: done before", flush=True)
    places = find_places(params, params.select.folds)
    if places.at_once == 1:
        torch.set_num_threads(places.threads)
        for fold, folder in missing.items():
            train_teacher(params, number, fold, folder)
        return
    command = ["-m", "stages.crossfit", "--round", str(number)]
    run_beside(
        {
            f"crossfit-{number}-{fold}": [*command, "--fold", str(fold), "--into", str(folder)]
            for fold, folder in missing.items()
        },
        places,
    )


def write(source: Path | None, target: Path) -> None:
    """Copy a folder, once where several processes were launched together; None: write an empty one."""
    if is_first_process():
        with whole_folder(target) as folder:
            if source:
                shutil.copytree(source, folder, dirs_exist_ok=True)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
