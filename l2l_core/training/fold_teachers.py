"""Fold teachers: each leaves out one fold of the images, whose candidates it provides."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from l2l_core.artifacts import records
from l2l_core.config import Params
from l2l_core.core.files import fingerprint
from l2l_core.data.folds import fold_by_image
from l2l_core.model.segmenter import Segmenter
from l2l_core.training.runs import (
    LABEL_INPUTS,
    PRIOR_INPUTS,
    labeled_stream,
    method_of,
    new_network,
    part_of,
    pseudo_stream,
    run_training,
    training_settings,
    with_prior_swap,
    without_images,
)
from l2l_core.training.side_by_side import Training
from l2l_core.training.streams import OnlineStream, Stream


def pseudo_labels_of(round_number: int) -> Path:
    """Path of a round's pseudo-label table."""
    return records.round_folder(round_number) / "pseudo_labels.parquet"


def skips_training(params: Params, round_number: int) -> bool:
    """Whether a round trains no fold teachers: a fixed rule does not use them, and frozen ones stay after round 0.

    With `select.cross_label`, every rule uses them.
    """
    if round_number == 0:
        return not params.select.uses_fold_teachers
    # The method of the table, not of the parameters: the stage depends on it anyway.
    is_used = params.select.cross_label or method_of(pseudo_labels_of(round_number)) == "reinforce"
    return not is_used or params.select.fold_update == "freeze"


def folds_key(params: Params, round_number: int) -> str:
    """Fingerprint of all fold teachers of a round."""
    settings = f"{training_settings(params)} {params.select.fold_steps}"
    if round_number:
        settings += f" {params.select.fold_update} {params.select.fold_update_steps}"
        settings += f" {params.retrain.labeled_share} {params.retrain.prior_swap} {params.retrain.num_passes}"
        settings += f" {params.retrain.evolve_proposals}"
    return fingerprint("crossfit", settings, _inputs(params, round_number))


def trainings_of(params: Params, round_number: int, into: Path) -> dict[str, Training]:
    """The trainings of a round's teachers, one per fold, each with a separate folder."""
    command = ["-m", "stages.crossfit", "--round", str(round_number)]
    return {
        f"crossfit-{round_number}-{fold}": Training(
            folder := into / str(fold),
            partial(train_teacher, params, round_number, fold, folder),
            [*command, "--fold", str(fold), "--into", str(folder)],
        )
        for fold in range(params.select.folds)
    }


def train_teacher(params: Params, round_number: int, left_out: int, into: Path) -> None:
    """Train the teacher of a round that leaves out the images of one fold, and save it to `into`.

    It learns neither labels nor pseudo-labels of these images.
    """
    labeled = labeled_stream(params, 1.0 if round_number == 0 else params.retrain.labeled_share)
    pairs = labeled.batches.pairs
    fold = fold_by_image(params, pairs)
    run_name, steps = f"crossfit-{round_number}-{left_out}", params.select.fold_steps
    streams: list[Stream | OnlineStream] = [part_of(labeled, (fold[pairs.image_row] != left_out).nonzero()[0])]
    if _continues(params, round_number):
        network = Segmenter.load(records.round_folder(round_number - 1) / "folds" / str(left_out))
        steps = params.select.fold_update_steps
    else:
        network = new_network(params, run_name)
    if round_number:
        network.num_passes = params.retrain.num_passes  # the teachers represent the round's model
        pseudo = pseudo_stream(params, pseudo_labels_of(round_number), 1 - params.retrain.labeled_share)
        # Without pseudo-labels on held-out images: their teacher saw these images' labels.
        others = None if pseudo is None else without_images(pseudo, (fold == left_out).nonzero()[0])
        streams += [] if others is None else [others]
        streams = with_prior_swap(params, streams)
    run_training(params, run_name, network, streams, steps, _inputs(params, round_number), into, None)


def _continues(params: Params, round_number: int) -> bool:
    return round_number > 0 and params.select.fold_update == "continue"


def _inputs(params: Params, round_number: int) -> list[Path]:
    """Input files of a round's teachers, including the last round's teachers if training continues from them."""
    inputs = [*LABEL_INPUTS, *PRIOR_INPUTS]
    inputs += [records.round_folder(round_number - 1) / "folds"] if _continues(params, round_number) else []
    return inputs + ([pseudo_labels_of(round_number)] if round_number else [])
