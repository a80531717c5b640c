"""Select the pseudo-labels of a round and their valid pixels."""

from __future__ import annotations

import argparse
import time
from functools import partial

import pyarrow.compute as pc

from l2l_core.artifacts import records
from l2l_core.artifacts.curves import write_rows
from l2l_core.config import load_params
from l2l_core.core.device import choose_device, print_device, resolve_precision
from l2l_core.core.files import scratch_folder
from l2l_core.core.seeding import derive_seed, evenly_picked
from l2l_core.errors import run_stage
from l2l_core.model.batch_predictor import BatchPredictor
from l2l_core.pseudo_labels.generate import (
    images_of,
    label_key,
    label_unlabeled,
    score_out_of_fold,
    select_chunks,
    teachers_of,
)
from l2l_core.pseudo_labels.reinforce import CURVE_COLUMNS, UNLABELED_SENTENCES, train_policy


def main() -> None:
    """Write a round's pseudo_labels.parquet and policy.csv."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--round", type=int, required=True)
    round_number = parser.parse_args().round
    params = load_params()
    folder, previous = records.round_folder(round_number), records.round_folder(round_number - 1)
    device = choose_device(params.train.engine.device)
    print_device(device, resolve_precision(params.train.precision, device))
    load_teachers = [partial(BatchPredictor.from_run, model) for model in teachers_of(params, round_number)]
    with scratch_folder(f"select-{round_number}", label_key(params, round_number)) as scratch:
        unlabeled = label_unlabeled(params, load_teachers, scratch)
        policy, curve = None, []
        if params.select.method == "reinforce":
            labeled, scores = score_out_of_fold(params, previous / "folds")
            seed = derive_seed(params.seed, f"select-{round_number}")
            started = time.monotonic()
            image = images_of(params, labeled.sent_id)
            _, sample = unlabeled.take(evenly_picked(len(unlabeled.pairs), UNLABELED_SENTENCES))
            trained = train_policy(labeled, scores, sample, params.select, seed, image)
            policy, curve = trained.policy, trained.curve
            print(f"round {round_number}: policy trained in {time.monotonic() - started:.1f} s")
            del labeled, scores, sample  # their features are most of the memory
        table = select_chunks(params, round_number, unlabeled, policy)
        records.write_table(table, folder / "pseudo_labels.parquet", records.PSEUDO_LABELS)
        write_rows(folder / "policy.csv", CURVE_COLUMNS, curve)
    kept = pc.sum(table["accepted"]).as_py()
    print(f"round {round_number}: {params.select.method} accepts {kept} of {len(table)} pseudo-labels")


if __name__ == "__main__":
    run_stage(main)
