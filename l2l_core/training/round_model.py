"""The training of a round's model on the labels and the round's pseudo-labels."""

from __future__ import annotations

from pathlib import Path

from l2l_core.artifacts import records
from l2l_core.config import Params
from l2l_core.core.progress import is_first_process, logger
from l2l_core.model.segmenter import Segmenter
from l2l_core.training.fold_teachers import pseudo_labels_of
from l2l_core.training.runs import (
    LABEL_INPUTS,
    PRIOR_INPUTS,
    method_of,
    new_network,
    round_streams,
    run_training,
    with_prior_swap,
)


def train_model(params: Params, round_number: int, into: Path) -> None:
    """Train the round's model and write it with its curve.

    With the method `mean_teacher`, the EMA teacher labels the unlabeled pairs during training. Training then starts
    from the last round's model for any `retrain.start`, since a random teacher gives useless labels.
    """
    run_name, streams = f"retrain-{round_number}", round_streams(params, pseudo_labels_of(round_number))
    if len(streams) == 1 and is_first_process():
        logger.info(f"round {round_number}: the selection accepted nothing, training on the labeled pairs alone")
    fresh = is_fresh(params, round_number)
    network = new_network(params, run_name) if fresh else Segmenter.load(model_before(round_number))
    network.num_passes = params.retrain.num_passes
    run_training(
        params,
        run_name,
        network,
        with_prior_swap(params, streams),
        params.retrain.steps,
        inputs_of(params, round_number),
        into / "model",
        into / "curves",
    )


def is_fresh(params: Params, round_number: int) -> bool:
    """Whether the round's training starts from random weights."""
    return params.retrain.start == "scratch" and method_of(pseudo_labels_of(round_number)) != "mean_teacher"


def model_before(round_number: int) -> Path:
    """The last round's model."""
    return records.round_folder(round_number - 1) / "model"


def inputs_of(params: Params, round_number: int) -> list[Path]:
    """Input files of the training, including the last model if it starts from that."""
    start = () if is_fresh(params, round_number) else (model_before(round_number),)
    return [*LABEL_INPUTS, *PRIOR_INPUTS, pseudo_labels_of(round_number), *start]
