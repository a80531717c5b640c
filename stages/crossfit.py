"""Out-of-fold teachers: each never saw a share of the labelled images, so that labels can be judged there."""

from __future__ import annotations

import argparse
import shutil

from l2l_core import records
from l2l_core.config import load_params
from l2l_core.engine.jobs import (
    LABEL_INPUTS,
    PRIOR_INPUTS,
    fold_of_images,
    labeled_stream,
    new_network,
    part_of,
    policy_of,
    pseudo_stream,
    run_training,
    without_images,
)
from l2l_core.engine.resume import fingerprint, scratch_folder, whole_folder
from l2l_core.errors import exit_code
from l2l_core.model.segmenter import Segmenter
from l2l_core.progress import is_first_process


def main() -> None:
    """Round 0: train the fold teachers. Round k: let them learn from the round's pseudo-labels as well (fold_update).

    A fixed rule never asks them: they stay as they were.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--round", type=int, required=True)
    number = parser.parse_args().round
    params = load_params()
    folds_out, previous = records.round_folder(number) / "folds", records.round_folder(number - 1) / "folds"
    pseudo_path = records.round_folder(number) / "pseudo_labels.parquet"
    if number and (policy_of(pseudo_path) != "reinforce" or params.select.fold_update == "kept"):
        with whole_folder(folds_out) as folder:
            shutil.copytree(previous, folder, dirs_exist_ok=True)
        return
    labeled = labeled_stream(params, 1.0 if number == 0 else params.retrain.labeled_share)
    pairs = labeled.batches.pairs
    fold = fold_of_images(pairs.image_row, params.select.folds, params.seed)
    further = number and params.select.fold_update == "further"
    # What they start from is an input of `further` alone: checkpoints of the two ways must not be mixed up.
    inputs = [*LABEL_INPUTS, *PRIOR_INPUTS, *((previous,) if further else ())]
    pseudo = None
    if number:
        inputs.append(pseudo_path)
        pseudo = pseudo_stream(params, pseudo_path, 1 - params.retrain.labeled_share)
    key = fingerprint("crossfit", repr(params), inputs)
    # Teachers that are done outlive a kill, as the checkpoint of the one under way does.
    with scratch_folder(f"crossfit-{number}", key) as done, whole_folder(folds_out) as folder:
        for left_out in range(params.select.folds):
            teacher = done / str(left_out)
            if teacher.exists():
                print(f"crossfit-{number}-{left_out}: done before", flush=True)
                continue
            purpose = f"crossfit-{number}-{left_out}"
            seen = part_of(labeled, (fold != left_out).nonzero()[0])
            if further:
                network = Segmenter.load(previous / str(left_out))
                steps = params.select.fold_update_steps
            else:
                network, steps = new_network(params, purpose), params.select.fold_steps
            if number:  # they stand for the round's model
                network.passes = params.retrain.passes
            # An image that is labelled in part also has pseudo-labels, by a teacher that knows its labels.
            others = None if pseudo is None else without_images(pseudo, pairs.image_row[fold == left_out])
            streams = [seen] if others is None else [seen, others]
            run_training(params, purpose, network, streams, steps, inputs, teacher, None)
        if is_first_process():
            shutil.copytree(done, folder, dirs_exist_ok=True)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
